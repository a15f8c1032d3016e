"""The block-sparse weight: BSR of an (out_features, in_features) matrix.

Blocks are (R, C) = outputs x inputs and stored transposed, `values[n]` of shape (C, R), so that a
kernel reads R outputs contiguously. Sizes need not divide the weight: the last block of a row or
column is padded with zeros.
"""

from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.pattern import check_indices, row_indices


def as_blocksize(blocksize: tuple[int, int] | int) -> tuple[int, int]:
    """(R, C), or n for (n, n); ValueError for anything but positive ints."""
    pair = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    try:
        R, C = (index(size) for size in pair)
    except (TypeError, ValueError):
        R = C = 0
    if min(R, C) < 1:
        raise ValueError(f"expected a blocksize (R, C) of positive ints, or n, got {blocksize!r}")
    return R, C


def grid_shape(shape: tuple[int, int], blocksize: tuple[int, int]) -> tuple[int, int]:
    """How many block rows and block columns cover an (out_features, in_features) weight."""
    return -(-shape[0] // blocksize[0]), -(-shape[1] // blocksize[1])


def blocksize_of(values: Tensor) -> tuple[int, int]:
    """(R, C) of values (nnz, C, R); ValueError for a tensor of another form."""
    if values.dim() != 3 or not values.is_floating_point() or 0 in values.shape[1:]:
        raise ValueError(
            f"expected floating-point values of shape (nnz_blocks, C, R), "
            f"got {values.dtype} of shape {tuple(values.shape)}"
        )
    return values.shape[2], values.shape[1]


def blocks_of(weight: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """weight: (out_features, in_features) -> (block_rows, block_cols, C, R), zero-padded"""
    (R, C), (rows, cols) = blocksize, grid_shape(weight.shape, blocksize)
    padding = (0, cols * C - weight.shape[1], 0, rows * R - weight.shape[0])
    return F.pad(weight, padding).view(rows, R, cols, C).permute(0, 2, 3, 1)


def from_dense(
    weight: Tensor, mask: Tensor, blocksize: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Every block that holds a kept weight, with its pruned weights set to 0.

    weight, mask (True = kept): (out_features, in_features)
    -> values (nnz, C, R), crow_indices (block_rows + 1,) int32, col_indices (nnz,) int32
    """
    keep = blocks_of(mask.to(torch.bool), blocksize).any((2, 3))  # (block_rows, block_cols)
    values = blocks_of(torch.where(mask.to(torch.bool), weight, 0), blocksize)[keep].contiguous()
    crow_indices = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    col_indices = keep.nonzero()[:, 1]
    return values, crow_indices.to(torch.int32), col_indices.to(torch.int32)


def kept_in_blocks(mask: Tensor, blocks: tuple[Tensor, Tensor, Tensor]) -> Tensor | None:
    """(nnz, C, R) bool: what `mask` keeps in the `blocks` of `from_dense`; None if it is all.

    Padding counts as kept: it has no weight that could train.
    """
    values, crow_indices, col_indices = blocks
    _, C, R = values.shape
    pruned = blocks_of(~mask.to(torch.bool), (R, C))
    kept = ~pruned[row_indices(crow_indices, len(values)), col_indices.long()]
    return None if kept.all() else kept


def validate(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]
) -> None:
    """Raises ValueError unless the three are a well-formed block-sparse weight of this shape.

    The kernels trust the indices: a bad column would read memory that is not theirs.
    """
    grid = grid_shape(shape, blocksize_of(values))
    check_indices(crow_indices, col_indices, grid, len(values))
