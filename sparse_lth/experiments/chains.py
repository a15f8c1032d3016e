"""The paper's experiments as independent chains: a method, from the dense network to a sparse one.

A chain says what is to be trained next, and is told how it went; an engine trains. It saves itself
after every round, and run again goes on from there.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..masks import densities_after
from ..program.config import RunConfig
from ..program.data import Dataset
from ..program.flags import plain
from ..program.lottery import Lottery, State, search_from
from ..program.models import MODELS, NARROW
from ..program.tickets import dense_network, make_ticket, sparse_network
from ..saving import save_sparse
from ..weights import prunable, write_
from .controls import CONTROLS

RATE, LAST = 0.2, 15  # the paper prunes 20 % in each round; after 15 are left 3.6 %
TICKET = "winning ticket"
BLOCKSIZES = ((16, 16), (16, 4), (16, 1))  # beside single weights
LOSSES = ("train_loss", "validation_loss")
ACCURACIES = ("validation_accuracy", "test_accuracy", "train_accuracy")
ROW = {  # of the results, with its types
    **dict.fromkeys(("method", "model", "blocksize"), str),
    **dict.fromkeys(("replicate", "round", "prunings", "iteration"), int),
    "density": float,
    **dict.fromkeys((*LOSSES, *ACCURACIES), float | None),
}

OF_NETWORK = ("method", "model", "blocksize", "replicate", "round")  # columns that tell which


@dataclass(frozen=True)
class Plan:
    """The settings that all chains share.

    levels: the rounds of the paper's ladder that are trained, by every chain, so that all that are
    compared were pruned as often. Validation comes every `every` steps; the test set is evaluated
    every test_every, a multiple of that, at the early stop and at the end, the training set at
    these two, and nothing is chosen by either.
    """

    iterations: int = 5_000
    levels: tuple[int, ...] = (1, 3, 5, 7, 9, 11, 13, 15)
    every: int = 100
    test_every: int = 200
    rewind: str = "500it"
    dataset: str = "mnist"
    data_dir: str = "data"
    device: str = "cpu"
    curves: bool = False  # for TensorBoard

    @classmethod
    def full(cls, **settings) -> "Plan":
        """The paper's protocol."""
        return cls(50_000, tuple(range(1, LAST + 1)), test_every=1_000, **settings)


@dataclass(frozen=True)
class Method:
    """How a chain's rounds start.

    one_shot: each prunes the dense network; late: each trains from the plan's step on;
    rewind: as `Search` has it; lr: of all rounds but the dense one
    """

    one_shot: bool = False
    late: bool = False
    rewind: str = "init"
    lr: float = 1.2e-3


METHODS = {
    TICKET: Method(),
    "one-shot": Method(one_shot=True),
    # these three retrain for as many steps (arXiv 2003.02389), of weights from step k or the end
    "late rewinding": Method(late=True),
    "learning-rate rewinding": Method(late=True, rewind="weights"),
    # the paper's learning rate is constant, so there is no low one at its end to go on with
    "fine-tuning": Method(late=True, rewind="weights", lr=1.2e-4),
    "dense": Method(),  # the narrower networks
}
UNREWOUND = "continued training"
BESIDE = {  # the controls of a chain
    TICKET: tuple(name for name in CONTROLS if name != UNREWOUND),
    "learning-rate rewinding": (UNREWOUND,),
}
NETWORKS = (*METHODS, "blocks", *CONTROLS)  # what can be trained; blocks are tickets, too


@dataclass(frozen=True)
class Chain:
    """One method from one seed, its replicate's number; controls: names in CONTROLS."""

    method: str
    replicate: int
    levels: tuple[int, ...]
    blocksize: tuple[int, int] = (1, 1)
    model: str = "lenet-300-100"
    controls: tuple[str, ...] = ()

    @property
    def shape(self) -> str:
        """Of its blocks, as in 16x4."""
        return plain(self.blocksize)

    @property
    def name(self) -> str:
        return f"{self.method.replace(' ', '_')}-{self.model}-{self.shape}-{self.replicate}"

    @property
    def networks(self) -> list[tuple]:
        """OF_NETWORK of what it trains: the dense one, and at each level its own with its
        controls."""
        methods = self.method, *self.controls
        rounds = [(self.method, 0), *((name, level) for level in self.levels for name in methods)]
        return [(name, self.model, self.shape, self.replicate, level) for name, level in rounds]

    @property
    def density(self) -> float:
        """What the paper's ladder leaves in the end."""
        kind = MODELS[self.model]
        sizes = prunable(kind.empty(), self.blocksize).sizes()
        left = densities_after(sizes, RATE, LAST, {kind.output: 0.5})
        return sum(left[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def config(self, plan: Plan, method: Method, level: int) -> RunConfig:
        """The search whose round this is, trained as the method has it."""
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
            rewind=plan.rewind if method.late else "init",
            seed=self.replicate,
            device=plan.device,
        )


@dataclass(frozen=True)
class Job:
    """A network to be trained from this state to the end of its round.

    method: the chain's, or a control; level: of the paper's ladder; prunings: how many led there
    """

    chain: Chain
    method: str
    level: int
    prunings: int
    config: RunConfig
    start: State

    @property
    def name(self) -> str:
        return f"{self.chain.name}/{self.method.replace(' ', '_')}/round_{self.level}"

    def row(self, record: dict) -> dict:
        """A row of the results."""
        return {
            "method": self.method,
            "model": self.chain.model,
            "blocksize": self.chain.shape,
            "replicate": self.chain.replicate,
            "round": self.level,
            "prunings": self.prunings,
            "density": record["density"],
            "iteration": record["step"],
            **{name: record.get(name) for name in (*LOSSES, *ACCURACIES)},
        }


@dataclass(frozen=True)
class Trained:
    """state: the round's last, on the CPU, without an optimizer; records: one for every evaluation,
    the first before any training; the early stop and the last have every accuracy."""

    state: State
    records: list[dict]


def early_stop(records: list[dict]) -> dict:
    """The evaluation of least validation loss, of equal ones the first."""
    return min(records, key=lambda record: record["validation_loss"])


def record_of(density: float, step: int, losses: dict, accuracies: dict) -> dict:
    """A record; its losses to the nine digits that tell float32 numbers apart."""
    rounded = {name: float(f"{loss:.9g}") for name, loss in losses.items()}
    return {"density": density, "step": step, **rounded, **accuracies}


def grid(plan: Plan, replicates: int, networks: Sequence[str] = NETWORKS) -> list[Chain]:
    """The chains of these networks, a control with its chain, the longest first."""
    chains = []
    for replicate in range(replicates):
        for method in (name for name in METHODS if name != "dense"):
            controls = tuple(name for name in BESIDE.get(method, ()) if name in networks)
            if method in networks or controls:
                chains.append(Chain(method, replicate, plan.levels, controls=controls))
        if "blocks" in networks:
            chains += [Chain(TICKET, replicate, plan.levels, size) for size in BLOCKSIZES]
        if "dense" in networks:
            chains += [Chain("dense", replicate, (), model=model) for model in NARROW]
    return sorted(chains, key=lambda chain: -len(chain.levels) * (1 + len(chain.controls)))


def run_chain(
    plan: Plan, chain: Chain, data: Dataset, folder: Path
) -> Generator[list[Job], list[Trained], None]:
    """Yields what is to be trained next, a round of the chain's own network and its controls, and
    wants it sent back trained; begins with what its file in `folder` lacks.

    The file is a State: what the next round is pruned from, and as its history a row for each
    evaluation on the test set so far.
    """
    path, method = chain_path(folder, chain), METHODS[chain.method]
    lottery = Lottery(chain.config(plan, method, 0), data)
    state = State.load(path, ROW) if path.exists() else lottery.start()
    rows = list(state.history)
    done = rows[-1]["round"] if rows else -1
    for levels in [(level,) for level in chain.levels] if method.one_shot else [chain.levels]:
        if done >= 0 and done >= max(levels, default=0):
            continue
        settings = {"levels": levels, "rewind": method.rewind}
        search = search_from(lottery.config, state, done >= 0, **settings)
        for round in search:
            level = (0, *levels)[round]
            start = replace(lottery.begin_round(state, search) if level else state, history=())
            config = chain.config(plan, method, level)
            jobs = [Job(chain, chain.method, level, round, config, start)]
            if level:
                config = chain.config(plan, Method(), level)
                for name in chain.controls:
                    jobs.append(Job(chain, name, level, round, config, CONTROLS[name](start)))
            own, *_ = trained = yield jobs
            for job, result in zip(jobs, trained, strict=True):
                rows += [job.row(r) for r in result.records if "test_accuracy" in r]
                if plan.curves:
                    write_curves(folder / "tensorboard" / job.name, result.records)
            write_(search.model, own.state.weights, own.state.masks)
            search.init = own.state.init
            if is_measured(chain):
                ticket = make_ticket(own.state)
                network = (
                    sparse_network(ticket, chain.blocksize) if level else dense_network(ticket)
                )
                save_sparse(network, network_path(folder, chain, level), chain.model)
            if not (method.one_shot and level):
                state = own.state
            state, done = replace(state, history=tuple(rows)), level
            state.save(path)


def is_measured(chain: Chain) -> bool:
    """Whether its networks are kept, to be timed: one replicate of the tickets is enough."""
    return chain.method == TICKET and chain.replicate == 0


def chain_path(folder: Path, chain: Chain) -> Path:
    return folder / "chains" / f"{chain.name}.safetensors"


def network_path(folder: Path, chain: Chain, level: int) -> Path:
    return folder / "networks" / f"{chain.name}-{level}.safetensors"


def write_curves(folder: Path, records: list[dict]) -> None:
    """TensorBoard's scalars of one training."""
    from torch.utils.tensorboard import SummaryWriter  # seconds, and not always installed

    with SummaryWriter(folder) as writer:
        for record in records:
            for name in (*LOSSES, *ACCURACIES):
                if name in record:
                    writer.add_scalar(name, record[name], record["step"])
