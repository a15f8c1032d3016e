"""Scores to masks: which weights, or blocks of them, are kept, and how many.

Masks are bool, True = kept, and are returned, never edited. A convolution's weight counts as the
(out_channels, in_channels * kernel) matrix. A density is kept / all weights of a layer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .bsr import blocks_of
from .huggingface import is_conv1d

Masks = dict[str, Tensor]  # bool, by layer name
SCOPES = ("layerwise", "erk", "global")

# What gives a weight its score, by name: the weights of a layer as trained and as rewound to, and
# a generator that is seeded alike in every round -> scores of the same shape.
CRITERIA: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "magnitude": lambda weight, init, generator: weight.abs(),
    # How far training moved it away from zero: the sum over steps of -gradient * weight (Sanh et
    # al., arXiv 2005.07683), which for steps along -gradient telescopes to this.
    "movement": lambda weight, init, generator: weight.square() - init.square(),
    "random": lambda weight, init, generator: torch.rand(weight.shape, generator=generator),
}


def block_means(scores: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """Of each block, padding not counted, in at least float32 -> (block_rows, block_cols)"""
    matrix = scores.detach().flatten(1)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    total = blocks_of(matrix, blocksize).sum((2, 3))
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


def highest_masks(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    densities: Mapping[str, float],
    blocksize: tuple[int, int] = (1, 1),
    scope: str = "layerwise",
) -> Masks:
    """The masks of the next round: the blocks of highest mean score among those that `masks` keep.

    densities: of each layer that is pruned. Together the layers keep the sum of density * weights,
    to about half a block; of equal blocks those that come first. In global scope the layers
    compete; else each keeps its own share, to about one block, and at least one block. What a layer
    lost in an earlier round is the next layer's to keep. ValueError where a score is not finite.
    """
    kept, wanted = {}, 0.0
    for names in [[*densities]] if scope == "global" else [[name] for name in densities]:
        means = {name: block_means(scores[name], blocksize) for name in names}
        for name, mean in means.items():
            if not mean.isfinite().all():
                raise ValueError(f"expected finite scores for {name}: did its training diverge?")
        alive = [blocks_of(masks[name].flatten(1), blocksize).sum((2, 3)) for name in names]
        sizes = torch.cat([size.flatten() for size in alive])
        flat = torch.cat([mean.flatten() for mean in means.values()])
        flat = torch.where(sizes > 0, flat, -torch.inf)
        sizes = sizes[flat.argsort(descending=True, stable=True)]
        wanted += sum(densities[name] * masks[name].numel() for name in names)
        fits = 2 * sizes.cumsum(0) - sizes <= 2 * wanted  # half of the block, or more
        count = max(1, int(fits.sum()))
        wanted -= int(sizes[:count].sum())  # what is over, or was too much, is the next layer's
        parts = keep_highest(flat, count).split([mean.numel() for mean in means.values()])
        for (name, mean), part in zip(means.items(), parts, strict=True):
            kept[name] = expand(part.view(mean.shape), blocksize, masks[name].shape) & masks[name]
    return {**masks, **kept}


def densities_after(
    names: Iterable[str], rate: float, rounds: int, rates: Mapping[str, float]
) -> dict[str, float]:
    """The density of each layer after rounds that each prune `rate` of what is left of it.

    rates: the layers that are pruned at a share of that rate, above 0 and up to 1
    """
    return {name: (1 - rate * rates.get(name, 1)) ** rounds for name in names}


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """The densities by which the layers, of weights of these shapes, keep `density` together, each
    in proportion to the sum of its sizes over their product, up to 1: small layers keep more.

    Erdos-Renyi-Kernel, Evci et al., arXiv 1911.11134.
    """
    left, wanted, factor = dict(shapes), density * sum(map(prod, shapes.values())), 0.0
    while left:
        factor = wanted / sum(map(sum, left.values()))
        full = [name for name, shape in left.items() if factor * sum(shape) >= prod(shape)]
        if not full:
            break
        wanted -= sum(prod(left.pop(name)) for name in full)
    part = {name: factor * sum(shape) / prod(shape) for name, shape in left.items()}
    return {name: part.get(name, 1.0) for name in shapes}


def common_rate(
    sizes: Mapping[str, int], density: float, rounds: int, rates: Mapping[str, float]
) -> float:
    """The rate at which the layers, of these many weights, reach the density together.

    Raises ValueError where those pruned at a share of the rate do not let them.
    """
    wanted = density * sum(sizes.values())

    def kept(rate: float) -> float:
        return sum(d * sizes[n] for n, d in densities_after(sizes, rate, rounds, rates).items())

    if kept(1.0) > wanted:
        raise ValueError(
            f"expected a density of at least {kept(1.0) / sum(sizes.values()):.2g}, or more "
            f"rounds, with the rates {dict(rates)}, got {density}"
        )
    low, high = 0.0, 1.0
    for _ in range(100):  # bisection to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) > wanted else (low, middle)
    return high


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
        scores = torch.where(alive, block_means(t.abs(), self.blocksize), -1)
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
