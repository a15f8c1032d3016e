"""Int8SparseLinear, a block-sparse linear layer with int8 weights, for inference."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import bsr
from .base import as_activation
from .kernels import Chain, is_traced, pattern_of
from .kernels.calls import kept_weights, plain
from .kernels.linear_int8 import MOST_INPUTS, Int8Weight, call, chain_of, linear, quantized
from .kernels.linear_torch import to_dense
from .kernels.quantized import int8_linear
from .kernels.unchanged import Held, unchanged
from .layers import SparseLinear
from .lazy_weight import SparseWeight


class Int8Snapshot(NamedTuple):
    """The native call of a layer as it was, published whole, so that threads may share it."""

    chain: Chain  # see `chain_of`
    activation: str
    seen: tuple[Held, ...] | None  # what the layer was then; None if nothing can tell


class Int8SparseLinear(nn.Module):
    """A `SparseLinear` with int8 weights, for inference: x (..., in_features) -> (..., outputs).

    weight_values: int8 (nnz_blocks, C, R); weight_scales: (out_features,), what a 1 stands for, in
        bfloat16 where `quantize_` made them
    crow_indices, col_indices: as those of `SparseLinear`; bias: (out_features,) or None

    All are buffers, and what is written to them is seen at the next call, unless through `.data`.
    On a CPU that call also keeps a copy of the weight as its kernels read it. Activations are
    quantised as they come, each row of the batch by itself, in 256 steps between its least and its
    largest number.
    """

    _last: Int8Snapshot | None = None

    def __init__(
        self,
        values: Tensor,
        scales: Tensor,
        indices: tuple[Tensor, Tensor],
        bias: Tensor | None,
        features: tuple[int, int],
        activation: str = "none",
    ):
        """indices: (crow, col); features: (in, out); ValueError unless all of it fits"""
        super().__init__()
        self.in_features, self.out_features = features
        self.activation = as_activation(activation)
        if values.dim() != 3 or values.dtype != torch.int8:
            raise ValueError(
                f"expected int8 values (nnz_blocks, C, R), got {values.dtype} of shape "
                f"{tuple(values.shape)}"
            )
        self.blocksize = tuple(values.shape[:0:-1])
        for name, t in (("scales", scales), ("bias", bias)):
            if t is not None and (t.shape != (self.out_features,) or not t.is_floating_point()):
                raise ValueError(
                    f"expected {self.out_features} floating-point {name}, got {t.dtype} of shape "
                    f"{tuple(t.shape)}"
                )
        pattern_of(*indices, self.grid)  # checks them
        for name, tensor in zip(_BUFFERS, (values, scales, bias, *indices), strict=True):
            with torch.inference_mode(False):  # whose tensors do not count what is written
                own = tensor is not None and tensor.is_inference()
                self.register_buffer(name, tensor.clone() if own else tensor)

    @classmethod
    def from_sparse(cls, layer: SparseLinear) -> "Int8SparseLinear":
        """ValueError where a sum of an output might not fit 32 bits."""
        if layer.in_features > MOST_INPUTS:
            raise ValueError(f"expected at most {MOST_INPUTS} inputs, got {layer.in_features}")
        with torch.no_grad():
            features = layer.in_features, layer.out_features
            weight = quantized(layer.masked_values(), layer.pattern, features[::-1])
            bias = None if layer.bias is None else layer.bias.detach().clone()
            indices = layer.crow_indices.clone(), layer.col_indices.clone()
            return cls(*weight, indices, bias, features, layer.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features), in any floating dtype, which the output has"""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}) inputs, got {tuple(x.shape)}")
        # autograd, too, wants to see an op, which says that it has no gradient
        traced = is_traced(x) or (torch.is_grad_enabled() and x.requires_grad)
        if x.is_cpu and Chain.MAX_LAYERS and not traced:
            snapshot = self._snapshot()
            return call(snapshot.chain, plain(x), snapshot.activation)
        flat = x.reshape(-1, self.in_features)
        weight = Int8Weight(self.weight_values, self.weight_scales)
        indices, last = (self.crow_indices, self.col_indices), (self.out_features, self.activation)
        if traced:
            y = int8_linear(flat, *weight, *indices, self.bias, *last)
        else:
            y = linear(flat, weight, pattern_of(*indices, self.grid), self.bias, *last)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """The dense weight that the int8 numbers stand for, to read, in the dtype of the bias or in
        float32. RuntimeError where something would write to it."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return SparseWeight.of(self, detached=True, dtype=dtype)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def shaped_weight(self) -> Tensor:
        """(out_features, in_features), what `weight` reads"""
        values = self.weight_values.float()
        whole = to_dense(values, self.crow_indices, self.col_indices, self.weight_shape)
        whole = whole * self.weight_scales[:, None].float()
        return whole if self.bias is None else whole.to(self.bias.dtype)

    @property
    def grid(self) -> tuple[int, int]:
        """(block_rows, block_cols)"""
        return bsr.grid_shape((self.out_features, self.in_features), self.blocksize)

    @property
    def density(self) -> float:
        """Stored weights / all weights, the padding of a last block not counted."""
        shape, block = (self.out_features, self.in_features), self.weight_values.shape[1:]
        kept = kept_weights(shape, block, self.crow_indices, self.col_indices)
        return kept / (self.in_features * self.out_features)

    def _snapshot(self) -> Int8Snapshot:
        """The last one while all that it was made of is unchanged, else a new one."""
        last = self._last
        if last is None or not unchanged(((vars(self), last.seen),)):
            self._last = last = self._take_snapshot()
        return last

    def _take_snapshot(self) -> Int8Snapshot:
        tensors, activation = [self._buffers[name] for name in _BUFFERS], self.activation
        seen = _seen(tensors, activation)  # before they are read: a write shows
        values, scales, bias, *indices = tensors
        features = self.in_features, self.out_features
        pattern = pattern_of(*indices, self.grid)
        chain = chain_of(Int8Weight(values, scales), pattern, bias, features, activation)
        return Int8Snapshot(chain, activation, seen)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_last"}

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        text = f"{sizes}, bias={self.bias is not None}, blocksize={self.blocksize}, int8"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"


def _seen(tensors: list[Tensor | None], activation: str) -> tuple[Held, ...] | None:
    """What a change of a layer changes; None for tensors that may change without a sign, as those
    of inference mode do."""
    if any(t is not None and t.is_inference() for t in tensors):
        return None
    buffers = (Held.buffer(name, t, t) for name, t in zip(_BUFFERS, tensors, strict=True))
    return (*buffers, Held(None, "activation", activation))


_BUFFERS = "weight_values", "weight_scales", "bias", "crow_indices", "col_indices"
