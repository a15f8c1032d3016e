"""The block-sparse linear layer in int8: definition in plain torch, and native CPU kernels.

Weights are int8 with a scale for each output. Activations are quantised as they come, each row of
the batch by itself, in 256 steps from its least to its largest number, with 0 among them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .instruction_sets import index_of
from .linear_native import _native, held, rows
from .linear_torch import ACTIVATIONS, to_dense
from .pattern import Pattern, check_sizes

INSTRUCTION_SETS = _native.INT8_INSTRUCTION_SETS if _native else ()  # the best first
MOST_INPUTS = 1 << 16  # of an output: sums of more might not fit 32 bits


class Int8Weight(NamedTuple):
    """values: int8 (nnz, C, R); scales: (out_features,), what a 1 stands for, of any float dtype;
    totals: int32 (out_features,), the sum of the values of an output, which the zero point of x
    meets"""

    values: Tensor
    scales: Tensor
    totals: Tensor


def quantized(values: Tensor, pattern: Pattern, shape: tuple[int, int]) -> Int8Weight:
    """Symmetric, to the nearest of 255 steps, which bfloat16 is exact enough for: the weights are
    rounded by what it makes of a step; values: (nnz, C, R); shape: (out, in) features"""
    dense = to_dense(values.float(), *pattern[:2], shape)
    steps = dense.abs().amax(1) / 127
    scales = steps.clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
    R = values.shape[2]
    padded = F.pad(scales.float(), (0, -shape[0] % R), value=1.0).view(-1, R)
    numbers = (values / padded[pattern.row_indices][:, None]).round().clamp(-127, 127)
    numbers = torch.where(numbers.isfinite(), numbers, 0).to(torch.int8)
    return Int8Weight(numbers, scales, totals_of(numbers, pattern, shape))


def totals_of(values: Tensor, pattern: Pattern, shape: tuple[int, int]) -> Tensor:
    """values: int8 (nnz, C, R) -> int32 (out_features,), without what is padding"""
    return to_dense(values.to(torch.int32), *pattern[:2], shape).sum(1, dtype=torch.int32)


def definition(
    x: Tensor,
    weight: Int8Weight,
    pattern: Pattern,
    bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    """activation(x @ weight.T + bias) on numbers that x and the weight are rounded to"""
    x, dtype = x.float(), x.dtype
    low, high = x.amin(1, True).clamp(max=0), x.amax(1, True).clamp(min=0)
    step = high / 255 - low / 255
    inverse = torch.where(step > 0, 1 / step, 0)
    zero = (0.5 - low * inverse).floor()
    numbers = (x * inverse + zero + 0.5).floor().clamp(0, 255) - zero
    dense = to_dense(weight.values.float(), *pattern[:2], (out_features, x.shape[1]))
    y = F.linear(numbers, dense) * (step * weight.scales.float())
    y = y if bias is None else y + bias.float()
    return ACTIVATIONS[activation](y).to(dtype)


def linear(
    x: Tensor,
    weight: Int8Weight,
    pattern: Pattern,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(x @ weight.T + bias), natively where it can be

    x: (batch, in_features) in any floating dtype; bias: (out_features,) -> (batch, out_features)
    ValueError where the tensors do not fit each other.
    """
    values, scales, totals = weight
    for name, t, dtype in (("values", values, torch.int8), ("totals", totals, torch.int32)):
        if t.dtype != dtype or t.device != x.device:
            raise ValueError(f"expected {name} in {dtype} on {x.device}, got {t.dtype}, {t.device}")
    for name, t in (("scales", scales), ("totals", totals)):
        if t.shape != (out_features,):
            raise ValueError(f"expected {out_features} {name}, got {tuple(t.shape)}")
    check_sizes(values, pattern, bias, x.shape[1], out_features)
    if not x.is_cpu or _native is None:
        return definition(x, weight, pattern, bias, out_features, activation)
    dtype, x = x.dtype, rows(x.float())
    values, scales, totals = held(values), held(scales.float()), held(totals)
    bias = None if bias is None else held(bias.float())
    (batch, in_features), (_, C, R), (crow, col) = x.shape, values.shape, pattern[:2]
    y = x.new_empty(batch, out_features)
    if batch:
        _native.int8_forward(
            *(index_of(INSTRUCTION_SETS), torch.get_num_threads()),
            *(x.data_ptr(), x.stride(0), y.data_ptr(), batch),
            *(values.data_ptr(), scales.data_ptr(), totals.data_ptr()),
            *(0 if bias is None else bias.data_ptr(), crow.data_ptr(), col.data_ptr()),
            *(R, C, in_features, out_features, activation == "relu"),
        )
    y = F.gelu(y) if activation == "gelu" else y
    return y.to(dtype)
