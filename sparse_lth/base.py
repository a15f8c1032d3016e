"""BlockSparse, what every layer with a block-sparse weight is made of."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from . import bsr
from .kernels import (
    Chain,
    ChainLayer,
    Pattern,
    Weights,
    is_traced,
    linear,
    pattern_of,
    traced_linear,
)
from .kernels.linear_native import NESTED
from .kernels.linear_torch import ACTIVATIONS, to_dense
from .kernels.pattern import check_sizes
from .kernels.unchanged import Held, unchanged
from .lazy_weight import SparseWeight
from .optimizers import forget

INDEX_NAMES = ("crow_indices", "col_indices", "weight_kept")
BLOCKS = ("weight_values", *INDEX_NAMES)  # what a state_dict says of the blocks
_changing = threading.RLock()  # held while the tensors of a layer change together


class Snapshot(NamedTuple):
    """What a call computes with: tensors that belong together, whatever other threads do."""

    pattern: Pattern | None  # None where only a tracer can read the layer's tensors
    chain: Chain | None  # the native call, where it is possible
    seen: tuple[Held, ...] | None  # what the layer was then; None if nothing can tell
    alive: tuple[Tensor, ...]  # the memory of that, so that nothing else comes to lie there


class BlockSparse(nn.Module):
    """A layer whose weight is block-sparse: the (out_features, in_features) matrix.

    weight_values: Parameter (nnz_blocks, C, R); bias: Parameter (out_features,) or None
    crow_indices: int32 (block_rows + 1,); col_indices: int32 (nnz_blocks,)
    weight_kept: None, or bool (nnz_blocks, C, R) where a mask pruned weights inside kept blocks:
        those are 0, whatever is stored for them
    blocksize: (R, C) = outputs x inputs of one block; (1, 1) is unstructured
    activation: "none", "relu" or "gelu", applied to the output in the same kernel

    These are ordinary tensors, so `state_dict`, `deepcopy`, `pickle`, optimizers, `.to()` and
    `torch.compile` work as on any module. Whatever is done to them is seen at the next call, which
    checks the indices if they changed and raises ValueError where the tensors do not fit. Only
    optimizers of matrices, such as Muon, cannot train `weight_values`, which has three dimensions.
    """

    _last: Snapshot | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        blocksize: tuple[int, int] | int,
        density: float,
        activation: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"expected positive features, got {in_features} -> {out_features}")
        if not 0 <= density <= 1:
            raise ValueError(f"expected a density from 0 to 1, got {density}")
        self.in_features, self.out_features = in_features, out_features
        self.blocksize, self.activation = bsr.as_blocksize(blocksize), as_activation(activation)
        (R, C), (rows, cols) = self.blocksize, self.grid
        values = torch.empty(round(density * rows * cols), C, R, device=device, dtype=dtype)
        self.weight_values = nn.Parameter(values)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(values.new_empty(out_features))
        for name in INDEX_NAMES:
            self.register_buffer(name, None)
        self._draw_blocks()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(average inputs of an output), zero in the padding.

        Indices without valid numbers, as `to_empty` leaves them, are drawn anew.
        """
        if not self.weight_values.is_meta and not self._has_valid_indices():
            self._draw_blocks()
        nnz, C, _ = self.weight_values.shape
        bound = max(1, nnz * C / self.grid[0]) ** -0.5
        nn.init.uniform_(self.weight_values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if not self.weight_values.is_meta:
            with torch.no_grad():
                self.weight_values.mul_(self._inside())

    @property
    def grid(self) -> tuple[int, int]:
        """(block_rows, block_cols)"""
        return bsr.grid_shape((self.out_features, self.in_features), self.blocksize)

    @property
    def pattern(self) -> Pattern:
        """Where the kept blocks are, checked; ValueError if the indices are not valid."""
        try:
            return pattern_of(self.crow_indices, self.col_indices, self.grid)
        except ValueError as error:
            raise ValueError(
                f"{error}: these are not the indices of {type(self).__name__}; load a state_dict, "
                "or call reset_parameters()"
            ) from None

    @property
    def weight(self) -> Tensor:
        """The dense weight, to read; its numbers are made where they are asked for.

        Gradients reach `weight_values`. RuntimeError where something would write to it.
        """
        return SparseWeight.of(self)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the dense layer's weight: (out_features, in_features), or as a convolution has it."""
        return self.out_features, self.in_features

    @property
    def density(self) -> float:
        """Stored weights / all weights, the padding of a last block not counted."""
        return int(self._inside().sum()) / (self.in_features * self.out_features)

    def masked_values(self) -> Tensor:
        """(nnz_blocks, C, R): `weight_values`, 0 where a mask pruned inside a block."""
        kept = self.weight_kept
        return self.weight_values if kept is None else self.weight_values * kept

    def shaped_weight(self, values: Tensor | None = None) -> Tensor:
        """The dense weight, of `weight_shape` and differentiable in `weight_values`; or `values`
        of the same blocks, such as a gradient, in their places."""
        values = self.masked_values() if values is None else values
        matrix = self.out_features, self.in_features
        dense = to_dense(values, self.crow_indices, self.col_indices, matrix)
        return dense.view(self.weight_shape)

    def extra_repr(self) -> str:
        density = "unknown" if self.weight_values.is_meta else format(self.density, ".4f")
        text = f"bias={self.bias is not None}, blocksize={self.blocksize}, density={density}"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    def _inside(self) -> Tensor:
        """(nnz, C, R) bool: True where a stored value is a weight, False where it is padding."""
        (R, C), pattern = self.blocksize, self.pattern
        rows = pattern.row_indices[:, None] * R + torch.arange(R, device=pattern.row_indices.device)
        cols = pattern.col_indices[:, None] * C + torch.arange(C, device=pattern.col_indices.device)
        return (cols < self.in_features)[:, :, None] & (rows < self.out_features)[:, None, :]

    def _has_valid_indices(self) -> bool:
        try:
            return self.pattern is not None
        except ValueError:
            return False

    def _draw_blocks(self) -> None:
        """Random blocks, as many as there are values."""
        (rows, cols), nnz = self.grid, len(self.weight_values)
        order = torch.randperm(rows * cols if nnz else 0, device="cpu")
        kept = order[:nnz].sort().values
        starts = torch.arange(0, rows * cols + 1, cols, device="cpu")
        self._set_indices(torch.searchsorted(kept, starts).int(), (kept % cols).int())

    def _hold(
        self,
        weight_values: Tensor,
        crow_indices: Tensor,
        col_indices: Tensor,
        bias: Tensor | None = None,
        weight_kept: Tensor | None = None,
    ):
        """Takes these tensors, in the format of the class, in place of what the layer has, and
        returns the layer; ValueError if they do not fit."""
        shape = self.out_features, self.in_features
        bsr.validate(weight_values, crow_indices, col_indices, shape)
        if weight_values.shape[:0:-1] != self.blocksize:
            raise ValueError(
                f"expected blocks of {self.blocksize}, got {tuple(weight_values.shape[:0:-1])}"
            )
        if bias is not None and (bias.shape, bias.dtype) != (shape[:1], weight_values.dtype):
            raise ValueError(
                f"expected a bias of shape ({self.out_features},) and {weight_values.dtype}, "
                f"got {tuple(bias.shape)} and {bias.dtype}"
            )
        _check_kept(weight_kept, weight_values)
        for name, tensor in (("weight_values", weight_values), ("bias", bias)):
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor)
            self.register_parameter(name, tensor)
        self._set_indices(crow_indices, col_indices, weight_kept)
        return self

    def _hold_dense(self, dense: nn.Module, mask: Tensor | None):
        """Takes copies of the dense layer's weight and bias, under the mask of `from_dense`."""
        weight, bias = _current(dense, "weight"), _current(dense, "bias")
        promised = mask if mask is not None else getattr(dense, "weight_mask", None)
        mask = weight != 0 if promised is None else promised.to(weight.device, torch.bool)
        if mask.shape != weight.shape:
            raise ValueError(
                f"expected a mask of shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
            )
        mask = mask.flatten(1)
        blocks = bsr.from_dense(weight.detach().flatten(1), mask, self.blocksize)
        kept = None if promised is None else bsr.kept_in_blocks(mask, blocks)
        self._hold(*blocks, None if bias is None else bias.detach().clone(), kept)
        self.weight_values.requires_grad_(weight.requires_grad)
        if bias is not None:
            self.bias.requires_grad_(bias.requires_grad)
        return self

    def _set_indices(self, crow_indices: Tensor, col_indices: Tensor, kept: Tensor | None = None):
        for name, tensor in zip(INDEX_NAMES, (crow_indices, col_indices, kept), strict=True):
            if tensor is not None:
                tensor = tensor.to(self.weight_values.device)
                with torch.inference_mode(False):  # whose tensors do not count what is written
                    tensor = tensor.clone() if tensor.is_inference() else tensor
            setattr(self, name, tensor)

    def _snapshot(self) -> Snapshot:
        """The last one while all that it was made of is unchanged, else a new one.

        ValueError, naming what is wrong, where the tensors of the layer do not fit each other.
        """
        last = self._last
        if last is not None and unchanged(((vars(self), last.seen),)):
            return last
        with _changing:
            self._last = made = self._take_snapshot()
        return made

    def _take_snapshot(self) -> Snapshot:
        tensors = self.weight_values, self.bias, *(getattr(self, name) for name in INDEX_NAMES)
        activation = as_activation(self.activation)
        if any(tensors[n] is None for n in (0, 2, 3)):
            raise ValueError("expected weight_values, crow_indices and col_indices, got None")
        if len(devices := {t.device for t in tensors if t is not None}) > 1:
            raise ValueError(f"expected the tensors of a layer on one device, got {devices}")
        if not all(t is None or _has_numbers(t) for t in tensors):
            return Snapshot(None, None, None, ())
        alive = tuple(None if t is None else t.data for t in tensors)
        seen = _seen(tensors, alive, activation)  # before the indices are read: a write shows
        pattern, (values, bias, *_, kept) = self.pattern, alive
        if values.dim() != 3 or values.shape[:0:-1] != self.blocksize:
            raise ValueError(
                f"expected weight_values (nnz_blocks, C, R) in blocks (R, C) of {self.blocksize}, "
                f"got {tuple(values.shape)}"
            )
        _check_kept(kept, values)
        check_sizes(values, pattern, bias, self.in_features, self.out_features)
        sizes = self.in_features, self.out_features, activation
        layer = ChainLayer(values, pattern, bias, *sizes)
        chain = Chain([layer]) if kept is None and Chain.takes(layer) else None
        return Snapshot(pattern, chain, seen, alive)

    def product(self, x: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
        """activation(x @ weight.T + bias); x: (..., in_features) -> (..., out_features)"""
        if isinstance(x, Proxy):  # of torch.fx, which has no shape yet
            return self._traced_product(x, bias, activation)
        if x.is_nested:
            raise ValueError(NESTED)
        inputs = x.shape[-1] if x.dim() else None  # under jit.trace it is a Tensor
        if not isinstance(inputs, Tensor) and inputs != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}) inputs, got {tuple(x.shape)}")
        dtype = _autocast_dtype(x)
        x = x if dtype is None else x.to(dtype)
        if is_traced(x) or self._snapshot().pattern is None:
            if self.weight_values.is_meta and not x.is_meta:
                raise ValueError(
                    f"expected x on the meta device, where the weight is, got {x.device}"
                )
            return self._traced_product(x, bias, activation, dtype)
        with _changing:  # tensors of one moment
            values, bias = self._operands(bias, dtype)
            weights = self._weights(values, bias)
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        y = linear(flat, values, weights.pattern, bias, self.out_features, activation, weights)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _traced_product(self, x, bias, activation, dtype=None):
        values, bias = self._operands(bias, dtype)
        flat, indices = x.reshape(-1, self.in_features), (self.crow_indices, self.col_indices)
        y = traced_linear(flat, values, *indices, bias, self.out_features, activation)
        return y.view(x.shape[:-1] + (self.out_features,))  # noqa: RUF005, a Proxy has no length

    def _operands(
        self, bias: Tensor | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        """values and bias as autograd sees them, in another dtype if one is given"""
        values = self.masked_values()
        if dtype is None:
            return values, bias
        return values.to(dtype), None if bias is None else bias.to(dtype)

    def _weights(self, values: Tensor, bias: Tensor | None) -> Weights:
        """The numbers of both with the pattern; `_changing` is to be held from where they come."""
        numbers = None if bias is None else bias.data
        return Weights(values.data, self._snapshot().pattern, numbers)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_last"}

    def _apply(self, fn, recurse=True):
        """Moves the indices and leaves them their dtype, which `type()` would change."""
        before = {name: self._buffers[name] for name in INDEX_NAMES}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if tensor is not None and self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Takes other blocks as well as other values; all of them, or none and an error.

        The Parameter stays, so that an optimizer goes on training it, from a state of its own.
        """
        if f"{prefix}values" in state_dict:  # as files before version 0.2 call them
            state_dict[f"{prefix}weight_values"] = state_dict.pop(f"{prefix}values")
        given = {name: state_dict.get(f"{prefix}{name}") for name in BLOCKS}
        bias = state_dict.get(f"{prefix}bias")
        rest = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        if all(tensor is None for tensor in given.values()):
            return super()._load_from_state_dict(state_dict, prefix, *rest)
        try:
            _check_loadable({**given, "bias": bias})
            blocks = self._checked_blocks(given, bias)
        except ValueError as error:
            error_msgs.append(f"blocks of {prefix.rstrip('.') or type(self).__name__!r}: {error}")
            return None
        before = self.weight_values.shape
        with _changing:
            if blocks is not None:
                self._take_blocks(*blocks, local_metadata.get("assign_to_params_buffers", False))
            super()._load_from_state_dict(state_dict, prefix, *rest)
        if blocks is not None:
            forget(self.weight_values, before)
        return None

    def _checked_blocks(
        self, given: dict[str, Tensor | None], bias: Tensor | None
    ) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor | None] | None:
        """Shape of the values, crow, col, kept; None where they are those that the layer has."""
        now = {name: getattr(self, name) for name in given}
        indices_given = given["crow_indices"] is not None or given["col_indices"] is not None
        values, crow, col, kept = (now[n] if t is None else t for n, t in given.items())
        if indices_given and given["weight_kept"] is None:
            kept = None
        bsr.validate(values, crow, col, (self.out_features, self.in_features))
        if values.shape[:0:-1] != self.blocksize:
            raise ValueError(
                f"expected blocks of {self.blocksize}, got {tuple(values.shape[:0:-1])}; convert "
                f"a layer of those blocks instead"
            )
        _check_kept(kept, values)
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"expected a bias of {self.out_features}, got {tuple(bias.shape)}")
        indices = zip((crow, col, kept), (now[name] for name in INDEX_NAMES), strict=True)
        if values.shape == now["weight_values"].shape and all(_equal(*pair) for pair in indices):
            return None
        if "weight_values" not in self._parameters:
            raise ValueError(
                "expected the blocks that the layer has, since its weight_values are pruned or "
                "parametrized; remove that first"
            )
        return values.shape, crow, col, kept

    def _take_blocks(self, shape, crow, col, kept, assign: bool) -> None:
        """Room for the tensors of other blocks, in memory that no running call reads.

        assign: whether the Parameter will be another, as `load_state_dict(assign=True)` has it
        """
        parameter, bias = self._parameters["weight_values"], self._parameters.get("bias")
        room = parameter.data.new_empty(shape)
        if assign:
            self.weight_values = nn.Parameter(room, parameter.requires_grad)
        else:
            parameter.grad, parameter.data = None, room
            if bias is not None:
                bias.data = bias.data.clone()
        self._set_indices(crow.clone(), col.clone(), None if kept is None else kept.clone())


def _seen(tensors: tuple, alive: tuple, activation: str) -> tuple[Held, ...] | None:
    """What a change of a layer changes. Values that are trained in place stay the same.

    None for tensors that may change without a sign, as those of inference mode do.
    """
    values, bias, crow, col, _ = alive
    in_order = values.is_contiguous() and (bias is None or bias.is_contiguous())
    if not in_order or crow.is_inference() or col.is_inference():
        return None
    indices = zip(INDEX_NAMES, tensors[2:4], (crow, col), strict=False)
    return (
        Held.trained("weight_values", tensors[0], values),
        Held.trained("bias", tensors[1], bias),
        *(Held.buffer(*index) for index in indices),
        Held("_buffers", "weight_kept", tensors[4]),
        Held(None, "activation", activation),
    )


def _current(layer: nn.Module, name: str) -> Tensor | None:
    """The weight or bias that the next forward pass computes with.

    Under `torch.nn.utils.prune` the attribute is as old as the last forward pass.
    """
    if hasattr(layer, f"{name}_mask"):
        return getattr(layer, f"{name}_orig") * getattr(layer, f"{name}_mask")
    return getattr(layer, name)


def as_activation(name: str) -> str:
    """The name, if it is that of an activation; else ValueError."""
    if name not in [*ACTIVATIONS]:
        raise ValueError(f"expected activation in {list(ACTIVATIONS)}, got {name!r}")
    return name


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What `nn.Linear` would compute in instead of the dtype of x."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _check_loadable(given: dict) -> None:
    for name, t in given.items():
        if t is not None and not (
            isinstance(t, Tensor) and t.layout is torch.strided and not t.is_meta
        ):
            got = f"{t.layout} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"expected {name} as a dense tensor that has numbers, got {got}")


def _check_kept(kept: Tensor | None, values: Tensor) -> None:
    if kept is not None and (kept.shape, kept.dtype) != (values.shape, torch.bool):
        raise ValueError(
            f"expected weight_kept of shape {tuple(values.shape)} and torch.bool, "
            f"got {tuple(kept.shape)} and {kept.dtype}"
        )


def _has_numbers(t: Tensor) -> bool:
    """Whether they lie in memory that a kernel can read: no subclass, not on the meta device."""
    return type(t) in (Tensor, nn.Parameter) and not t.is_meta


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.is_meta or b.is_meta:
        return a is b
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b.to(a.device))
