"""The paper's experiments as independent chains: a method, from the dense network to a sparse one.

A chain saves itself after every round, and run again goes on from there.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..masks import densities_after, density
from ..program.config import RunConfig
from ..program.data import Dataset
from ..program.lottery import Lottery, State, begin_round, redraw, search_from
from ..program.models import MODELS, NARROW
from ..program.tickets import make_ticket
from ..program.training import evaluate
from ..weights import Tensors, masked, prunable, snapshot, write_

RATE, LAST = 0.2, 15  # the paper prunes 20 % in each round; after 15 are left 3.6 %
TICKET = "winning ticket"
MEASURES = ("train_loss", "validation_loss", "validation_accuracy", "test_accuracy")
ROW = {  # of the results, with its types
    **dict.fromkeys(("method", "model", "blocksize"), str),
    **dict.fromkeys(("replicate", "seed", "round", "iteration"), int),
    "density": float,
    **dict.fromkeys(MEASURES, float | None),
}


@dataclass(frozen=True)
class Plan:
    """The settings that all chains share.

    levels: the rounds of the paper's ladder that a chain trains; few_levels: those of the chains
    that need not be dense. The test set is evaluated every test_every steps, a multiple of every,
    at the early stop and at the end, and nothing is chosen by it.
    """

    iterations: int = 5_000
    levels: tuple[int, ...] = (1, 3, 5, 7, 9, 11, 13, 15)
    few_levels: tuple[int, ...] = (3, 7, 11, 15)
    every: int = 100
    test_every: int = 200
    rewind_step: str = "500it"
    dataset: str = "mnist"
    data_dir: str = "data"
    device: str = "cpu"
    curves: bool = False  # for TensorBoard

    @classmethod
    def full(cls, **settings) -> "Plan":
        """The paper's protocol."""
        every_round = tuple(range(1, LAST + 1))
        return cls(50_000, every_round, every_round, test_every=500, **settings)


@dataclass(frozen=True)
class Method:
    """How a chain's rounds start.

    one_shot: each prunes the dense network; late: rewinds to the plan's rewind_step; rewind: as
    `Search` has it; lr: of all rounds but the dense one
    """

    one_shot: bool = False
    late: bool = False
    rewind: str = "init"
    lr: float = 1.2e-3


def scatter_masks(state: State) -> State:
    """The state with masks that keep as many weights of each layer, at random."""
    generator = torch.Generator()
    generator.set_state(state.generator)
    masks = {}
    for name, mask in state.masks.items():
        order = torch.randperm(mask.numel(), generator=generator)
        masks[name] = mask.flatten()[order].view(mask.shape)
    weights = masked(state.init, masks)
    return replace(state, masks=masks, weights=weights, generator=generator.get_state())


METHODS = {
    TICKET: Method(),
    "one-shot": Method(one_shot=True),
    "late rewinding": Method(late=True),
    "learning-rate rewinding": Method(rewind="weights"),
    # the paper's learning rate is constant, so there is no low one at its end to go on with
    "fine-tuning": Method(rewind="weights", lr=1.2e-4),
    "dense": Method(),
}
CONTROLS = {"random reinit": redraw, "random mask": scatter_masks}  # from the ticket's own start


@dataclass(frozen=True)
class Chain:
    """One method from one seed, its replicate's number; controls: CONTROLS beside each ticket."""

    method: str
    replicate: int
    levels: tuple[int, ...]
    blocksize: tuple[int, int] = (1, 1)
    model: str = "lenet-300-100"
    controls: bool = False

    @property
    def name(self) -> str:
        rows, cols = self.blocksize
        method = self.method.replace(" ", "_")
        return f"{method}-{self.model}-{rows}x{cols}-{self.replicate}"

    @property
    def density(self) -> float:
        """What the paper's ladder leaves in the end."""
        kind = MODELS[self.model]
        sizes = prunable(kind.empty(), self.blocksize).sizes()
        left = densities_after(sizes, RATE, LAST, {kind.output: 0.5})
        return sum(left[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def config(self, plan: Plan, level: int) -> RunConfig:
        """The search that trains this round."""
        method = METHODS[self.method]
        return RunConfig(
            model=self.model,
            dataset=plan.dataset,
            data_dir=plan.data_dir,
            lr=method.lr if level else Method.lr,
            bs=60,
            iterations=plan.iterations,
            every=plan.every,
            prune_pc=1 - self.density,
            prune_rounds=LAST,
            blocksize=self.blocksize,
            rewind_step=plan.rewind_step if method.late else "0it",
            seed=self.replicate,
            device=plan.device,
        )


def grid(plan: Plan, replicates: int) -> list[Chain]:
    """All chains, the longest first."""
    chains = []
    for replicate in range(replicates):
        chains.append(Chain(TICKET, replicate, plan.levels, controls=True))
        for blocksize in ((16, 16), (16, 4), (16, 1)):
            chains.append(Chain(TICKET, replicate, plan.few_levels, blocksize))
        for method in ("one-shot", "late rewinding", "learning-rate rewinding", "fine-tuning"):
            chains.append(Chain(method, replicate, plan.few_levels))
        chains += [Chain("dense", replicate, (), model=model) for model in NARROW]
    return sorted(chains, key=lambda chain: (not chain.controls, -len(chain.levels)))


def run_chain(plan: Plan, chain: Chain, data: Dataset, folder: Path) -> Iterator[str]:
    """Trains the rounds that the chain's file in `folder` lacks; yields a line for every network.

    The file is a State: what the next round is pruned from, and as its history a row for each
    evaluation so far.
    """
    path, method = chain_path(folder, chain), METHODS[chain.method]
    config = chain.config(plan, 0)
    state = State.load(path, ROW) if path.exists() else Lottery(config, data).start()
    rows = list(state.history)
    done = rows[-1]["round"] if rows else -1
    for levels in [(level,) for level in chain.levels] if method.one_shot else [chain.levels]:
        if done >= 0 and done >= max(levels, default=0):
            continue
        search = search_from(config, state, done >= 0, levels=levels, rewind=method.rewind)
        for round in search:
            level = (0, *levels)[round]
            lottery = Lottery(chain.config(plan, level), data)
            start = begin_round(state, search) if level else state
            starts = {chain.method: start}
            if level and chain.controls:
                starts |= {name: control(start) for name, control in CONTROLS.items()}
            for name, start in starts.items():
                began = time.perf_counter()
                run = f"{chain.name}/{name.replace(' ', '_')}/round_{level}"
                curves = _Curves(folder / "tensorboard" / run, plan.curves)
                network = search.model if name == chain.method else start.model()
                last, records = _train(lottery, network, start, plan.test_every, curves.add)
                curves.close()
                rows += [_row(chain, name, level, record) for record in records]
                if name == chain.method:
                    trained, end = replace(last, weights=snapshot(search.model)), records[-1]
                yield _describe(chain, name, level, records, time.perf_counter() - began)
            search.init = trained.init
            if is_measured(chain):
                ticket = make_ticket(replace(trained, history=(end,)))
                ticket.save(ticket_path(folder, chain, level))
            if not (method.one_shot and level):
                state = replace(trained, optimizer={})
            state, done = replace(state, history=tuple(rows)), level
            state.save(path)


def is_measured(chain: Chain) -> bool:
    """Whether its tickets are kept, to be run as block-sparse layers: one replicate is enough."""
    return chain.method == TICKET and chain.replicate == 0


def chain_path(folder: Path, chain: Chain) -> Path:
    return folder / "chains" / f"{chain.name}.safetensors"


def ticket_path(folder: Path, chain: Chain, level: int) -> Path:
    return folder / "tickets" / f"{chain.name}-{level}.safetensors"


def _train(
    lottery: Lottery,
    model: nn.Module,
    start: State,
    test_every: int,
    log: Callable[[dict], None],
) -> tuple[State, list[dict]]:
    """Trains one round -> (its last state, its records from step 0, which `log` gets as they come).

    The record of the least validation loss, the early stop, has its test accuracy.
    """
    data, other = lottery.data, start.model().to(lottery.config.device)

    def test(weights: Tensors) -> float:
        write_(other, weights, {})
        return evaluate(other, data.test)[1]

    loss, accuracy = evaluate(other, data.validation)
    first = {"round": start.round, "step": 0, "density": density(start.masks)}
    first |= {"validation_loss": loss, "validation_accuracy": accuracy}
    records = [{**first, "test_accuracy": test(start.weights)}]
    log(records[0])
    early, early_weights, state = records[0], {}, start
    for state in lottery.train(model, replace(start, history=())):
        record = dict(state.history[-1])
        if state.step % test_every == 0 and "test_accuracy" not in record:
            record["test_accuracy"] = test(state.weights)
        if record["validation_loss"] < early["validation_loss"]:
            early = record
            early_weights = {name: weight.clone() for name, weight in state.weights.items()}
        records.append(record)
        log(record)
    if "test_accuracy" not in early:
        early["test_accuracy"] = test(early_weights)
    return state, records


def _row(chain: Chain, method: str, level: int, record: dict) -> dict:
    """A row of the results."""
    return {
        "method": method,
        "model": chain.model,
        "blocksize": "x".join(map(str, chain.blocksize)),
        "replicate": chain.replicate,
        "seed": chain.replicate,
        "round": level,
        "density": record["density"],
        "iteration": record["step"],
        **{name: record.get(name) for name in MEASURES},
    }


def _describe(chain: Chain, method: str, level: int, records: list[dict], seconds: float) -> str:
    early = min(records, key=lambda record: record["validation_loss"])
    model, steps = chain.model.removeprefix("lenet-"), records[-1]["step"]
    return (
        f"{method}, {model}, {'x'.join(map(str, chain.blocksize))}, replicate {chain.replicate}, "
        f"round {level} ({100 * early['density']:.1f} %): early stop at {early['step']} with "
        f"{early['test_accuracy']:.2%}, {records[-1]['test_accuracy']:.2%} at the end; "
        f"{steps / seconds:.0f} iterations/s"
    )


class _Curves:
    """TensorBoard's scalars of one training; a round that was broken off is written anew."""

    def __init__(self, folder: Path, wanted: bool):
        self.writer = None
        if wanted:
            from torch.utils.tensorboard import SummaryWriter  # seconds, and not always installed

            self.writer = SummaryWriter(folder, purge_step=0)

    def add(self, record: dict) -> None:
        if self.writer is None:
            return
        for name in MEASURES:
            if name in record:
                self.writer.add_scalar(name, record[name], record["step"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
