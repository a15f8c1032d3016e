"""The block-sparse linear layer on native CPU kernels, for float32, where they were built, and
chains of layers in one type."""

from contextvars import ContextVar
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .instruction_sets import index_of
from .pattern import Pattern, check_sizes

try:
    _native = import_module("._native", __package__)
    WHY_NOT = None
except ImportError as error:
    _native, WHY_NOT = None, f"not built ({error})"

INSTRUCTION_SETS = _native.INSTRUCTION_SETS if _native else ()  # of this machine, the best first
instruction_set = ContextVar("instruction_set", default=0)  # an index into them
WHY_NO_CODE = _native.WHY_NO_CODE if _native else WHY_NOT  # made from patterns; "" where it is
if _native:
    _native.use_dlpack(getattr(Tensor, "__dlpack_c_exchange_api__", None))  # torch 2.8 has none


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
    x, values, (crow, col) = rows(x), held(values), pattern[:2]
    bias = None if bias is None else held(bias)
    (batch, in_features), (_, C, R) = x.shape, values.shape
    y = x.new_empty(batch, out_features)
    if batch:
        _native.forward(
            *(instruction_set.get(), torch.get_num_threads()),
            *(x.data_ptr(), x.stride(0), y.data_ptr(), batch),
            *(values.data_ptr(), 0 if bias is None else bias.data_ptr()),
            *(crow.data_ptr(), col.data_ptr(), R, C, in_features, out_features),
            *(activation == "relu", program(pattern, C, R, in_features, out_features).address),
        )
    return F.gelu(y) if activation == "gelu" else y


def linear_grad_input(grad: Tensor, values: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """grad @ weight; grad: (batch, out_features) -> (batch, in_features)"""
    grad, values = rows(grad), held(values)
    (batch, out_features), (_, C, R) = grad.shape, values.shape
    dx = grad.new_empty(batch, in_features)
    if batch:
        _native.grad_input(
            *(instruction_set.get(), torch.get_num_threads()),
            *(grad.data_ptr(), grad.stride(0), dx.data_ptr(), batch),
            *(pattern.t_slots.data_ptr(), values.data_ptr()),
            *(pattern.ccol_indices.data_ptr(), pattern.t_row_indices.data_ptr()),
            *(C, R, out_features, in_features),
            transposed_program(pattern, C, R, in_features, out_features).address,
        )
    return dx


class Program:
    """Room for the machine code of a pattern, which the first call that gains by it makes.

    It goes with the pattern, which a layer makes anew when its indices change.
    """

    def __init__(self, crow: Tensor, col: Tensor, slots: Tensor | None, *sizes: int):
        """sizes: R, C, in_features, out_features; slots: of a transposed pattern"""
        addresses = crow.data_ptr(), col.data_ptr(), 0 if slots is None else slots.data_ptr()
        self.tensors = crow, col, slots  # alive while C may read them
        self.address = _native.new_program(*addresses, *sizes)  # freed with its capsule


def program(pattern: Pattern, C: int, R: int, in_features: int, out_features: int) -> Program:
    key = "linear", C, R, in_features, out_features
    found = pattern.programs.get(key)
    if found is None:
        made = Program(*pattern[:2], None, R, C, in_features, out_features)
        found = pattern.programs.setdefault(key, made)
    return found


def transposed_program(
    pattern: Pattern, C: int, R: int, in_features: int, out_features: int
) -> Program:
    """Of the input gradient."""
    key = "transposed", C, R, in_features, out_features
    found = pattern.programs.get(key)
    if found is None:
        indices = pattern.ccol_indices, pattern.t_row_indices, pattern.t_slots
        made = Program(*indices, C, R, out_features, in_features)
        found = pattern.programs.setdefault(key, made)
    return found


class Int8Layer:
    """A layer as the int8 kernels read it, its weight packed into words once.

    It goes with the chain, which is made anew when the weight changes.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], *numbers: int):
        """tensors: values, scales, bias, crow, col; numbers: R, C, in_features, out_features, relu;
        ValueError where a sum might not fit 32 bits"""
        addresses = (0 if t is None else t.data_ptr() for t in tensors)
        self.tensors = tensors  # alive while C may read them
        self.address = _native.new_int8_layer(*addresses, *numbers)  # freed with its capsule


def rows(x: Tensor) -> Tensor:
    """x: (batch, features), itself if each row is contiguous, else a copy"""
    return x if x.stride(1) == 1 else x.contiguous()


def in_words(x: Tensor) -> Tensor:
    """x: (batch, features) of bf16, itself if each row is whole words of two numbers, else a copy
    with a zero behind each row"""
    aligned = x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0
    if x.shape[1] % 2 == 0 and x.stride(1) == 1 and aligned:
        return x
    padded = x.new_zeros(len(x), x.shape[1] + x.shape[1] % 2)
    padded[:, : x.shape[1]] = x
    return padded


def held(t: Tensor) -> Tensor:
    """t, contiguous, in a tensor of our own: another thread that gives t other data, as `.data = `
    does, neither frees what a kernel reads nor changes its size."""
    held = t.detach().contiguous().resolve_neg()
    return held.clone() if held._is_zerotensor() else held


NESTED = "expected a dense tensor, got a nested one: give its x.values(), or x.to_padded_tensor(0)"


class ChainLayer(NamedTuple):
    """One layer of a chain: a sparse one, or a dense one without a pattern."""

    values: Tensor  # (nnz, C, R); dense: the weight, (out_features, in_features)
    pattern: Pattern | None
    bias: Tensor | None  # (out_features,)
    in_features: int
    out_features: int
    activation: str = "none"  # or "relu"
    scales: Tensor | None = None  # int8: (out_features,), what a 1 stands for, of a floating dtype


class Chain:
    """Linear layers in one call: each chunk of the batch passes all of them while it is in cache.

    chain(x): x (..., in_features) -> (..., out_features), on a CPU, with no gradient.

    Its weights are all float32, all bfloat16 or all int8, contiguous and on the CPU, else
    ValueError. It reads their memory as it was when the chain was made, and keeps that alive:
    values may be trained in place, but a parameter that was given other memory or another size
    needs a new chain, and so does an int8 weight that was written to. Nothing in a chain ever
    changes, so threads may share it. x is of the dtype of the weights; of any floating dtype for
    int8, whose numbers between layers are float32.
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
        self.layers, dtype = tuple(layers), layers[0].values.dtype
        if dtypes := {layer.values.dtype for layer in layers} - {dtype}:
            raise ValueError(f"expected layers in {dtype}, got also {dtypes}")
        self._is_int8 = dtype == torch.int8
        self.dtype = torch.float32 if self._is_int8 else dtype  # of x
        self.in_features, self.out_features = layers[0].in_features, layers[-1].out_features
        prepared = [_prepare(layer) for layer in layers]
        self._alive = [alive for alive, _ in prepared]  # while C may read it
        self._arguments = [argument for _, arguments in prepared for argument in arguments]
        self._forward, self._instruction_set, self._word = _ENTRIES[dtype]
        sizes = self.in_features, 32 // self._word, self.out_features
        self._plan = Tensor, *sizes, self._forward, *self._arguments
        self._is_whole = self.in_features % self._word == self.out_features % self._word == 0

    @staticmethod
    def takes(layer: ChainLayer) -> bool:
        """Whether a chain can have it: its tensors as a chain wants them, none or a ReLU."""
        if _native is None or layer.activation not in ("none", "relu"):
            return False
        if layer.values.dtype == torch.int8:
            tensors = layer.values, layer.scales, layer.bias
            return all(t is None or (type(t) is Tensor and t.is_cpu) for t in tensors)
        tensors = [layer.values] if layer.bias is None else [layer.values, layer.bias]
        return all(_is_plain(t) for t in tensors) and tensors[0].dtype == tensors[-1].dtype

    def __call__(self, x: Tensor) -> Tensor:
        y = None
        if self._is_whole:  # and then x is taken as it lies in memory, or not at all
            y = _native.call(x, self._plan, self._instruction_set(), torch.get_num_threads())
        return self._call_on_any(x) if y is None else y

    def _call_on_any(self, x: Tensor) -> Tensor:
        """Of another shape, dtype or memory, too; ValueError where x does not fit."""
        if x.is_nested:
            raise ValueError(NESTED)
        shape = x.shape
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}) inputs, got {tuple(shape)}")
        if self._is_int8 and x.dtype != self.dtype and x.is_floating_point() and x.is_cpu:
            return self(x.float()).to(x.dtype)
        if x.dtype != self.dtype or not x.is_cpu:
            raise ValueError(
                f"expected x in {self.dtype} on cpu, as the weight is, got {x.dtype} on {x.device}"
            )
        if len(shape) != 2:
            return self(x.reshape(-1, self.in_features)).view(*shape[:-1], self.out_features)
        if x.is_neg() or x.layout is not torch.strided:
            x = x.to_dense().resolve_neg()
        if x._is_zerotensor():  # which has no memory
            x = x.clone()
        x = rows(x) if self._word == 1 else in_words(x)
        y = x.new_empty(shape[0], self.out_features + self.out_features % self._word)
        if shape[0]:
            self._forward(
                *(self._instruction_set(), torch.get_num_threads()),
                *(x.data_ptr(), x.stride(0), y.data_ptr(), shape[0]),
                *self._arguments,
            )
        return y if y.shape[1] == self.out_features else y[:, : self.out_features].contiguous()


# of the type of a weight: its entry point and instruction set, and how many numbers are a word
_ENTRIES = _native and {
    torch.float32: (_native.forward, instruction_set.get, 1),
    torch.bfloat16: (_native.bf16_forward, partial(index_of, _native.BF16_INSTRUCTION_SETS), 2),
    torch.int8: (_native.int8_forward, partial(index_of, _native.INT8_INSTRUCTION_SETS), 1),
}


def _is_plain(t: Tensor) -> bool:
    """Whether its memory is its numbers, in order: it is no subclass, negation or lazy zeros."""
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.dtype in (torch.float32, torch.bfloat16)
        and t.is_cpu
        and t.is_contiguous()
        and not (t.is_neg() or t._is_zerotensor())
    )


def _prepare(layer: ChainLayer) -> tuple[tuple, tuple[int, ...]]:
    """What the arguments of a layer refer to, and the arguments: values, bias, crow, col, R, C,
    in_features, out_features, relu and program, or slots in bf16; in int8 an address"""
    values, pattern, bias, in_features, out_features, activation, scales = layer
    if activation not in ("none", "relu"):
        raise ValueError(f"expected activation 'none' or 'relu', got {activation!r}")
    if (values.dtype == torch.int8) != (scales is not None):
        raise ValueError(f"expected scales of int8 values and no others, got {values.dtype}")
    if values.dtype == torch.int8:
        if devices := {t.device for t in (values, scales, bias) if t is not None and not t.is_cpu}:
            raise ValueError(f"expected an int8 layer on the CPU, got {devices}")
        values, scales = held(values), held(scales.float())
        bias = None if bias is None else held(bias.float())
    else:
        values, bias = (None if t is None else t.detach() for t in (values, bias))
        for t in (values,) if bias is None else (values, bias):
            if not _is_plain(t):
                raise ValueError(
                    f"expected contiguous float32 or bfloat16 tensors on the CPU, "
                    f"got {t.dtype} of strides {t.stride()} on {t.device}"
                )
    if pattern is None:
        values = values.view(out_features, in_features, 1)
        pattern = _one_block_each(out_features)
    check_sizes(values, pattern, bias, in_features, out_features)
    (_, C, R), sizes, indices = values.shape, (in_features, out_features), pattern[:2]
    numbers = R, C, *sizes, activation == "relu"
    if values.dtype == torch.int8:
        if scales.shape != (out_features,):
            raise ValueError(f"expected {out_features} scales, got {tuple(scales.shape)}")
        packed = Int8Layer((values, scales, bias, *indices), *numbers)
        return (packed,), (packed.address,)
    made = None if values.dtype == torch.bfloat16 else program(pattern, C, R, *sizes)
    tensors = values, bias, *indices
    addresses = (0 if t is None else t.data_ptr() for t in tensors)
    last = 0 if made is None else made.address  # no slots: the weight is not a transposed one
    return (*tensors, made), (*addresses, *numbers, last)


def _one_block_each(out_features: int) -> Pattern:
    """A dense weight: each output owns one block, of all inputs."""
    crow = torch.arange(out_features + 1, dtype=torch.int32, device="cpu")
    col = torch.zeros(out_features, dtype=torch.int32, device="cpu")
    return Pattern.from_indices(crow, col, (out_features, 1))
