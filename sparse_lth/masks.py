"""Scores to masks: which weights, or blocks of them, are kept.

Masks are bool, True = kept, and are returned, never edited. A convolution's weight counts as the
(out_channels, in_channels * kernel) matrix.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .bsr import blocks_of
from .huggingface import is_conv1d


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolutional layers by name, in order; the last is the output layer."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def block_scores(weight: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """Mean magnitude of each block's weights, padding not counted -> (block_rows, block_cols)"""
    matrix = weight.detach().flatten(1)
    total = blocks_of(matrix.abs(), blocksize).sum((2, 3))
    return total / blocks_of(torch.ones_like(matrix), blocksize).sum((2, 3))


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` highest scores; of equal ones, those that come first."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    return mask.view(scores.shape)


def expand(block_mask: Tensor, blocksize: tuple[int, int], shape: torch.Size) -> Tensor:
    """(block_rows, block_cols) -> mask of a weight's shape"""
    (R, C), matrix = blocksize, (shape[0], shape[1:].numel())
    mask = block_mask.repeat_interleave(R, 0).repeat_interleave(C, 1)
    return mask[: matrix[0], : matrix[1]].reshape(shape)


def magnitude_masks(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    densities: Mapping[str, float],
    blocksize: tuple[int, int] = (1, 1),
    scope: str = "layerwise",
) -> dict[str, Tensor]:
    """The masks of the next round: what has the largest magnitude among what `masks` keep.

    densities: kept / all, of each layer that is pruned. A layer of n blocks keeps
    round(density * n); in global scope the layers compete for the sum of density * n, rounded.
    """
    scores = {}
    for name in densities:
        alive = blocks_of(masks[name].flatten(1), blocksize).any((2, 3))
        scores[name] = torch.where(alive, block_scores(weights[name], blocksize), -1)
    if scope == "global":
        count = round(sum(densities[name] * s.numel() for name, s in scores.items()))
        flat = keep_highest(torch.cat([s.flatten() for s in scores.values()]), count)
        parts = flat.split([s.numel() for s in scores.values()])
        kept = {name: p.view(s.shape) for (name, s), p in zip(scores.items(), parts, strict=True)}
    else:
        kept = {n: keep_highest(s, round(densities[n] * s.numel())) for n, s in scores.items()}
    pruned = {n: expand(k, blocksize, weights[n].shape) & masks[n] for n, k in kept.items()}
    return {**masks, **pruned}


def layer_densities(
    model: nn.Module, rate: float, round: int, blocksize: tuple[int, int], scope: str
) -> dict[str, float]:
    """The density of each layer after `round` rounds that each prune `rate` of what is left.

    Layerwise, the output layer is pruned at half the rate, as in the paper. Layers that blocks
    cannot serve stay dense and are left out: convolutions, and an output layer smaller than one.
    Raises ValueError when a block is larger than another layer.
    """
    layers, densities = weight_layers(model), {}
    for name, layer in layers.items():
        last = name == next(reversed(layers))
        if blocksize != (1, 1) and isinstance(layer, nn.Conv2d):
            continue
        if any(size < block for size, block in zip(layer.weight.shape, blocksize, strict=False)):
            if last:
                continue
            raise ValueError(
                f"blocksize: expected blocks of at most {tuple(layer.weight.shape)} to fit "
                f"{name}, got {blocksize}"
            )
        densities[name] = (1 - rate / (2 if last and scope == "layerwise" else 1)) ** round
    return densities


def density(masks: Mapping[str, Tensor]) -> float:
    """Kept / all weights, biases not counted."""
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


class BlockL1Unstructured(prune.BasePruningMethod):
    """Prunes the blocks of least mean magnitude, as a method of `torch.nn.utils.prune`.

    amount: the fraction (float) or number (int) of the blocks still alive to prune.
    """

    PRUNING_TYPE = "global"  # sees the whole weight, where "unstructured" would see what is left

    def __init__(self, amount: float | int, blocksize: tuple[int, int] = (16, 16)):
        if amount < 0 or (isinstance(amount, float) and amount > 1):
            raise ValueError(f"expected amount as a count or a fraction up to 1.0, got {amount}")
        self.amount, self.blocksize = amount, blocksize

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        alive = blocks_of(default_mask.flatten(1) != 0, self.blocksize).any((2, 3))
        scores = torch.where(alive, block_scores(t, self.blocksize), -1)
        count, amount = int(alive.sum()), self.amount
        pruned = round(amount * count) if isinstance(amount, float) else amount
        if pruned > count:
            raise ValueError(f"expected an amount of at most {count} blocks alive, got {amount}")
        mask = expand(keep_highest(scores, count - pruned), self.blocksize, t.shape)
        return mask.to(default_mask.dtype) * default_mask

    @classmethod
    def apply(cls, module, name, amount, blocksize=(16, 16)):
        return super().apply(module, name, amount=amount, blocksize=blocksize)


def block_l1_unstructured(
    module: nn.Module, name: str, amount: float | int, blocksize: tuple[int, int] = (16, 16)
) -> nn.Module:
    """`prune.l1_unstructured` for blocks: masks `module.<name>`, (out, in), and returns module.

    The weight of Hugging Face's `Conv1D` is stored as (in, out), so its blocks are turned too.
    """
    stored = blocksize[::-1] if name == "weight" and is_conv1d(module) else blocksize
    BlockL1Unstructured.apply(module, name, amount, stored)
    return module
