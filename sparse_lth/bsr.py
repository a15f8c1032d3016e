"""The block-sparse weight: BSR of an (out_features, in_features) matrix.

Blocks are (R, C) = outputs x inputs and stored transposed, `values[n]` of shape (C, R), so that a
kernel reads R outputs contiguously. Sizes need not divide the weight: the last block of a row or
column is padded with zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_shape(shape: tuple[int, int], blocksize: tuple[int, int]) -> tuple[int, int]:
    """How many block rows and block columns cover an (out_features, in_features) weight."""
    return -(-shape[0] // blocksize[0]), -(-shape[1] // blocksize[1])


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


def validate(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]
) -> None:
    """Raises ValueError unless the three are a well-formed block-sparse weight of this shape.

    The kernels trust the indices: a bad column would read memory that is not theirs.
    """
    if values.dim() != 3 or not values.is_floating_point() or 0 in values.shape[1:]:
        raise ValueError(
            f"expected floating-point values of shape (nnz_blocks, C, R), "
            f"got {values.dtype} of shape {tuple(values.shape)}"
        )
    nnz, C, R = values.shape
    rows, cols = grid_shape(shape, (R, C))
    for name, indices in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if indices.dtype != torch.int32 or indices.dim() != 1 or not indices.is_contiguous():
            raise ValueError(
                f"expected {name} to be a contiguous vector of int32, "
                f"got {indices.dtype} of shape {tuple(indices.shape)}, strides {indices.stride()}"
            )
    if len(crow_indices) != rows + 1:
        raise ValueError(
            f"expected {rows + 1} crow_indices for {rows} block rows, got {len(crow_indices)}"
        )
    if len(col_indices) != nnz:
        raise ValueError(f"expected {nnz} col_indices for {nnz} blocks, got {len(col_indices)}")
    crow, col = crow_indices.cpu().long(), col_indices.cpu().long()
    if crow[0] != 0 or crow[-1] != nnz or (crow.diff() < 0).any():
        raise ValueError(f"expected crow_indices to rise from 0 to {nnz}, got {crow.tolist()}")
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
