"""The int8 linear layer as one operator, for eager code, compilers and exporters alike."""

import torch
from torch import Tensor

from .calls import grid_of, plain
from .linear_int8 import Int8Weight, linear
from .pattern import pattern_of


@torch.library.custom_op("sparse_lth::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    """activation(x @ weight.T + bias), of an `Int8Weight`; has no gradient

    x: (batch, in_features) -> (batch, out_features) in the dtype of x
    """
    grid = grid_of(out_features, x.shape[1], values.shape[1:])
    pattern = pattern_of(crow_indices, col_indices, grid)
    with torch.no_grad():
        weight = Int8Weight(values, scales)
        return linear(plain(x), weight, pattern, bias, out_features, activation)


@int8_linear.register_fake
def _(x, values, scales, crow_indices, col_indices, bias, out_features, activation):
    return x.new_empty(x.shape[0], out_features)
