"""The program's search: the library's loop over rounds, and what trains one, step by step."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..convert import sparsify_
from ..files import FormatError, join_groups, load_tensors, save_tensors, split_prefix
from ..kernels import backend
from ..lasso import BlockLasso
from ..masks import Masks, density
from ..search import Search
from ..ticket import expect_finite, expect_like, expect_masked
from ..weights import Tensors, masked, prunable, read, snapshot, write_
from .config import RunConfig
from .data import Dataset, batches
from .models import MODELS
from .training import TrainingError, evaluate, make_step, set_lr

GROUPS = ("init", "masks", "weights", "optimizer")
FIELDS = ("round", "epoch", "step", "sparse", "history", "settings")
Types = Mapping[str, type]
CONTROL = "reinit"  # the network of a round's masks whose weights are drawn anew
RECORD: Types = MappingProxyType(  # of an evaluation; the last of a network has a test_accuracy
    {
        "round": int,
        "epoch": int,
        "step": int,
        "density": float,
        "train_loss": float,
        "validation_loss": float,
        "validation_accuracy": float,
        "trained_sparse": list,
        "test_accuracy": float | None,
        "control": str | None,
    }
)


@dataclass(frozen=True)
class State:
    """Where a search stands after an evaluation: all that it needs to go on exactly.

    The tensors are the live ones that the next step changes: save them before going on.
    """

    settings: dict  # of the run, as a ticket has them
    round: int  # 0 is the dense network
    epoch: int  # whole epochs finished
    step: int  # optimizer steps finished; late rewinding begins a round at step k
    init: Tensors  # what the round began from, by name; in round 0 θ₀, or θ_k once it is known
    masks: Masks
    weights: Tensors  # parameters and buffers by name, pruned ones exactly 0
    generator: Tensor  # state, at the start of this epoch, of the generator that orders batches
    sparse: tuple[str, ...] = ()  # layers that train block-sparse in this round
    optimizer: Tensors = field(default_factory=dict)  # "<parameter>.<key>"; empty before a round
    history: tuple[dict, ...] = ()  # a record for every evaluation
    # while the control of a round's ticket trains: `generator` at the ticket's start
    ticket_generator: Tensor | None = None

    def model(self) -> nn.Module:
        """The network at this point, under the masks of torch's prune."""
        model = MODELS[self.settings["model"]].fresh()
        write_(model, self.weights, self.masks)
        return model

    def save(self, path: str | Path) -> None:
        tensors = join_groups(self, GROUPS)
        tensors["generator"] = self.generator
        if self.ticket_generator is not None:
            tensors["ticket_generator"] = self.ticket_generator
        save_tensors(path, "state", tensors, {name: getattr(self, name) for name in FIELDS})

    @classmethod
    def load(cls, path: str | Path, record: Types = RECORD) -> "State":
        """Raises FormatError, naming what is wrong, unless the file holds a whole state.

        record: the types of what a record of the history holds, by name
        """
        tensors, about = load_tensors(path, "state")
        try:
            if not isinstance(about, dict) or about.keys() != set(FIELDS):
                raise FormatError(f"expected {', '.join(FIELDS)}, got {about}")
            groups = {name: split_prefix(tensors, name) for name in GROUPS}
            generators = {n: tensors[n] for n in ("generator", "ticket_generator") if n in tensors}
            known = len(generators) + sum(map(len, groups.values()))
            if len(tensors) != known or "generator" not in generators:
                raise FormatError(f"expected {', '.join(GROUPS)} and generator, got {[*tensors]}")
            state = cls(**groups, **about, **generators)
            state._check(record)
        except (FormatError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: expected the state of a search: {error}") from error
        return replace(state, sparse=tuple(state.sparse), history=tuple(state.history))

    def _check(self, record: Types) -> None:
        """Raises ValueError, TypeError or FormatError unless everything fits the settings."""
        config = run_config(self.settings)
        for name in ("round", "epoch", "step"):
            value = getattr(self, name)
            if not _is(value, int) or value < 0:
                raise FormatError(f"expected {name} to count, got {value!r}")
        if self.round > config.rounds:
            raise FormatError(f"expected a round up to {config.rounds}, got {self.round}")
        expect_history(self.history, record)
        expect_of_run(config, self.init, self.masks)
        expect_masked(self.init, self.masks, self.weights)
        flat = [name for name, mask in self.masks.items() if mask.dim() == 2]
        if not isinstance(self.sparse, list) or not all(name in flat for name in self.sparse):
            raise FormatError(f"expected names of {flat} as sparse, got {self.sparse!r}")
        if self.optimizer:
            network = _network(self.model(), config.blocksize, self.sparse)
            expect_like("optimizer", self.optimizer, _optimizer_like(network))
            expect_finite("optimizer", self.optimizer)
        try:
            torch.Generator().set_state(self.generator)
            if self.ticket_generator is not None:
                torch.Generator().set_state(self.ticket_generator)
        except RuntimeError as error:
            raise FormatError(f"expected the state of a generator: {error}") from error


class Lottery:
    """The search of a run on its data."""

    def __init__(self, config: RunConfig, data: Dataset):
        self.config, self.data, self.kind = config, data, MODELS[config.model]
        images = len(data.train.labels)
        self.per_epoch, self.steps = config.per_epoch(images), config.steps(images)
        self.every, self.rewind_step = config.steps_between(images), config.rewind_step(images)

    def start(self) -> State:
        """A search that has not begun: θ₀ drawn from the seed, nothing pruned."""
        generator = torch.Generator().manual_seed(self.config.seed)
        model = self.kind.new(generator)
        init, masks = snapshot(model), prunable(model, self.config.blocksize).masks()
        settings = self.config.search_settings()
        return State(settings, 0, 0, 0, init, masks, init, generator.get_state())

    def states(self, state: State | None = None) -> Iterator[State]:
        """Goes on from `state`, or from the start, and yields the state after every evaluation.

        The last state of a round carries its test accuracy; the last round's is the ticket. With
        reinit, a round trains first the control: the ticket's masks over weights drawn anew. The
        ticket is the same with it and without.
        """
        state = state or self.start()
        search = search_from(self.config, state)
        for round in search:
            if round > state.round:
                state = self.begin_round(state, search)
                if self.config.reinit:
                    state = replace(redraw(state), ticket_generator=state.generator)
                    write_(search.model, state.weights, state.masks)
            if state.ticket_generator is not None:
                for state in self.train(search.model, state):  # noqa: B020
                    yield state
                state = _begin_ticket(state)
                write_(search.model, state.weights, state.masks)
            for state in self.train(search.model, state):  # noqa: B020
                yield state
            search.init = state.init

    @property
    def evaluations(self) -> list[int]:
        """How many each round has."""
        whole = math.ceil(self.steps / self.every)
        later = whole * (1 + self.config.reinit) - self.rewind_step // self.every
        return [whole] + [later] * self.config.rounds

    def begin_round(self, state: State, search: Search) -> State:
        """The state of the round that the search has just pruned and rewound for."""
        return replace(
            state,
            round=search.round,
            epoch=self.rewind_step // self.per_epoch,
            step=self.rewind_step,
            init=search.init,
            masks=search.masks,
            weights=snapshot(search.model),
            sparse=(),
            optimizer={},
        )

    def train(self, model: nn.Module, state: State) -> Iterator[State]:
        """The steps that the round still lacks; yields the state after every evaluation.

        model: holds the weights and masks of the state, and in the end those of the last state.
        Evaluations come after every `self.every` steps, and at the end.
        """
        config, data, per_epoch, total = self.config, self.data, self.per_epoch, self.steps
        first = self.rewind_step if state.round else 0
        fits = first <= state.step <= total and state.epoch == state.step // per_epoch
        if not fits or (first < state.step < total and not state.optimizer):
            raise FormatError(
                f"expected a state within steps {first} to {total} of a round, {per_epoch} an "
                f"epoch, and its optimizer, got step {state.step} of epoch {state.epoch}"
            )
        if state.step == first:  # a round goes on as it began, whatever this machine would choose
            sparse = [name for name, mask in state.masks.items() if trains_sparse(config, mask)]
            state = replace(state, sparse=tuple(sparse))
        network = _network(model, config.blocksize, state.sparse).to(config.device).train()
        optimizer = self._make_optimizer(network, state)
        generator = torch.Generator()
        generator.set_state(state.generator)
        take_step = make_step(network, optimizer, data.train, self.kind.loss)
        step, losses, since = state.step, 0.0, state.step
        while step < total:
            epoch_start = generator.get_state()
            for chosen in batches(data.train, config.bs, generator)[step % per_epoch :]:
                if config.last_lr == "linear" and state.round == config.rounds:
                    set_lr(optimizer, config.lr * (1 - step / total))
                losses, step = losses + take_step(chosen), step + 1
                if state.round == 0 and step == self.rewind_step:
                    state = replace(state, init=snapshot(network))
                if step % self.every and step != total:
                    continue
                epoch, left = divmod(step, per_epoch)
                record = {
                    "round": state.round,
                    "epoch": epoch,
                    "step": step,
                    "density": density(state.masks),
                    "trained_sparse": [*state.sparse],
                    **self._evaluate(network, float(losses) / (step - since), step == total),
                }
                if state.ticket_generator is not None:
                    record["control"] = CONTROL
                state = replace(
                    state,
                    epoch=epoch,
                    step=step,
                    weights=read(network),
                    # a round that ends inside an epoch leaves its order to no other
                    generator=epoch_start if left and step < total else generator.get_state(),
                    optimizer=_optimizer_state(network, optimizer),
                    history=(*state.history, record),
                )
                yield state
                losses, since = 0.0, step
                if step == total:
                    break
        if network is not model:
            write_(model, state.weights, state.masks)

    def _make_optimizer(self, network: nn.Module, state: State) -> torch.optim.Optimizer:
        """Of the state's round, with what the state remembers of its steps."""
        config, cuda = self.config, next(network.parameters()).is_cuda
        lr = torch.tensor(config.lr, device=config.device) if cuda else config.lr
        optimizer = torch.optim.Adam(network.parameters(), lr, fused=True, capturable=cuda)
        for name, value in state.optimizer.items():
            parameter, _, key = name.rpartition(".")
            optimizer.state[network.get_parameter(parameter)][key] = value.to(config.device)
        if config.block_lasso and 0 < state.round < config.rounds:
            lasso = BlockLasso(network, state.masks, config.blocksize, config.block_lasso)
            optimizer.register_step_post_hook(lasso)
        return optimizer

    def _evaluate(self, network: nn.Module, train_loss: float, tested: bool) -> dict:
        """What a record says of the network. TrainingError if the loss is not finite."""
        loss, accuracy = evaluate(network, self.data.validation, self.kind.loss)
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
            record["test_accuracy"] = evaluate(network, self.data.test, self.kind.loss)[1]
        network.train()
        return record


def run_config(settings: object) -> RunConfig:
    """The run whose `search_settings` these are; ValueError if they are of none.

    Whether there is a GPU here does not matter to a file.
    """
    try:
        config = RunConfig.from_dict({**settings, "device": "cpu"})
    except (TypeError, ValueError) as error:
        raise FormatError(f"expected the settings of a run: {error}") from error
    if settings.keys() != (known := config.search_settings().keys()):
        raise FormatError(f"expected settings {sorted(known)}, got {sorted(settings)}")
    return config


def expect_of_run(config: RunConfig, init: Tensors, masks: Masks) -> None:
    """Raises FormatError unless the tensors are those of the run's model, and finite."""
    model = MODELS[config.model].empty()
    expect_like("init", init, read(model))
    expect_like("masks", masks, prunable(model, config.blocksize).masks())
    expect_finite("init", init)


def search_from(
    config: RunConfig, state: State, trained: bool = False, **settings: object
) -> Search:
    """The library's search where the state is: in its round, or at its end. For settings see
    `RunConfig.search`."""
    search = config.search(MODELS[config.model].fresh(), **settings)
    search.restore(state.round, trained, state.init, state.masks, state.weights)
    return search


def redraw(state: State) -> State:
    """The state with weights drawn anew from its generator: the paper's control of its masks."""
    generator = torch.Generator()
    generator.set_state(state.generator)
    drawn = snapshot(MODELS[state.settings["model"]].new(generator))
    weights = masked(drawn, state.masks)
    return replace(state, weights=weights, generator=generator.get_state())


def _begin_ticket(state: State) -> State:
    """The state of the ticket whose control is trained; without late rewinding, which has none."""
    return replace(
        state,
        epoch=0,
        step=0,
        weights=masked(state.init, state.masks),
        generator=state.ticket_generator,
        sparse=(),
        optimizer={},
        ticket_generator=None,
    )


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
    return backend(probe).chains and int(mask.sum()) <= limit * mask.numel()


def _network(model: nn.Module, blocksize: tuple[int, int], sparse: tuple[str, ...]) -> nn.Module:
    """The model itself or, where layers train block-sparse, a copy in which they are."""
    if not sparse:
        return model
    chosen = copy.deepcopy(model)
    return sparsify_(chosen, blocksize, lambda _, name: name in sparse, max_density=1.0)


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Its live tensors as "<parameter>.<key>"."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _optimizer_like(model: nn.Module) -> Tensors:
    """Tensors of the names, shapes and dtypes of `_optimizer_state`."""
    like = {}
    for name, parameter in model.named_parameters():
        like |= {f"{name}.{key}": parameter for key in ("exp_avg", "exp_avg_sq")}
        like[f"{name}.step"] = torch.zeros(())
    return like


def expect_history(history: object, record: Types = RECORD) -> None:
    """Raises FormatError unless it is a list of such records."""
    if not isinstance(history, list):
        raise FormatError(f"expected a list as history, got {history!r}")
    for entry in history:
        if not isinstance(entry, dict) or not entry.keys() <= record.keys():
            raise FormatError(f"expected records of {', '.join(record)}, got {entry!r}")
        for name, kind in record.items():
            value = entry.get(name)
            if not _is(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
                raise FormatError(f"expected {name} of {kind} in the history, got {value!r}")


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
