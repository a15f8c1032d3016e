"""SparseLinear, a linear layer that stores and computes only its kept blocks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import bsr
from .kernels import Pattern, linear
from .kernels.linear_torch import ACTIVATIONS, to_dense

DERIVED = Pattern._fields[2:]  # rebuilt from the indices, so never saved


class SparseLinear(nn.Module):
    """`nn.Linear` with a block-sparse weight: x (..., in_features) -> (..., out_features).

    The constructor keeps `round(density * grid)` random blocks and initialises as `nn.Linear`
    does with the inputs that an output has on average; `from_dense` converts a pruned layer.
    Everything it holds is an ordinary tensor, so `state_dict`, `deepcopy`, `pickle`, optimizers,
    `.to()` and `torch.compile` work as on any module. Loading a `state_dict` takes its blocks too,
    and is the way to fill a layer that was made on the meta device.

    values: Parameter (nnz_blocks, C, R); bias: Parameter (out_features,) or None
    crow_indices: int32 (block_rows + 1,); col_indices: int32 (nnz_blocks,)
    blocksize: (R, C) = outputs x inputs of one block; (1, 1) is unstructured
    activation: "none", "relu" or "gelu", applied to the output in the same kernel
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        blocksize: tuple[int, int] = (16, 16),
        density: float = 0.1,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if in_features < 1 or out_features < 1 or min(blocksize) < 1:
            raise ValueError(
                f"expected positive features and blocksize, "
                f"got {in_features} -> {out_features} in blocks of {tuple(blocksize)}"
            )
        if not 0 <= density <= 1:
            raise ValueError(f"expected a density from 0 to 1, got {density}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"expected activation in {list(ACTIVATIONS)}, got {activation!r}")
        self.in_features, self.out_features = in_features, out_features
        self.blocksize, self.activation = tuple(blocksize), activation
        R, C = blocksize
        rows, cols = bsr.grid_shape((out_features, in_features), blocksize)
        count = round(density * rows * cols)
        order = torch.randperm(rows * cols if count else 0, device="cpu")
        kept = order[:count].sort().values
        self.values = nn.Parameter(torch.empty(len(kept), C, R, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        crow_indices = torch.searchsorted(
            kept, torch.arange(0, rows * cols + 1, cols, device="cpu")
        )
        self._set_indices(crow_indices.int(), (kept % cols).int())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(average inputs of an output), zero in the padding."""
        (nnz, C, _), (rows, _) = self.values.shape, self.pattern.grid
        bound = max(1, nnz * C / rows) ** -0.5
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        with torch.no_grad():
            self.values.mul_(self._inside())

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        mask: Tensor | None = None,
        blocksize: tuple[int, int] = (16, 16),
    ) -> "SparseLinear":
        """The same function as `linear` under `mask`: keeps every block that holds a kept weight.

        mask: (out_features, in_features), nonzero = kept. Without one, the layer's `weight_mask`
        if `torch.nn.utils.prune` put one there, else where its weight is not zero.
        """
        weight, bias = _current(linear, "weight"), _current(linear, "bias")
        if mask is None:
            mask = getattr(linear, "weight_mask", weight != 0)
        if min(blocksize) < 1:
            raise ValueError(f"expected a positive blocksize, got {tuple(blocksize)}")
        if mask.shape != weight.shape:
            raise ValueError(
                f"expected a mask of shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
            )
        blocks = bsr.from_dense(weight.detach(), mask.to(weight.device), blocksize)
        copied = None if bias is None else bias.detach().clone()
        layer = cls.from_blocks(linear.in_features, linear.out_features, *blocks, copied)
        layer.values.requires_grad_(weight.requires_grad)
        if bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)
        return layer

    @classmethod
    def from_blocks(
        cls,
        in_features: int,
        out_features: int,
        values: Tensor,
        crow_indices: Tensor,
        col_indices: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
    ) -> "SparseLinear":
        """A layer on these tensors, in the format of the class; ValueError if they do not fit."""
        bsr.validate(values, crow_indices, col_indices, (out_features, in_features))
        if bias is not None and (bias.shape, bias.dtype) != ((out_features,), values.dtype):
            raise ValueError(
                f"expected a bias of shape ({out_features},) and {values.dtype}, "
                f"got {tuple(bias.shape)} and {bias.dtype}"
            )
        _, C, R = values.shape
        layer = cls(in_features, out_features, bias is not None, (R, C), 0.0, activation, "meta")
        layer.values = nn.Parameter(values)
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        layer._set_indices(crow_indices, col_indices)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features), of the dtype of `values` unless under autocast -> (..., out)"""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}) inputs, got {tuple(x.shape)}")
        values, bias, device = self.values, self.bias, x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        if autocast and x.dtype != torch.float64:  # as nn.Linear has it
            dtype = torch.get_autocast_dtype(device)
            x, values = x.to(dtype), values.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if x.dim() == 2:
            return linear(x, values, self.pattern, bias, self.out_features, self.activation)
        flat = x.reshape(-1, self.in_features)
        y = linear(flat, values, self.pattern, bias, self.out_features, self.activation)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def pattern(self) -> Pattern:
        return Pattern(*(self._buffers[name] for name in Pattern._fields))

    @property
    def density(self) -> float:
        """Stored weights / all weights, the padding of a last block not counted."""
        return int(self._inside().sum()) / (self.in_features * self.out_features)

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same weight and bias; the activation is not part of it."""
        shape = (self.out_features, self.in_features)
        dense = nn.Linear(*shape[::-1], self.bias is not None, device="meta")
        dense.weight = nn.Parameter(to_dense(self.values.detach(), self.pattern, shape))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, "
        text += f"bias={self.bias is not None}, blocksize={self.blocksize}, "
        text += f"density={'unknown' if self.values.is_meta else format(self.density, '.4f')}"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    def _inside(self) -> Tensor:
        """(nnz, C, R) bool: True where a stored value is a weight, False where it is padding."""
        (R, C), pattern = self.blocksize, self.pattern
        rows = pattern.row_indices[:, None] * R + torch.arange(R, device=pattern.row_indices.device)
        cols = pattern.col_indices[:, None] * C + torch.arange(C, device=pattern.col_indices.device)
        return (cols < self.in_features)[:, :, None] & (rows < self.out_features)[:, None, :]

    def _set_indices(
        self, crow_indices: Tensor, col_indices: Tensor, device: torch.device | None = None
    ) -> None:
        """Takes valid indices and derives what the kernels need besides."""
        _, block_cols = bsr.grid_shape((self.out_features, self.in_features), self.blocksize)
        pattern = Pattern.from_indices(crow_indices, col_indices, block_cols)
        for name, tensor in zip(Pattern._fields, pattern, strict=True):
            tensor = tensor.to(device or self.values.device)
            self.register_buffer(name, tensor, persistent=name not in DERIVED)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """Takes the blocks of the `state_dict` as well as their values, once they are valid."""
        names = ("values", "crow_indices", "col_indices")
        if any(prefix + name in state_dict for name in names):
            values, crow_indices, col_indices = (
                state_dict.get(prefix + name, getattr(self, name)) for name in names
            )
            bsr.validate(values, crow_indices, col_indices, (self.out_features, self.in_features))
            if values.shape[:0:-1] != self.blocksize:
                raise ValueError(
                    f"expected blocks of {self.blocksize} in {prefix}values, "
                    f"got {tuple(values.shape[:0:-1])}"
                )
            if values.shape != self.values.shape:
                self.values = nn.Parameter(self.values.new_empty(values.shape))
            assign = local_metadata.get("assign_to_params_buffers", False)
            device = values.device if assign else self.values.device
            self._set_indices(crow_indices.clone(), col_indices.clone(), device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _current(linear: nn.Linear, name: str) -> Tensor | None:
    """The weight or bias that the next forward pass computes with.

    Under `torch.nn.utils.prune` the attribute is as old as the last forward pass.
    """
    if hasattr(linear, f"{name}_mask"):
        return getattr(linear, f"{name}_orig") * getattr(linear, f"{name}_mask")
    return getattr(linear, name)


def sparsify_(
    model: nn.Module,
    blocksize: tuple[int, int] = (16, 16),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Replaces, in place, every linear layer that has an empty block by a `SparseLinear`.

    filter_fn(module, name) says which layers may be replaced, by default all; hooks of a layer go
    with it. Returns `model`, or the new layer if `model` is itself a linear layer.
    """
    replaced = {}  # a layer that is shared stays shared
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear or (filter_fn and not filter_fn(module, name)):
            continue
        if module not in replaced:
            sparse = SparseLinear.from_dense(module, blocksize=blocksize)
            rows, cols = sparse.pattern.grid
            replaced[module] = sparse if len(sparse.values) < rows * cols else module
        if name == "":
            return replaced[module]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replaced[module])
    return model
