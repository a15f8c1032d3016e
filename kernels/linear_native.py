"""The block-sparse linear layer on native CPU kernels, for float32, where they were built."""

from contextvars import ContextVar
from importlib import import_module
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import Pattern

try:
    _native = import_module("._native", __package__)
    WHY_NOT = None
except ImportError as error:
    _native, WHY_NOT = None, f"not built ({error})"

INSTRUCTION_SETS = _native.INSTRUCTION_SETS if _native else ()  # of this machine, the best first
instruction_set = ContextVar("instruction_set", default=0)  # an index into them


def linear(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(x @ weight.T + bias)

    x: (batch, in_features); values: (nnz, C, R); bias: (out_features,) -> (batch, out_features)
    """
    x, values, (crow, col) = rows(x), values.contiguous(), pattern[:2]
    bias = None if bias is None else bias.contiguous()
    (batch, in_features), (_, C, R) = x.shape, values.shape
    y = x.new_empty(batch, out_features)
    if batch:
        _native.forward(
            *(instruction_set.get(), torch.get_num_threads()),
            *(x.data_ptr(), x.stride(0), y.data_ptr(), batch),
            *(values.data_ptr(), 0 if bias is None else bias.data_ptr()),
            *(crow.data_ptr(), col.data_ptr(), R, C, in_features, out_features),
            activation == "relu",
        )
    return F.gelu(y) if activation == "gelu" else y


def linear_grad_input(grad: Tensor, values: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """grad @ weight; grad: (batch, out_features) -> (batch, in_features)"""
    grad, values = rows(grad), values.contiguous()
    (batch, out_features), (_, C, R) = grad.shape, values.shape
    dx = grad.new_empty(batch, in_features)
    if batch:
        _native.grad_input(
            *(instruction_set.get(), torch.get_num_threads()),
            *(grad.data_ptr(), grad.stride(0), dx.data_ptr(), batch),
            *(pattern.t_slots.data_ptr(), values.data_ptr()),
            *(pattern.ccol_indices.data_ptr(), pattern.t_row_indices.data_ptr()),
            *(C, R, out_features, in_features),
        )
    return dx


def rows(x: Tensor) -> Tensor:
    """x: (batch, features), itself if each row is contiguous, else a copy"""
    return x if x.stride(1) == 1 else x.contiguous()


class ChainLayer(NamedTuple):
    """One layer of a chain: a sparse one, or a dense one without a pattern."""

    values: Tensor  # (nnz, C, R); dense: the weight, (out_features, in_features)
    pattern: Pattern | None
    bias: Tensor | None  # (out_features,)
    in_features: int
    out_features: int
    activation: str = "none"  # or "relu"


class Chain:
    """Linear layers in one call: each chunk of the batch passes all of them while it is in cache.

    chain(x): x (batch, in_features) -> (batch, out_features), float32 on a CPU, with no gradient.

    It keeps the tensors and asks at each call where their data are, so they may be trained, and
    moved by `module.to()`. ValueError if one is not float32, contiguous and on the CPU, at
    construction or at the first call after it moved. A layer that was given *other* tensors, as
    loading a `state_dict` with other blocks does, needs a new chain.
    """

    MAX_LAYERS = _native.MAX_LAYERS if _native else 0

    def __init__(self, layers: list[ChainLayer]):
        if _native is None:
            raise RuntimeError(f"native kernels are {WHY_NOT}")
        if not 1 <= len(layers) <= self.MAX_LAYERS:
            raise ValueError(f"expected 1 to {self.MAX_LAYERS} layers, got {len(layers)}")
        for before, after in pairwise(layers):
            if before.out_features != after.in_features:
                raise ValueError(
                    f"expected in_features {before.out_features}, got {after.in_features}"
                )
        self.in_features, self.out_features = layers[0].in_features, layers[-1].out_features
        self._layers = [_prepare(layer) for layer in layers]
        self._trained = [t for layer in self._layers for t in layer[:2] if t is not None]
        self._read_addresses()

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or not x.is_cpu or x.shape[1:] != (self.in_features,):
            raise ValueError(
                f"expected float32 (batch, {self.in_features}) on the CPU, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        if [t.data_ptr() for t in self._trained] != self._addresses:
            self._read_addresses()
        x = rows(x)
        y = x.new_empty(x.shape[0], self.out_features)
        if y.numel():
            _native.forward(
                *(instruction_set.get(), torch.get_num_threads()),
                *(x.data_ptr(), x.stride(0), y.data_ptr(), x.shape[0]),
                *self._arguments,
            )
        return y

    def _read_addresses(self) -> None:
        for t in self._trained:
            if t.dtype != torch.float32 or not t.is_cpu or not t.is_contiguous():
                raise ValueError(
                    f"expected contiguous float32 tensors on the CPU, "
                    f"got {t.dtype} of strides {t.stride()} on {t.device}"
                )
        self._addresses = [t.data_ptr() for t in self._trained]
        self._arguments = []
        for values, bias, crow, col, *numbers in self._layers:
            tensors = (values, bias, crow, col)
            self._arguments += [0 if t is None else t.data_ptr() for t in tensors] + numbers


def _prepare(layer: ChainLayer) -> tuple:
    """values, bias, crow, col, R, C, in_features, out_features, relu, as the kernels take them"""
    values, pattern, bias, in_features, out_features, activation = layer
    if activation not in ("none", "relu"):
        raise ValueError(f"expected activation 'none' or 'relu', got {activation!r}")
    if pattern is None:  # a block for each output
        C, R = in_features, 1
        crow = torch.arange(out_features + 1, dtype=torch.int32, device="cpu")
        col = torch.zeros(out_features, dtype=torch.int32, device="cpu")
    else:
        _, C, R = values.shape
        crow, col = (t.contiguous().cpu() for t in pattern[:2])
    return values, bias, crow, col, R, C, in_features, out_features, activation == "relu"
