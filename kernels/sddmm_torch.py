"""The weight gradient at the kept blocks (SDDMM) in plain torch: definition and fallback."""

import torch.nn.functional as F
from torch import Tensor

from .pattern import Pattern


def sddmm(grad: Tensor, x: Tensor, pattern: Pattern, block: tuple[int, int]) -> Tensor:
    """The kept blocks of grad.T @ x, transposed as `values` is; block: (C, R)

    grad: (batch, out_features); x: (batch, in_features) -> (nnz, C, R)
    """
    return kept_blocks(grad.t() @ x, pattern, block)


def kept_blocks(dense: Tensor, pattern: Pattern, block: tuple[int, int]) -> Tensor:
    """dense: (out_features, in_features); block: (C, R) -> (nnz, C, R), zero in the padding"""
    (block_rows, block_cols), (C, R) = pattern.grid, block
    padding = (0, block_cols * C - dense.shape[1], 0, block_rows * R - dense.shape[0])
    blocks = F.pad(dense, padding).view(block_rows, R, block_cols, C)
    return blocks.permute(0, 2, 3, 1)[pattern.row_indices, pattern.col_indices].contiguous()
