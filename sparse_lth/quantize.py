"""quantize_: the sparse linear layers of a model in int8, for inference."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import bsr
from .base import as_activation
from .convert import own_hooks
from .kernels import is_traced, pattern_of
from .kernels.calls import kept_weights
from .kernels.linear_int8 import MOST_INPUTS, Int8Weight, linear, quantized, totals_of
from .kernels.quantized import int8_linear
from .layers import SparseLinear


class Int8SparseLinear(nn.Module):
    """A `SparseLinear` with int8 weights, for inference: x (..., in_features) -> (..., outputs).

    weight_values: int8 (nnz_blocks, C, R); weight_scales: (out_features,), what a 1 stands for, in
        bfloat16 where `quantize_` made them
    weight_totals: int32 (out_features,), the sums of the outputs' weights, no part of a state_dict
    crow_indices, col_indices: as those of `SparseLinear`; bias: (out_features,) or None

    All are buffers. Activations are quantised as they come, each row of the batch by itself, in 256
    steps between its least and its largest number.
    """

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
        self.register_buffer("weight_values", values)
        self.register_buffer("weight_scales", scales)
        self.register_buffer("bias", bias)
        for name, tensor in zip(("crow_indices", "col_indices"), indices, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("weight_totals", self._totals(), persistent=False)

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
            return cls(*weight[:2], indices, bias, features, layer.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features), in any floating dtype, which the output has"""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}) inputs, got {tuple(x.shape)}")
        flat, weight = x.reshape(-1, self.in_features), self._weight()
        indices, last = (self.crow_indices, self.col_indices), (self.out_features, self.activation)
        if is_traced(x) or (torch.is_grad_enabled() and x.requires_grad):
            y = int8_linear(flat, *weight, *indices, self.bias, *last)
        else:
            y = linear(flat, weight, pattern_of(*indices, self.grid), self.bias, *last)
        return y.view(*x.shape[:-1], self.out_features)

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

    def _weight(self) -> Int8Weight:
        return Int8Weight(self.weight_values, self.weight_scales, self.weight_totals)

    def _totals(self) -> Tensor:
        pattern = pattern_of(self.crow_indices, self.col_indices, self.grid)
        return totals_of(self.weight_values, pattern, (self.out_features, self.in_features))

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.weight_totals = self._totals()

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        text = f"{sizes}, bias={self.bias is not None}, blocksize={self.blocksize}, int8"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"


def quantize_(
    model: nn.Module,
    config: str = "int8",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Replaces, in place, the `SparseLinear` layers of a model by `Int8SparseLinear`.

    config: "int8", the only one: int8 weights with a scale for each output, and activations that
        are quantised as they come, each row of the batch by itself
    filter_fn(module, name): which layers, by default all. Hooks and flags are kept. All layers are
    replaced, or none and a ValueError.
    """
    if config != "int8":
        raise ValueError(f"expected config 'int8', got {config!r}")
    if isinstance(model, SparseLinear):
        raise ValueError("expected a model with SparseLinear layers in it, got one of them alone")
    made = {
        module: Int8SparseLinear.from_sparse(module)
        for name, module in model.named_modules()
        if type(module) is SparseLinear and (filter_fn is None or filter_fn(module, name))
    }
    if not made:
        raise ValueError(f"expected a SparseLinear to quantise in {type(model).__name__}, got none")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = made.get(child, child)
    for old, new in made.items():
        vars(new).update({name: vars(old)[name] for name in _CARRIED})
        own_hooks(new)


# Hooks and flags: what any module holds besides its tensors and its parts
_CARRIED = vars(nn.Module()).keys() - {
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
}
