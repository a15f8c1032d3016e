"""BlockSparse, what every layer with a block-sparse weight is made of."""

import threading
import weakref
from typing import NamedTuple
from warnings import warn

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import bsr
from .kernels import Chain, ChainLayer, Pattern, backend, pattern_of
from .kernels.linear_torch import ACTIVATIONS, to_dense
from .weight import SparseWeight

INDICES = ("crow_indices", "col_indices")
BLOCKS = ("weight_values", *INDICES, "weight_kept")  # what a state_dict says of the blocks
PLAIN = (Tensor, nn.Parameter)  # not a subclass, which may hold its numbers elsewhere
_changing = threading.RLock()  # held while the tensors of a layer change together


class Snapshot(NamedTuple):
    """What a call computes with: tensors that belong together, whatever other threads do."""

    pattern: Pattern
    chain: Chain | None  # the native call, where one is possible
    # of the layer's own tensors, to notice that they are others or have changed
    values: Tensor
    bias: Tensor | None
    crow: Tensor
    col: Tensor
    marks: tuple[int, ...]


class BlockSparse(nn.Module):
    """A layer whose weight is block-sparse, stored as the (out_features, in_features) matrix.

    weight_values: Parameter (nnz_blocks, C, R); bias: Parameter (out_features,) or None
    crow_indices: int32 (block_rows + 1,); col_indices: int32 (nnz_blocks,)
    weight_kept: bool (nnz_blocks, C, R), or None where every stored weight may train: weights that
        a mask pruned inside a kept block are 0 whatever is stored for them
    blocksize: (R, C) = outputs x inputs of one block; (1, 1) is unstructured
    activation: "none", "relu" or "gelu", applied to the output in the same kernel

    These are ordinary tensors: whatever torch does to them is seen at the next call, which checks
    the indices again if they are others, and raises ValueError where the tensors do not fit.
    """

    in_features: int  # of the matrix
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        blocksize: tuple[int, int],
        density: float,
        activation: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        blocksize = bsr.as_blocksize(blocksize)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"expected positive features, got {in_features} -> {out_features}")
        if not 0 <= density <= 1:
            raise ValueError(f"expected a density from 0 to 1, got {density}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"expected activation in {list(ACTIVATIONS)}, got {activation!r}")
        self.in_features, self.out_features = in_features, out_features
        self.blocksize, self.activation = blocksize, activation
        R, C = blocksize
        nnz = round(density * self.grid[0] * self.grid[1])
        options = {"device": device, "dtype": dtype}
        self.weight_values = nn.Parameter(torch.empty(nnz, C, R, **options))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **options))
        self.register_buffer("crow_indices", None)
        self.register_buffer("col_indices", None)
        self.register_buffer("weight_kept", None)
        self._last = None
        self._draw_blocks()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(average inputs of an output), zero in the padding.

        Indices that are not valid, as after `to_empty`, are drawn anew.
        """
        if not self.weight_values.is_meta:
            try:
                pattern_of(self.crow_indices, self.col_indices, self.grid)
            except ValueError:
                self._draw_blocks()
        nnz, C, _ = self.weight_values.shape
        bound = max(1, nnz * C / self.grid[0]) ** -0.5
        nn.init.uniform_(self.weight_values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if not self.weight_values.is_meta:
            with torch.no_grad():
                self.weight_values.mul_(self._stored())

    @property
    def grid(self) -> tuple[int, int]:
        """(block_rows, block_cols)"""
        return bsr.grid_shape((self.out_features, self.in_features), self.blocksize)

    @property
    def pattern(self) -> Pattern:
        """Where the kept blocks are, checked; ValueError if the indices are not valid."""
        return self._snapshot().pattern

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), to read: its numbers are made when they are asked for.

        `F.linear` with it runs the sparse kernels, gradients reach `weight_values`, and what would
        write to it raises RuntimeError.
        """
        return SparseWeight.of(self)

    @property
    def density(self) -> float:
        """Stored weights / all weights; neither padding nor weights pruned in a block count."""
        return int(self._stored().sum()) / (self.in_features * self.out_features)

    def masked_values(self) -> Tensor:
        """(nnz_blocks, C, R): `weight_values`, 0 where a mask pruned inside a block"""
        kept = self.weight_kept
        return self.weight_values if kept is None else self.weight_values * kept

    def dense_weight(self) -> Tensor:
        """(out_features, in_features), differentiable in `weight_values`"""
        return to_dense(
            self.masked_values(),
            *(self.crow_indices, self.col_indices),
            (self.out_features, self.in_features),
        )

    def extra_repr(self) -> str:
        known = not self.weight_values.is_meta
        text = f"bias={self.bias is not None}, blocksize={self.blocksize}, "
        text += f"density={format(self.density, '.4f') if known else 'unknown'}"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    def _stored(self) -> Tensor:
        """(nnz, C, R) bool: True where a stored value is a weight: no padding, not pruned."""
        (R, C), pattern = self.blocksize, self.pattern
        rows = pattern.row_indices[:, None] * R + torch.arange(R, device=pattern.row_indices.device)
        cols = pattern.col_indices[:, None] * C + torch.arange(C, device=pattern.col_indices.device)
        inside = (cols < self.in_features)[:, :, None] & (rows < self.out_features)[:, None, :]
        return inside if self.weight_kept is None else inside & self.weight_kept

    def _draw_blocks(self) -> None:
        """Random blocks, as many as there are values."""
        rows, cols = self.grid
        nnz = len(self.weight_values)
        order = torch.randperm(rows * cols if nnz else 0, device="cpu")
        kept = order[:nnz].sort().values
        starts = torch.arange(0, rows * cols + 1, cols, device="cpu")
        self._set_blocks(torch.searchsorted(kept, starts).int(), (kept % cols).int())

    def _set_blocks(self, crow_indices: Tensor, col_indices: Tensor, kept: Tensor | None = None):
        device = self.weight_values.device
        self.crow_indices = crow_indices.to(device)
        self.col_indices = col_indices.to(device)
        self.weight_kept = None if kept is None else kept.to(device)

    def _snapshot(self) -> Snapshot:
        """The last snapshot while all it was made of is unchanged, else a new one."""
        last = self._last
        if last is not None:
            parameters, buffers = self._parameters, self._buffers
            values, bias = parameters.get("weight_values"), parameters.get("bias")
            crow, col = buffers["crow_indices"], buffers["col_indices"]
            if (
                values is last.values
                and bias is last.bias
                and crow is last.crow
                and col is last.col
                and _marks(values, bias, crow, col) == last.marks
            ):
                return last
        with _changing:
            self._last = made = self._take_snapshot()
        return made

    def _take_snapshot(self) -> Snapshot:
        values, bias, kept = self.weight_values, self.bias, self.weight_kept
        crow, col = self.crow_indices, self.col_indices
        pattern = pattern_of(crow, col, self.grid)
        ...
