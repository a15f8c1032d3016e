"""The weight gradient at the kept blocks (SDDMM) in plain torch: definition and fallback."""

import torch.nn.functional as F
from torch import Tensor

from .pattern import Pattern


def sddmm(grad: Tensor, x: Tensor, pattern: Pattern, block: tuple[int, int]) -> Tensor:
    """The kept blocks of grad.T @ x, transposed as `values` is; block: (C, R)

    grad: (batch, out_features); x: (batch, in_features) -> (nnz, C, R)
    """
    (block_rows, block_cols), (C, R) = pattern.grid, block
    dense = grad.t() @ x  # (out_features, in_features)
    padding = (0, block_cols * C - x.shape[1], 0, block_rows * R - grad.shape[1])
    blocks = F.pad(dense, padding).view(block_rows, R, block_cols, C)
    return blocks.permute(0, 2, 3, 1)[pattern.row_indices, pattern.col_indices].contiguous()
