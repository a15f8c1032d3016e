"""Networks that are trained beside a ticket, each from the ticket's own start: what of the ticket
matters, its mask, its first weights, or both together?"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Generator, Tensor

from ..masks import keep_highest
from ..program.lottery import State, redraw
from ..program.models import MODELS
from ..weights import masked, snapshot, weight_name

Control = Callable[[State], State]  # the state at the start of a round -> that of the control


def _by_layer(
    change: Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]], state: State
) -> State:
    """The state with other first weights and masks.

    change: (weights before training, mask, generator) of a layer -> the same of the control
    """
    generator = Generator()
    generator.set_state(state.generator)
    init, masks = dict(state.init), {}
    for name, mask in state.masks.items():
        weight = weight_name(name)
        init[weight], masks[name] = change(init[weight], mask, generator)
    weights = masked(init, masks)
    return replace(state, masks=masks, weights=weights, generator=generator.get_state())


def _scatter(weight: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """A mask that keeps as many weights, at random."""
    order = torch.randperm(mask.numel(), generator=generator)
    return weight, mask.flatten()[order].view(mask.shape)


def _keep_largest(weight: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """A mask that keeps as many weights, those that are largest before any training."""
    return weight, keep_highest(weight.abs(), int(mask.sum()))


def _resample(weight: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Weights drawn, with replacement, from those that the ticket keeps in the layer."""
    kept = weight[mask]
    chosen = torch.randint(len(kept), weight.shape, generator=generator)
    return kept[chosen], mask


def _add_noise(
    factor: float, weight: Tensor, mask: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Weights with Gaussian noise of `factor` times the layer's own standard deviation."""
    noise = torch.randn(weight.shape, generator=generator)
    return weight + factor * weight.std() * noise, mask


def _reset(state: State) -> State:
    """θ₀ under the masks, to be trained from step 0."""
    first = Generator().manual_seed(state.settings["seed"])
    init = snapshot(MODELS[state.settings["model"]].new(first))
    return replace(state, epoch=0, step=0, init=init, weights=masked(init, state.masks))


CONTROLS: dict[str, Control] = {  # in brackets the paper's section, arXiv 1803.03635
    "random reinit": redraw,  # (2)
    "random mask": partial(_by_layer, _scatter),  # (appendix E)
    "reinit from the ticket": partial(_by_layer, _resample),  # (F.3)
    "pruned before training": partial(_by_layer, _keep_largest),  # (F.4)
    "noise of 0.5 std": partial(_by_layer, partial(_add_noise, 0.5)),  # (F.7)
    "noise of 3 std": partial(_by_layer, partial(_add_noise, 3.0)),  # (F.7)
    "continued training": _reset,  # of masks that were found without rewinding (B)
}
