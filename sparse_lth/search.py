"""The search for a lottery ticket in any model: train, prune, rewind, again and again."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_post_hook

from .lasso import BlockLasso
from .masks import (
    CRITERIA,
    SCOPES,
    Masks,
    common_rate,
    densities_after,
    density,
    erk_densities,
    highest_masks,
)
from .ticket import Ticket, expect_finite, expect_like
from .weights import (
    Filter,
    Prunable,
    Tensors,
    expect_model,
    prunable,
    snapshot,
    weight_name,
    write_,
)

Criterion = Callable[[Tensors, Masks, dict[str, float]], Masks]
REWINDS = ("init", "weights")


def find_ticket(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    density: float = 0.1,
    rounds: int = 5,
    blocksize: tuple[int, int] = (1, 1),
    evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
    **settings,
) -> Ticket:
    """The ticket of a `Search`, which has the other settings, and whose loop this runs.

    train(model) trains the model in place, however it likes. evaluate(model), called in eval mode
    and without gradients, gives a number, or several by name, for the record of each round.
    """
    search = Search(model, density, rounds, blocksize, **settings)
    for _ in _shown(search):
        train(model)
        if evaluate:
            model.eval()
            with torch.no_grad():
                measured = evaluate(model)
            search.record(**(measured if isinstance(measured, Mapping) else {"score": measured}))
    return search.ticket()


class Search:
    """A search as a loop over its rounds, which trains the model in between:

        search = Search(model, density=0.1, rounds=5)
        for round in search:  # 0 is the dense network
            train(model)
            search.record(accuracy=accuracy(model))
        ticket = search.ticket()

    After every round but the last the smallest weights are pruned and the model is rewound: every
    surviving weight, every bias and every buffer is what it was, bit for bit, unless rewind says
    otherwise. Masks hold while it trains, by `torch.nn.utils.prune`: a pruned weight is exactly 0,
    whatever the optimizer does. In the end the model is left trained, with its masks on.

    density: kept / all, of the weights that may be pruned together, to one block. Each of the
        rounds prunes the same rate of what is left.
    blocksize: (R, C) = outputs x inputs, in a convolution channels x (channels * kernel). A layer
        smaller than one block stays dense.
    criterion: "magnitude", "movement" or "random", of which the least scores are pruned, or a
        function (weights, masks, densities) -> masks, by layer name, that decides alone.
    scope: "layerwise", where every layer gets the same density but for `rates`; "erk", where small
        layers keep more (Erdos-Renyi-Kernel, arXiv 1911.11134), which large blocks need; or
        "global", where the layers compete.
    rewind: "init", to the weights that the model came with, or that `mark_rewind` marked, or
        "weights", which keeps the trained ones (learning-rate rewinding).
    block_lasso: the strength of a group lasso that shrinks whole blocks (`lasso.py`) in every round
        between the dense one and the last, by itself, after each step of a torch optimizer on the
        model's Parameters; ValueError after a round without one. For blocks, with rewind="weights",
        where 0.05 did best on MNIST; a round should have 2,000 steps or so.
    rates: layers that are pruned at a share of the common rate, as in {"head": 0.5}.
    levels: the rounds to train, if not all: (rounds,) prunes in one shot.
    filter_fn: (module, name) -> whether this linear or convolutional layer may be pruned, by
        default all. A weight that layers share is pruned once, that of an embedding never.
    seed: of the criterion "random".
    out_dir: a folder for ticket.safetensors, the ticket of the last finished round. A search that
        finds one there goes on after that round; ValueError where its settings were others.

    In distributed training, where all processes have the same weights, they find the same masks,
    and the first of them writes the file. A model that DDP wraps is searched inside the wrapper.
    """

    def __init__(
        self,
        model: nn.Module,
        density: float = 0.1,
        rounds: int = 5,
        blocksize: tuple[int, int] = (1, 1),
        *,
        criterion: str | Criterion = "magnitude",
        scope: str = "layerwise",
        rewind: str = "init",
        block_lasso: float = 0.0,
        rates: Mapping[str, float] | None = None,
        levels: Sequence[int] | None = None,
        filter_fn: Filter | None = None,
        seed: int = 0,
        out_dir: str | Path | None = None,
    ):
        wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        expect_model(model)
        self.model = model.module if isinstance(model, wrappers) else model
        if prune.is_pruned(self.model):
            raise ValueError("expected a model without masks: take them off with prune.remove")
        blocksize = (blocksize, blocksize) if isinstance(blocksize, int) else tuple(blocksize)
        self.criterion, self.blocksize, self.scope, self.rewind = (
            criterion,
            blocksize,
            scope,
            rewind,
        )
        self.seed = seed
        self.settings = {
            "density": density,
            "rounds": rounds,
            "blocksize": [*blocksize],
            "criterion": getattr(criterion, "__name__", criterion),
            "scope": scope,
            "rewind": rewind,
            "block_lasso": block_lasso,
            "rates": dict(rates or {}),
            "levels": [*(range(1, rounds + 1) if levels is None else levels)],
            "seed": seed,
        }
        _expect_possible(**self.settings, known=callable(criterion) or criterion in CRITERIA)
        layers = prunable(self.model, blocksize, filter_fn)
        self.schedule = _schedule(layers, self.settings)
        self.dense, self._modes = layers.dense, {m: m.training for m in self.model.modules()}
        self.round, self.trained, self.records = 0, False, [{"round": 0, "density": 1.0}]
        self.masks, self.init = layers.masks(), snapshot(self.model)
        self._path = Path(out_dir) / "ticket.safetensors" if out_dir else None
        if self._path and self._path.exists():
            self._resume(Ticket.load(self._path))

    def __iter__(self) -> Iterator[int]:
        """The rounds that are left, each when the model is ready to be trained."""
        while not self.trained or self.round < len(self.schedule):
            if self.trained:
                self._prune_and_rewind()
            with self._lasso():
                yield self.round
            self._finish()

    @contextmanager
    def _lasso(self) -> Iterator[None]:
        """What is trained inside is shrunk by the lasso, but in the first round and the last."""
        strength = self.settings["block_lasso"]
        if not strength or not 0 < self.round < len(self.schedule):
            yield
            return
        lasso = BlockLasso(self.model, self.masks, self.blocksize, strength)
        hook = register_optimizer_step_post_hook(lasso)
        try:
            yield
        finally:
            hook.remove()
        if not lasso.stepped:
            raise ValueError(
                "expected steps of a torch.optim optimizer on the model's own Parameters, since "
                f"block_lasso acts after each, got none in round {self.round}"
            )

    def mark_rewind(self) -> None:
        """In round 0: makes the weights of this moment those that all later rounds rewind to,
        unless they rewind to none."""
        if self.round == 0:
            self.init = snapshot(self.model)

    def record(self, **measured: float) -> None:
        """Adds these numbers to the record of the round."""
        self.records[-1] |= {name: float(value) for name, value in measured.items()}

    def ticket(self) -> Ticket:
        """What is found so far: the model may go on training."""
        records = tuple(dict(record) for record in self.records)
        trained = snapshot(self.model)
        return Ticket(self.init, self.masks, trained, records, self.dense, self.settings)

    def restore(
        self, round: int, trained: bool, init: Tensors, masks: Masks, weights: Tensors
    ) -> None:
        """Puts search and model where another search was: in a round, or at its end."""
        self.round, self.trained, self.init, self.masks = round, trained, init, masks
        write_(self.model, weights, masks)

    def _resume(self, ticket: Ticket) -> None:
        for name, value in self.settings.items():
            was = ticket.settings.get(name)
            expected = f"{was}, as the search there has it"
            _expect(f"{self._path}: {name}", expected, value, value == was)
        expect_like("init", ticket.init, self.init)
        expect_like("masks", ticket.masks, self.masks)
        self.records = [*ticket.rounds]
        self.restore(len(ticket.rounds) - 1, True, ticket.init, ticket.masks, ticket.trained)

    def _prune_and_rewind(self) -> None:
        self.masks = self._next_masks()
        self.round, self.trained = self.round + 1, False
        self.records.append({"round": self.round, "density": density(self.masks)})
        if self.rewind == "weights":
            self.init = snapshot(self.model)
        write_(self.model, self.init, self.masks)
        for module, training in self._modes.items():
            module.training = training

    def _next_masks(self) -> Masks:
        tensors, densities = snapshot(self.model), self.schedule[self.round]
        weights = {name: tensors[weight_name(name)] for name in densities}
        if isinstance(self.criterion, str):
            score, generator = CRITERIA[self.criterion], torch.Generator().manual_seed(self.seed)
            init = {name: self.init[weight_name(name)] for name in densities}
            scores = {name: score(w, init[name], generator) for name, w in weights.items()}
            return highest_masks(scores, self.masks, densities, self.blocksize, self.scope)
        masks = dict(self.criterion(weights, dict(self.masks), densities))
        expect_like("criterion's", masks, self.masks)
        for name, mask in masks.items():
            if (mask & ~self.masks[name]).any():
                raise ValueError(f"expected a criterion that brings back no weight of {name}")
        return masks

    def _finish(self) -> None:
        """Ends a round: what was trained is what is searched, and its masks have held."""
        trained = snapshot(self.model)
        expect_like("trained", trained, self.init)
        expect_finite("trained", trained, self.init)
        for name, mask in self.masks.items():
            if trained[weight_name(name)][~mask].any():
                raise ValueError(
                    f"expected the pruned weights of {name} to be 0 after training: "
                    "its mask must stay on"
                )
        write_(self.model, {}, self.masks)  # `weight` is otherwise as old as the last forward pass
        self.trained = True
        if self._path and not _is_follower():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.ticket().save(self._path)


def _schedule(layers: Prunable, settings: dict) -> list[dict[str, float]]:
    """The density of each layer after each round of pruning."""
    density, rounds, rates = (settings[name] for name in ("density", "rounds", "rates"))
    names = {*layers.weights, *layers.dense}
    _expect("rates", f"layers of {sorted(names)}", rates, rates.keys() <= names)
    if settings["scope"] == "erk":
        shapes = {name: weight.shape for name, weight in layers.weights.items()}
        schedule = [erk_densities(shapes, density ** (n / rounds)) for n in settings["levels"]]
    else:
        rate = common_rate(layers.sizes(), density, rounds, rates)
        schedule = [densities_after(layers.weights, rate, n, rates) for n in settings["levels"]]
    if settings["scope"] != "global" and schedule:
        layers.expect_room(schedule[-1], settings["blocksize"])
    return schedule


def _expect_possible(
    density, rounds, blocksize, criterion, scope, rewind, block_lasso, rates, levels, seed, known
) -> None:
    """Raises ValueError for settings that no model can have; known: whether the criterion is."""
    _expect("density", "above 0 and below 1", density, 0 < density < 1)
    _expect("rounds", "at least 1", rounds, rounds >= 1)
    rising = levels == sorted({*levels}) and all(1 <= level <= rounds for level in levels)
    _expect("levels", f"rising, from 1 to {rounds}", levels, rising)
    two = len(blocksize) == 2 and min(blocksize) >= 1
    _expect("blocksize", "two sizes of at least 1", blocksize, two)
    _expect("criterion", f"one of {[*CRITERIA]} or a function", criterion, known)
    _expect("scope", f"one of {SCOPES}", scope, scope in SCOPES)
    _expect("rewind", f"one of {REWINDS}", rewind, rewind in REWINDS)
    finite = 0 <= block_lasso < math.inf
    _expect("block_lasso", "a finite number of at least 0", block_lasso, finite)
    _expect("rates", "above 0, up to 1", rates, all(0 < rate <= 1 for rate in rates.values()))
    _expect("rates", f"none in {scope} scope", rates, not rates or scope == "layerwise")
    _expect("seed", "0 or more", seed, seed >= 0)


def _expect(name: str, expected: str, got: object, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _is_follower() -> bool:
    """Whether another process of the same training writes the files."""
    distributed = torch.distributed
    return (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0
    )


def _shown(search: Search) -> Iterable[int]:
    """The rounds, with a bar on a terminal."""
    if not sys.stdout.isatty():
        return search
    from rich.progress import track

    left = len(search.schedule) - search.round + (not search.trained)
    return track(search, "searching", total=left)
