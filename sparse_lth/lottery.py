"""The search: train, prune, rewind, again and again (iterative magnitude pruning)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .convert import sparsify_
from .files import FormatError, join_groups, load_tensors, save_tensors, split_prefix
from .kernels import backend
from .masks import density, magnitude_masks, weight_layers
from .program.config import RunConfig, steps
from .program.data import Dataset, batches
from .program.models import build, initialise
from .program.training import TrainingError, evaluate, make_step

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """Where a search stands after an evaluation: all that it needs to go on exactly.

    The tensors are the live ones that the next step changes: save them before going on.
    """

    round: int  # 0 is the dense network
    epoch: int  # whole epochs finished in this round
    step: int  # optimizer steps finished in this round
    init: Tensors  # what survivors are rewound to, by parameter name: θ₀, or θ_k once it is known
    masks: Tensors  # bool, by layer name
    weights: Tensors  # by parameter name, pruned ones exactly 0
    generator: Tensor  # state, at the start of this epoch, of the generator that orders batches
    optimizer: Tensors = field(default_factory=dict)  # "<parameter>.<key>"; empty before a round
    history: tuple[dict, ...] = ()  # a record for every evaluation

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
        return cls(0, 0, 0, init, masks, init, generator.get_state())

    def save(self, path: str | Path) -> None:
        tensors = join_groups(self, ("init", "masks", "weights", "optimizer"))
        tensors["generator"] = self.generator
        about = {n: getattr(self, n) for n in ("round", "epoch", "step", "history")}
        save_tensors(path, "state", tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> "State":
        """Raises FormatError unless the file holds a state."""
        tensors, about = load_tensors(path, "state")
        groups = {n: split_prefix(tensors, n) for n in ("init", "masks", "weights", "optimizer")}
        try:
            about["history"] = tuple(about["history"])
            return cls(**about, **groups, generator=tensors["generator"])
        except (KeyError, TypeError) as error:
            raise FormatError(f"{path}: expected the state of a search, got {error!r}") from error


def search(config: RunConfig, data: Dataset, state: State | None = None) -> Iterator[State]:
    """Goes on from `state`, or from the start, and yields the state after every evaluation.

    The last state of a round carries its test accuracy; the last round's is the ticket.
    """
    state = state or State.start(config)
    while True:
        for state in train_round(config, data, state):  # noqa: B020
            yield state
        if state.round == config.rounds:
            return
        state = next_round(config, state)


def next_round(config: RunConfig, state: State) -> State:
    """Prunes the trained weights and rewinds every surviving weight and every bias, bit for bit.

    They go back to θ₀, or to θ_k; with config.reinit to newly drawn values, and no ticket is left.
    """
    densities = config.layer_densities(state.round + 1)
    weights = {name: state.weights[f"{name}.weight"].cpu() for name in state.masks}
    masks = magnitude_masks(weights, state.masks, densities, config.blocksize, config.scope)
    if config.reinit:
        state = redraw(config, state)
    start = {"round": state.round + 1, "epoch": 0, "step": 0, "optimizer": {}}
    return replace(state, **start, masks=masks, weights=state.init)


def redraw(config: RunConfig, state: State) -> State:
    """The state with weights, and so those to rewind to, drawn anew from its generator."""
    generator = torch.Generator()
    generator.set_state(state.generator)
    init = initialise(build(config.model), generator)
    return replace(state, init=init, weights=init, generator=generator.get_state())


def train_round(config: RunConfig, data: Dataset, state: State) -> Iterator[State]:
    """The steps that the round still lacks; yields the state after every evaluation.

    Evaluations come after every epoch or `config.every` steps, and at the end.
    """
    per_epoch = math.ceil(len(data.train.labels) / config.bs)
    total = config.iterations or config.epochs * per_epoch
    rewind_step = steps(config.rewind_step, per_epoch) if state.round == 0 else 0
    if rewind_step > total:
        raise TrainingError(
            f"expected a --rewind_step within the {total} steps of a round, "
            f"got {config.rewind_step}, which is step {rewind_step}"
        )
    device = torch.device(config.device)
    model = masked_model(config.model, state.weights, state.masks)
    if state.step:  # a round goes on as it began, whatever this machine would choose
        sparse = state.history[-1]["trained_sparse"]
    else:
        sparse = [name for name, mask in state.masks.items() if trains_sparse(config, mask)]
    if sparse:
        sparsify_(model, config.blocksize, lambda _, name: name in sparse, max_density=1.0)
    model.to(device).train()
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.lr, fused=True, capturable=device.type == "cuda"
    )
    for name, value in state.optimizer.items():
        parameter, _, key = name.rpartition(".")
        optimizer.state[model.get_parameter(parameter)][key] = value.to(device)
    generator = torch.Generator()
    generator.set_state(state.generator)
    take_step = make_step(model, optimizer, data.train)
    step, losses, since = state.step, 0.0, state.step
    while step < total:
        epoch_start = generator.get_state()
        for chosen in batches(data.train, config.bs, generator)[step % per_epoch :]:
            losses, step = losses + take_step(chosen), step + 1
            if step == rewind_step:
                init = {n: w.to("cpu", copy=True) for n, w in effective_weights(model).items()}
                state = replace(state, init=init)
            if step % (config.every or per_epoch) and step != total:
                continue
            epoch, left = divmod(step, per_epoch)
            record = {
                "round": state.round,
                "epoch": epoch,
                "step": step,
                "density": density(state.masks),
                "trained_sparse": sparse,
                **_evaluate(model, data, float(losses) / (step - since), tested=step == total),
            }
            state = replace(
                state,
                epoch=epoch,
                step=step,
                weights=effective_weights(model),
                # a round that ends inside an epoch leaves its order to no other
                generator=epoch_start if left and step < total else generator.get_state(),
                optimizer=_optimizer_state(model, optimizer),
                history=(*state.history, record),
            )
            yield state
            losses, since = 0.0, step
            if step == total:
                return


def _evaluate(model: nn.Module, data: Dataset, train_loss: float, tested: bool) -> dict:
    """What a record says of the network. TrainingError if the loss is not finite."""
    loss, accuracy = evaluate(model, data.validation)
    if not math.isfinite(train_loss + loss):
        raise TrainingError(
            f"expected a finite loss, got {train_loss} in training and {loss} in validation: "
            "try a lower --lr"
        )
    record = {
        "train_loss": train_loss,
        "validation_loss": loss,
        "validation_accuracy": accuracy,
    }
    if tested:
        record["test_accuracy"] = evaluate(model, data.test)[1]
    model.train()
    return record


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Its live tensors as "<parameter>.<key>"."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def masked_model(name: str, weights: Tensors, masks: Tensors) -> nn.Module:
    """The network on copies of these weights, its masks held by `torch.nn.utils.prune`."""
    model = build(name)
    model.load_state_dict({k: v.detach().clone() for k, v in weights.items()}, assign=True)
    for name, layer in weight_layers(model).items():
        if not masks[name].all():
            prune.custom_from_mask(layer, "weight", masks[name])
    return model


def trains_sparse(config: RunConfig, mask: Tensor) -> bool:
    """Whether the layer of this mask trains as a block-sparse one: a fixed rule, never a timing.

    auto: on the native kernels, up to the density where a step costs what it does under masks,
    which is 0.5, or 0.8 in blocks of multiples of 16, as README.md has it measured.
    """
    if mask.dim() != 2:
        return False
    if config.train_sparse != "auto":
        return config.train_sparse == "on" and not mask.all()
    R, C = config.blocksize
    limit = 0.8 if R % 16 == 0 and C % 16 == 0 else 0.5
    probe = torch.empty(0, device=config.device)
    return backend(probe).name == "native" and int(mask.sum()) <= limit * mask.numel()


def effective_weights(model: nn.Module) -> Tensors:
    """The weights that the network computes with, by parameter name: pruned ones exactly 0."""
    weights = {}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "weight_values":
            weights[f"{layer}.weight"] = model.get_submodule(layer).to_dense().weight.detach()
            continue
        if name.endswith("_orig"):
            name = name.removesuffix("_orig")
            kept = model.get_buffer(f"{name}_mask") != 0
            weights[name] = torch.where(kept, parameter.detach(), 0)
        else:
            weights[name] = parameter.detach()
    return weights
