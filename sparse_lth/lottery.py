"""The search: train, prune, rewind, again and again (iterative magnitude pruning)."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .config import RunConfig
from .data import Dataset, batches
from .files import add_prefix, load_tensors, save_tensors, split_prefix
from .masks import density, magnitude_masks
from .models import build, initialise, weight_layers
from .training import evaluate, train_epoch

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """Where a search stands after an epoch: all that it needs to go on exactly.

    The tensors are the live ones that the next epoch changes: save them before going on.
    """

    round: int  # 0 is the dense network
    epoch: int  # epochs finished in this round
    init: Tensors  # θ₀, by parameter name
    masks: Tensors  # bool, by layer name
    weights: Tensors  # by parameter name, pruned ones exactly 0
    generator: Tensor  # state of the generator that orders the batches
    optimizer: Tensors = field(default_factory=dict)  # "<parameter>.<key>"; empty before a round
    history: tuple[dict, ...] = ()  # a record for every finished epoch

    @classmethod
    def start(cls, config: RunConfig) -> "State":
        """A search that has not begun: θ₀ drawn from the seed, nothing pruned."""
        generator = torch.Generator().manual_seed(config.seed)
        model = build(config.model)
        init = initialise(model, generator)
        masks = {
            name: torch.ones(layer.weight.shape, dtype=torch.bool)
            for name, layer in weight_layers(model).items()
        }
        return cls(0, 0, init, masks, init, generator.get_state())

    def save(self, path: str | Path) -> None:
        groups = {n: getattr(self, n) for n in ("init", "masks", "weights", "optimizer")}
        tensors = {"generator": self.generator}
        for name, group in groups.items():
            tensors |= add_prefix(group, name)
        about = {"round": self.round, "epoch": self.epoch, "history": self.history}
        save_tensors(path, "state", tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> "State":
        tensors, about = load_tensors(path, "state")
        groups = {n: split_prefix(tensors, n) for n in ("init", "masks", "weights", "optimizer")}
        about["history"] = tuple(about["history"])
        return cls(**about, **groups, generator=tensors["generator"])


def search(config: RunConfig, data: Dataset, state: State | None = None) -> Iterator[State]:
    """Goes on from `state`, or from the start, and yields the state after every epoch.

    The state of a round's last epoch carries its test accuracy; the last round's is the ticket.
    """
    state = state or State.start(config)
    while True:
        for state in train_round(config, data, state):  # noqa: B020
            yield state
        if state.round == config.prune_rounds:
            return
        state = next_round(config, state)


def next_round(config: RunConfig, state: State) -> State:
    """Prunes the trained weights and puts every surviving weight and every bias back to θ₀."""
    densities = config.layer_densities(state.round + 1)
    weights = {name: state.weights[f"{name}.weight"].cpu() for name in state.masks}
    masks = magnitude_masks(weights, state.masks, densities, config.blocksize, config.scope)
    return replace(
        state, round=state.round + 1, epoch=0, masks=masks, weights=state.init, optimizer={}
    )


def train_round(config: RunConfig, data: Dataset, state: State) -> Iterator[State]:
    """The epochs that the round still lacks; yields the state after each."""
    device = torch.device(config.device)
    model = masked_model(config.model, state.weights, state.masks).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    for name, value in state.optimizer.items():
        parameter, _, key = name.rpartition(".")
        optimizer.state[model.get_parameter(parameter)][key] = value.to(device)
    generator = torch.Generator()
    generator.set_state(state.generator)
    for epoch in range(state.epoch + 1, config.epochs + 1):
        train_loss = train_epoch(model, optimizer, batches(data.train, config.bs, generator))
        validation_loss, validation_accuracy = evaluate(model, data.validation)
        record = {
            "round": state.round,
            "epoch": epoch,
            "density": density(state.masks),
            "train_loss": train_loss,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
        }
        if epoch == config.epochs:
            record["test_accuracy"] = evaluate(model, data.test)[1]
        state = replace(
            state,
            epoch=epoch,
            weights=effective_weights(model),
            generator=generator.get_state(),
            optimizer={
                f"{name}.{key}": value
                for name, parameter in model.named_parameters()
                for key, value in optimizer.state[parameter].items()
            },
            history=(*state.history, record),
        )
        yield state


def masked_model(name: str, weights: Tensors, masks: Tensors) -> nn.Module:
    """The network on copies of these weights, its masks held by `torch.nn.utils.prune`."""
    model = build(name)
    model.load_state_dict({k: v.detach().clone() for k, v in weights.items()}, assign=True)
    for name, layer in weight_layers(model).items():
        if not masks[name].all():
            prune.custom_from_mask(layer, "weight", masks[name])
    return model


def effective_weights(model: nn.Module) -> Tensors:
    """The weights that the network computes with, by parameter name: pruned ones exactly 0."""
    weights = {}
    for name, parameter in model.named_parameters():
        if name.endswith("_orig"):
            name = name.removesuffix("_orig")
            kept = model.get_buffer(f"{name}_mask") != 0
            weights[name] = torch.where(kept, parameter.detach(), 0)
        else:
            weights[name] = parameter.detach()
    return weights
