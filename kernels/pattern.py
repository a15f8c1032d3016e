"""Where the kept blocks of a weight are: checked once, then read by the kernels without a doubt."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Pattern(NamedTuple):
    """The kept blocks of an (out_features, in_features) weight: int32 tensors on one device.

    The weight is a grid of block_rows x block_cols blocks of R outputs x C inputs; `nnz` of them
    are kept, and `values[n]`, of shape (C, R), is the n-th in row-major order, transposed.
    The first two tensors say everything; the others are derived, for the kernels' sake.

    Kernels trust a pattern, so `from_indices` and `pattern_of` are the only ways to make one: its
    tensors are checked copies that nobody else holds, and nothing may write to them.
    """

    crow_indices: Tensor  # (block_rows + 1,): row r owns values[crow[r] : crow[r + 1]]
    col_indices: Tensor  # (nnz,): block column of values[n]
    row_indices: Tensor  # (nnz,): block row of values[n]
    row_order: Tensor  # (block_rows,): block rows, the one with the most blocks first
    ccol_indices: Tensor  # (block_cols + 1,): column c owns entries ccol[c] : ccol[c + 1] of ...
    t_row_indices: Tensor  # (nnz,): ... the block rows, column by column
    t_slots: Tensor  # (nnz,): ... and which of `values` each one is
    col_order: Tensor  # (block_cols,): block columns, the one with the most blocks first
    programs: dict  # what a backend has made of this pattern, by what it made it for

    @classmethod
    def from_indices(
        cls, crow_indices: Tensor, col_indices: Tensor, grid: tuple[int, int]
    ) -> "Pattern":
        """Copies the indices, checks them and derives the rest; ValueError unless well-formed.

        grid: (block_rows, block_cols)
        """
        with torch.inference_mode(False):  # a pattern outlives the mode that it was made in
            crow, col = (_copied(t) for t in (crow_indices, col_indices))
            check_indices(crow, col, grid, len(col))
            per_row, per_col = crow.diff(), torch.bincount(col, minlength=grid[1])
            rows = row_indices(crow, len(col))
            slots = col.argsort(stable=True)
            derived = (
                rows,
                per_row.argsort(descending=True, stable=True),
                torch.cat([per_col.new_zeros(1), per_col.cumsum(0)]),
                rows[slots],
                slots,
                per_col.argsort(descending=True, stable=True),
            )
            return cls(crow, col, *(t.to(torch.int32) for t in derived), {})

    @property
    def grid(self) -> tuple[int, int]:
        """(block_rows, block_cols)"""
        return self.row_order.shape[0], self.col_order.shape[0]


def _copied(indices: Tensor) -> Tensor:
    return torch.empty_like(indices, memory_format=torch.contiguous_format).copy_(indices)


def check_indices(
    crow_indices: Tensor, col_indices: Tensor, grid: tuple[int, int], nnz: int
) -> None:
    """Raises ValueError unless they place nnz blocks in such a grid, in row-major order."""
    rows, cols = grid
    for name, indices in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if (indices.dtype, indices.dim(), indices.is_contiguous()) != (torch.int32, 1, True):
            raise ValueError(
                f"expected {name} to be a contiguous vector of int32, got {indices.dtype} of "
                f"shape {tuple(indices.shape)}, strides {indices.stride()}"
            )
    if len(crow_indices) != rows + 1:
        raise ValueError(
            f"expected {rows + 1} crow_indices for {rows} block rows, got {len(crow_indices)}"
        )
    if len(col_indices) != nnz:
        raise ValueError(f"expected {nnz} col_indices for {nnz} blocks, got {len(col_indices)}")
    crow, col = crow_indices.cpu().long(), col_indices.cpu().long()
    if crow[0] != 0 or crow[-1] != nnz or (crow.diff() < 0).any():
        few = f"{crow.tolist()}" if len(crow) <= 8 else f"{crow[:8].tolist()} ..."
        raise ValueError(f"expected crow_indices to rise from 0 to {nnz}, got {few}")
    if nnz and (col.min() < 0 or col.max() >= cols):
        raise ValueError(
            f"expected col_indices from 0 to {cols - 1}, got {col.min()} to {col.max()}"
        )
    falls = (col.diff() <= 0).nonzero().flatten() + 1
    inside = ~torch.isin(falls, crow)  # a new block row may start again at a lower column
    if inside.any():
        n = int(falls[inside][0])
        raise ValueError(
            f"expected col_indices to rise strictly within a block row, "
            f"got {col[n - 1]} then {col[n]} at {n}"
        )


def check_sizes(
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
) -> None:
    """ValueError unless a kernel that trusts these sizes stays within each of the tensors."""
    if pattern.crow_indices.device != values.device:
        raise ValueError(
            f"expected indices on {values.device}, as the values are, "
            f"got {pattern.crow_indices.device}"
        )
    nnz, C, R = values.shape
    grid, blocks = (-(-out_features // R), -(-in_features // C)), len(pattern.col_indices)
    if (nnz, grid) != (blocks, pattern.grid):
        raise ValueError(
            f"expected values of {blocks} blocks in a grid of {pattern.grid}, "
            f"got {tuple(values.shape)} for a grid of {grid}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"expected a bias of shape ({out_features},), got {tuple(bias.shape)}")


def row_indices(crow_indices: Tensor, nnz: int) -> Tensor:
    """(nnz,) int64: the block row of each block; in operations that compile, export and vmap."""
    ends = crow_indices[1:].long()
    passed = ends.new_zeros(nnz + 1).scatter_add(0, ends, torch.ones_like(ends))
    return passed.cumsum(0)[:nnz]  # how many rows have ended


class _Known(NamedTuple):
    """A pattern, and what it was derived from."""

    pattern: Pattern
    grid: tuple[int, int]
    marks: tuple | None  # None for tensors of inference mode, which count no versions
    alive: tuple[Tensor, Tensor]  # their memory, so that no other indices come to lie there

    def is_of(self, crow_indices: Tensor, col_indices: Tensor, grid: tuple[int, int]) -> bool:
        marks = _marks(crow_indices, col_indices)
        if marks is None:
            pairs = zip(self.pattern, (crow_indices, col_indices), strict=False)
            return grid == self.grid and all(torch.equal(a, b) for a, b in pairs)
        return (grid, marks) == (self.grid, self.marks)


def _marks(*indices: Tensor) -> tuple | None:
    """What is another for other indices, and for these once they are written to."""
    if any(t.is_inference() for t in indices):
        return None
    return tuple((t.data_ptr(), t._version, t.shape) for t in indices)


_known = WeakTensorKeyDictionary()  # col_indices -> _Known


def pattern_of(crow_indices: Tensor, col_indices: Tensor, grid: tuple[int, int]) -> Pattern:
    """`Pattern.from_indices`, derived anew only where the indices are others or have changed."""
    known = _known.get(col_indices)
    if known is None or not known.is_of(crow_indices, col_indices, grid):
        marks = _marks(crow_indices, col_indices)
        pattern = Pattern.from_indices(crow_indices, col_indices, grid)
        known = _Known(pattern, grid, marks, (crow_indices.detach(), col_indices.detach()))
        _known[col_indices] = known
    return known.pattern
