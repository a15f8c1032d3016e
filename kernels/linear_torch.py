"""The block-sparse linear layer in plain torch: definition, fallback and reference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import Pattern, row_indices

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}
GATHERED = 1 << 20  # inputs gathered at a time, to bound memory: 4 MB in fp32


def to_dense(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]
) -> Tensor:
    """values: (nnz, C, R) -> (out_features, in_features) = shape, zero where no block is kept.

    In operations that are differentiable, and that compile, export and vmap.
    """
    (nnz, C, R), (out_features, in_features) = values.shape, shape
    rows, cols = -(-out_features // R), -(-in_features // C)
    places = row_indices(crow_indices, nnz), col_indices.long()
    blocks = values.new_zeros(rows, cols, C, R).index_put(places, values)
    return blocks.permute(0, 3, 1, 2).reshape(rows * R, cols * C)[:out_features, :in_features]


def definition(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(x @ weight.T + bias), which `linear` does without the dense weight."""
    weight = to_dense(values, crow_indices, col_indices, (out_features, x.shape[1]))
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


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
    longest = _gathered_length(pattern.crow_indices, pattern.grid[1], values.shape[2])
    if longest is not None:
        y = _gather_matmul(x, values, pattern.crow_indices, pattern.col_indices, longest)
        y = y[:, :out_features] if bias is None else y[:, :out_features] + bias
        return ACTIVATIONS[activation](y).contiguous()
    return definition(x, values, *pattern[:2], bias, out_features, activation)


def linear_grad_input(grad: Tensor, values: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """grad @ weight; grad: (batch, out_features) -> (batch, in_features)"""
    longest = _gathered_length(pattern.ccol_indices, pattern.grid[0], values.shape[1])
    if longest is not None:
        by_column = values[pattern.t_slots].mT  # (nnz, R, C)
        dx = _gather_matmul(grad, by_column, pattern.ccol_indices, pattern.t_row_indices, longest)
        return dx[:, :in_features].contiguous()
    return grad @ to_dense(values, *pattern[:2], (grad.shape[1], in_features))


def _gathered_length(compressed: Tensor, full: int, height: int) -> int | None:
    """Blocks of the longest row, where rows padded to it beat the dense weight, else None.

    They do on tall blocks in rows at most half full; on a GPU, to look would stop the stream.
    """
    if compressed.is_cuda or height < 8:
        return None
    longest = int(compressed.diff().amax())
    return longest if 2 * longest <= full else None


def _gather_matmul(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, longest: int) -> Tensor:
    """Every block row as one product: its inputs gathered, its blocks side by side.

    x: (batch, in_features); values: (nnz, C, R) -> (batch, block_rows * R)
    """
    (_, C, R), rows, in_features = values.shape, len(crow) - 1, x.shape[1]
    slots = crow[:-1, None] + torch.arange(longest, device=crow.device)  # (rows, longest)
    kept = slots < crow[1:, None]
    slots = torch.where(kept, slots, 0)
    weight = torch.where(kept[..., None, None], values[slots], 0)  # (rows, longest, C, R)
    weight = weight.reshape(rows, longest * C, R).mT  # (rows, R, longest * C)
    inputs = col[slots][..., None] * C + torch.arange(C, device=col.device)
    inputs = torch.where(kept[..., None], inputs, in_features).clamp(max=in_features).flatten()
    xt = torch.cat([x.t(), x.new_zeros(1, len(x))])  # what is not kept reads the zeros at the end
    chunks = [
        (weight @ part[inputs].view(rows, longest * C, part.shape[1])).flatten(0, 1).t()
        for part in xt.split(max(1, GATHERED // max(1, len(inputs))), dim=1)
    ]
    return torch.cat(chunks)
