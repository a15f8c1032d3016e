"""The weight gradient at the kept blocks (SDDMM) on native CPU kernels, for float32."""

import torch
from torch import Tensor

from .linear_native import _native, instruction_set, rows
from .pattern import Pattern


def sddmm(grad: Tensor, x: Tensor, pattern: Pattern, block: tuple[int, int]) -> Tensor:
    """The kept blocks of grad.T @ x, transposed as `values` is; block: (C, R)

    grad: (batch, out_features); x: (batch, in_features) -> (nnz, C, R)
    """
    grad, x, (crow, col), (C, R) = rows(grad), rows(x), pattern[:2], block
    (batch, out_features), in_features = grad.shape, x.shape[1]
    padded = out_features % R or in_features % C
    dvalues = (grad.new_zeros if padded else grad.new_empty)(len(col), C, R)
    if dvalues.numel():
        _native.sddmm(
            *(instruction_set.get(), torch.get_num_threads()),
            *(grad.data_ptr(), x.data_ptr(), dvalues.data_ptr(), crow.data_ptr(), col.data_ptr()),
            *(grad.stride(0), x.stride(0), batch, R, C, in_features, out_features),
        )
    return dvalues
