"""The block-sparse linear layer in int8: definition in plain torch, and native CPU kernels.

Weights are int8 with a scale for each output. Activations are quantised as they come, each row of
the batch by itself, in 256 steps from its least to its largest number, with 0 among them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_native import Chain, ChainLayer, _native
from .linear_torch import ACTIVATIONS, to_dense
from .pattern import Pattern, check_sizes

INSTRUCTION_SETS = _native.INT8_INSTRUCTION_SETS if _native else ()  # the best first
MOST_INPUTS = 1 << 16  # of an output: sums of more might not fit 32 bits


class Int8Weight(NamedTuple):
    """values: int8 (nnz, C, R); scales: (out_features,), what a 1 stands for, of any float dtype"""

    values: Tensor
    scales: Tensor


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
    return Int8Weight(numbers, scales)


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
    values, scales = weight
    if values.dtype != torch.int8 or values.device != x.device:
        raise ValueError(
            f"expected values in torch.int8 on {x.device}, got {values.dtype}, {values.device}"
        )
    if scales.shape != (out_features,):
        raise ValueError(f"expected {out_features} scales, got {tuple(scales.shape)}")
    check_sizes(values, pattern, bias, x.shape[1], out_features)
    if not x.is_cpu or _native is None:
        return definition(x, weight, pattern, bias, out_features, activation)
    chain = chain_of(weight, pattern, bias, (x.shape[1], out_features), activation)
    return call(chain, x, activation)


def chain_of(
    weight: Int8Weight,
    pattern: Pattern,
    bias: Tensor | None,
    features: tuple[int, int],
    activation: str,
) -> Chain:
    """One layer, without the activation where it is GELU; features: (in, out)"""
    inside = activation if activation == "relu" else "none"
    return Chain([ChainLayer(weight.values, pattern, bias, *features, inside, weight.scales)])


def call(chain: Chain, x: Tensor, activation: str) -> Tensor:
    """Of such a chain, in float32; x: (..., in_features) -> (..., out_features) in its dtype"""
    y = chain(x.float())
    return (F.gelu(y) if activation == "gelu" else y).to(x.dtype)
