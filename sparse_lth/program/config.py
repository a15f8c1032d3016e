"""RunConfig: every setting of a run, once."""

import math
import re
from dataclasses import asdict, dataclass

import torch
from torch import nn

from ..masks import SCOPES
from ..search import Search
from .models import MODELS

TRAIN_SPARSE = ("auto", "on", "off")
DATASETS = ("auto", "mnist", "digits")
_STEPS = re.compile(r"(\d+)(it|ep)")


@dataclass(frozen=True)
class RunConfig:
    """The settings of one search; raises ValueError where one cannot be.

    prune_pc is the fraction of weights pruned in total when all rounds are done; blocksize (R, C)
    is outputs x inputs, (1, 1) being single weights; export_blocksize, when not None, asks for
    the block-sparse model in blocks of that size.

    A round lasts `iterations` steps, or `epochs` where that is None, and is evaluated after every
    `every` steps, or every epoch. rewind_step, as in 500it or 1ep, is the k of the θ_k that round 0
    passes and survivors are rewound to; reinit draws new weights instead; one_shot prunes in one
    round what prune_rounds rounds would. train_sparse says whether pruned linear layers train as
    block-sparse layers instead of under masks: the same gradients to rounding, in less time.
    """

    model: str = "lenet-300-100"
    dataset: str = "auto"
    data_dir: str = "data"
    lr: float = 1e-3
    bs: int = 128
    epochs: int = 8
    iterations: int | None = None
    every: int | None = None
    prune_pc: float = 0.2
    prune_rounds: int = 5
    blocksize: tuple[int, int] = (1, 1)
    scope: str = "layerwise"
    rewind_step: str = "0it"
    reinit: bool = False
    one_shot: bool = False
    train_sparse: str = "auto"
    export_blocksize: tuple[int, int] | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        self._expect("model", f"one of {', '.join(MODELS)}", self.model in MODELS)
        self._expect("dataset", f"one of {', '.join(DATASETS)}", self.dataset in DATASETS)
        self._expect("scope", f"one of {', '.join(SCOPES)}", self.scope in SCOPES)
        known = self.train_sparse in TRAIN_SPARSE
        self._expect("train_sparse", f"one of {', '.join(TRAIN_SPARSE)}", known)
        self._expect("lr", "a finite number above 0", math.isfinite(self.lr) and self.lr > 0)
        self._expect("bs", "at least 1", self.bs >= 1)
        self._expect("epochs", "at least 1", self.epochs >= 1)
        for name in ("iterations", "every"):
            value = getattr(self, name)
            self._expect(name, "at least 1", value is None or value >= 1)
        self._expect(
            "rewind_step", "steps or epochs, as in 500it or 1ep", _STEPS.fullmatch(self.rewind_step)
        )
        late = steps(self.rewind_step, per_epoch=1) > 0
        self._expect("reinit", "no rewind_step beside it", not (self.reinit and late))
        self._expect("prune_rounds", "at least 1", self.prune_rounds >= 1)
        self._expect("prune_pc", "a fraction above 0 and below 1", 0 < self.prune_pc < 1)
        self._expect("seed", "0 or more", 0 <= self.seed < 2**63)
        for name in ("blocksize", "export_blocksize"):
            if (blocksize := getattr(self, name)) is not None:
                self._expect(name, "two sizes of at least 1", min(blocksize) >= 1)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected cpu or auto, since torch sees no GPU here, got cuda")
        try:
            self.search(MODELS[self.model].fresh())
        except ValueError as error:
            raise ValueError(f"prune_pc and blocksize: {error}") from error

    def _expect(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")

    @property
    def rounds(self) -> int:
        """How many follow the dense round 0."""
        return 1 if self.one_shot else self.prune_rounds

    @property
    def rate(self) -> float:
        """The fraction of the weights still alive that one round prunes."""
        return 1 - (1 - self.prune_pc) ** (1 / self.prune_rounds)

    def search(
        self, model: nn.Module, levels: tuple[int, ...] | None = None, rewind: str = "init"
    ) -> Search:
        """The library's search of this model of the registry, before its first round.

        Layerwise, the output layer is pruned at half the rate, as in the paper.
        """
        if self.one_shot:
            levels = (self.prune_rounds,)
        half = {MODELS[self.model].output: 0.5}
        return Search(
            model,
            1 - self.prune_pc,
            self.prune_rounds,
            self.blocksize,
            scope=self.scope,
            rates=half if self.scope == "layerwise" else {},
            levels=levels,
            rewind=rewind,
        )

    def search_settings(self) -> dict:
        """What a ticket says of its run, as JSON holds it: everything but where the data lay."""
        return {name: value for name, value in asdict(self).items() if name != "data_dir"}

    @classmethod
    def from_dict(cls, settings: dict) -> "RunConfig":
        """The inverse of dataclasses.asdict, JSON's lists made tuples again."""
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"expected the settings of a run, got {settings}: {error}") from error


def steps(text: str, per_epoch: int) -> int:
    """500it -> 500; 2ep -> two epochs of per_epoch steps"""
    count, unit = _STEPS.fullmatch(text).groups()
    return int(count) * (per_epoch if unit == "ep" else 1)
