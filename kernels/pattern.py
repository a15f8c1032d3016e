"""Where the kept blocks of a weight are, as the kernels read it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """The kept blocks of an (out_features, in_features) weight: int32 tensors on one device.

    The weight is a grid of block_rows x block_cols blocks of R outputs x C inputs; `nnz` of them
    are kept, and `values[n]`, of shape (C, R), is the n-th in row-major order, transposed.
    The first two tensors say everything; the others are derived, for the kernels' sake.
    """

    crow_indices: Tensor  # (block_rows + 1,): row r owns values[crow[r] : crow[r + 1]]
    col_indices: Tensor  # (nnz,): block column of values[n]
    row_indices: Tensor  # (nnz,): block row of values[n]
    row_order: Tensor  # (block_rows,): block rows, the one with the most blocks first
    ccol_indices: Tensor  # (block_cols + 1,): column c owns entries ccol[c] : ccol[c + 1] of ...
    t_row_indices: Tensor  # (nnz,): ... the block rows, column by column
    t_slots: Tensor  # (nnz,): ... and which of `values` each one is
    col_order: Tensor  # (block_cols,): block columns, the one with the most blocks first

    @classmethod
    def from_indices(cls, crow_indices: Tensor, col_indices: Tensor, block_cols: int) -> "Pattern":
        """Derives the rest from valid indices; `block_cols` is ceil(in_features / C)."""
        per_row = crow_indices.diff()
        rows = torch.arange(len(per_row), device=per_row.device)
        row_indices = rows.repeat_interleave(per_row, output_size=len(col_indices))
        per_col = torch.bincount(col_indices, minlength=block_cols)
        ccol_indices = torch.cat([per_col.new_zeros(1), per_col.cumsum(0)])
        slots = col_indices.argsort(stable=True)
        derived = (
            row_indices,
            per_row.argsort(descending=True, stable=True),
            ccol_indices,
            row_indices[slots],
            slots,
            per_col.argsort(descending=True, stable=True),
        )
        return cls(crow_indices, col_indices, *(t.to(torch.int32) for t in derived))

    @property
    def grid(self) -> tuple[int, int]:
        """(block_rows, block_cols)"""
        return self.row_order.shape[0], self.col_order.shape[0]
