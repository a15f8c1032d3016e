"""The block-sparse linear layer and its gradients in bfloat16 on native CPU kernels.

Sums are taken in float32, and rounded to the nearest bfloat16, or the even one of two, at the end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .instruction_sets import index_of
from .linear_native import _native, held, in_words
from .pattern import Pattern

INSTRUCTION_SETS = _native.BF16_INSTRUCTION_SETS if _native else ()  # the best first


def linear(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(x @ weight.T + bias)

    x: (batch, in_features); values: (nnz, C, R); bias: (out_features,) -> (batch, out_features)
    """
    bias, relu = None if bias is None else held(bias), activation == "relu"
    y = _forward(x, held(values), (*pattern[:2], None), bias, (out_features, relu))
    return F.gelu(y) if activation == "gelu" else y


def linear_grad_input(grad: Tensor, values: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """grad @ weight; grad: (batch, out_features) -> (batch, in_features)"""
    transposed = pattern.ccol_indices, pattern.t_row_indices, pattern.t_slots
    return _forward(grad, held(values), transposed, None, (in_features, False))


def _forward(
    x: Tensor,
    values: Tensor,
    indices: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    output: tuple[int, bool],
) -> Tensor:
    """x: (batch, inputs); indices: compressed, plain, and slots of a transposed weight, or None;
    bias: (outputs,); output: how many, and whether ReLU -> (batch, outputs)"""
    (compressed, plain, slots), (outputs, relu), inputs = indices, output, x.shape[1]
    block = values.shape[1:] if slots is not None else values.shape[:0:-1]  # (R, C)
    x, y = in_words(x), x.new_empty(len(x), outputs + outputs % 2)
    if len(x):
        _native.bf16_forward(
            *(index_of(INSTRUCTION_SETS), torch.get_num_threads()),
            *(x.data_ptr(), x.stride(0), y.data_ptr(), len(x)),
            *(values.data_ptr(), 0 if bias is None else bias.data_ptr()),
            *(compressed.data_ptr(), plain.data_ptr(), *block, inputs, outputs, relu),
            0 if slots is None else slots.data_ptr(),
        )
    return y[:, :outputs].contiguous() if outputs % 2 else y


def sddmm(grad: Tensor, x: Tensor, pattern: Pattern, block: tuple[int, int]) -> Tensor:
    """The kept blocks of grad.T @ x, transposed as `values` is; block: (C, R)

    grad: (batch, out_features); x: (batch, in_features) -> (nnz, C, R)
    """
    sizes, (crow, col), (C, R) = (x.shape[1], grad.shape[1]), pattern[:2], block
    grad, x = in_words(grad), in_words(x)
    dvalues = grad.new_empty(len(col), C, R)
    if dvalues.numel():
        _native.bf16_sddmm(
            *(index_of(INSTRUCTION_SETS), torch.get_num_threads()),
            *(grad.data_ptr(), x.data_ptr(), dvalues.data_ptr(), crow.data_ptr(), col.data_ptr()),
            *(grad.stride(0), x.stride(0), len(grad), R, C, *sizes),
        )
    return dvalues
