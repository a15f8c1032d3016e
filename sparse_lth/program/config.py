"""RunConfig: every setting of a run, once."""

import math
import re
import reprlib
from dataclasses import asdict, dataclass, fields
from types import NoneType, UnionType
from typing import get_args, get_origin

import torch
from torch import nn

from ..masks import SCOPES
from ..search import REWINDS, Search
from ..weights import weight_layers
from .data import SOURCES
from .models import MODELS

TRAIN_SPARSE = ("auto", "on", "off")
DEVICES = ("cpu", "cuda")
DATASETS = ("auto", *SOURCES)
MOST = 10**9  # of epochs, steps and the like: what is more was not meant
LAST_LR = ("constant", "linear")
EPOCHS, STEPS = 8, 2000  # of a round whose length is not given: whichever is longer
# with which tickets of blocks come nearest to unstructured ones, as `python -m
# sparse_lth.experiments blocks` has it measured
BLOCK_RECIPE = {"scope": "erk", "rewind": "weights", "block_lasso": 0.05, "last_lr": "linear"}
ROUNDS = 1000  # at most: the density of each is worked out before the first
_STEPS = re.compile(r"([0-9]{1,9})(it|ep)")


class SettingError(ValueError):
    """A setting cannot be; the message names it and says what was expected."""


@dataclass(frozen=True)
class RunConfig:
    """The settings of one search; raises SettingError where one cannot be.

    prune_pc is the fraction of weights pruned in total when all rounds are done; blocksize (R, C)
    is outputs x inputs, (1, 1) being single weights; export_blocksize, when not None, asks for
    the block-sparse model in blocks of that size; quantize, "int8" or None, is for its layers.

    A round lasts `iterations` steps, or `epochs` where that is None, or where both are, EPOCHS or
    STEPS, whichever is longer on the data set. It is evaluated after every `every` steps, or every
    epoch, but a round of STEPS only about EPOCHS times. rewind says where rounds begin: "init", the
    survivors put back to θ₀; as in 500it or 1ep, to the θ_k that round 0 passes, to be trained from
    step k on; or "weights", as trained.
    block_lasso is the strength of a group lasso on the blocks, in all rounds between the dense one
    and the last; last_lr the learning rate of the last: "constant", or "linear", falling to 0.
    reinit trains in each round the control beside the ticket, its masks over weights drawn anew;
    one_shot prunes in one round what prune_rounds rounds would. train_sparse says whether pruned
    linear layers train as block-sparse layers instead of under masks: the same gradients to
    rounding, in less time.
    """

    model: str = "lenet-300-100"
    dataset: str = "auto"
    data_dir: str = "data"
    lr: float = 1e-3
    bs: int = 128
    epochs: int | None = None
    iterations: int | None = None
    every: int | None = None
    prune_pc: float = 0.2
    prune_rounds: int = 5
    blocksize: tuple[int, int] = (1, 1)
    scope: str = "layerwise"
    rewind: str = "init"
    block_lasso: float = 0.0
    last_lr: str = "constant"
    reinit: bool = False
    one_shot: bool = False
    train_sparse: str = "auto"
    export_blocksize: tuple[int, int] | None = None
    quantize: str | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        for field in fields(self):
            holds = is_a(getattr(self, field.name), field.type)
            self._expect(field.name, describe_type(field.type), holds)
        for name, values in (
            ("model", MODELS),
            ("dataset", DATASETS),
            ("scope", SCOPES),
            ("last_lr", LAST_LR),
            ("train_sparse", TRAIN_SPARSE),
            ("device", DEVICES),
        ):
            self._expect(name, f"one of {', '.join(values)}", getattr(self, name) in values)
        for name in ("bs", "epochs", "iterations", "every"):
            value = getattr(self, name)
            self._expect(name, f"1 to {MOST}", value is None or 1 <= value <= MOST)
        self._expect("prune_rounds", f"1 to {ROUNDS}", 1 <= self.prune_rounds <= ROUNDS)
        self._expect("lr", "a finite number above 0", math.isfinite(self.lr) and self.lr > 0)
        finite = 0 <= self.block_lasso < math.inf
        self._expect("block_lasso", "a finite number of at least 0", finite)
        self._expect("prune_pc", "a fraction above 0 and below 1", 0 < self.prune_pc < 1)
        self._expect("seed", "0 or more", self.seed >= 0)
        self._expect("data_dir", "a path in UTF-8", is_path(self.data_dir))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SettingError(
                "device: expected cpu or auto, since torch sees no GPU here, got cuda"
            )
        known = self.rewind in REWINDS or _STEPS.fullmatch(self.rewind)
        self._expect("rewind", "init, weights, or a step of round 0, as in 500it or 1ep", known)
        if self.reinit and self.rewind != "init":
            raise SettingError(f"reinit: expected rewind init beside it, got rewind {self.rewind}")
        for name in ("blocksize", "export_blocksize"):
            if (blocksize := getattr(self, name)) is not None:
                self._expect(name, "two sizes of at least 1", min(blocksize) >= 1)
        self._expect("quantize", "int8", self.quantize in (None, "int8"))
        beside = self.quantize is None or self.export_blocksize is not None
        self._expect("quantize", "--export-sparse beside it", beside)
        self._check_blocks()

    def _check_blocks(self) -> None:
        """Blocks fit a layer, and pruning leaves some and removes some."""
        model = MODELS[self.model].fresh()
        shapes = [m.weight.flatten(1).shape for m in weight_layers(model).values()]
        largest = "x".join(map(str, max(shapes, key=math.prod)))

        def fitted(R: int, C: int) -> list[torch.Size]:
            """The layers that a block fits into."""
            return [shape for shape in shapes if shape[0] >= R and shape[1] >= C]

        expected = f"blocks that fit a layer, the largest of which is {largest}"
        self._expect("blocksize", expected, bool(fitted(*self.blocksize)))
        self._expect("prune_pc", "to prune at least one weight", self.prune_pc > 1e-12)
        try:
            masks = self.search(model).masks
        except ValueError as error:
            what = f"blocks of {self.blocksize[0]}x{self.blocksize[1]} and prune_pc"
            raise SettingError(f"prune_pc: expected {what} that fit: {error}") from error
        blocks = sum(mask.numel() for mask in masks.values()) / math.prod(self.blocksize)
        pruned = self.prune_pc * blocks
        possible = pruned >= 0.5 and blocks - pruned >= 0.5
        expected = f"to prune, and to leave, at least one of the {blocks:.0f} blocks"
        self._expect("prune_pc", expected, possible)
        if self.export_blocksize:
            size = math.prod(self.export_blocksize)
            smaller = any(size < shape.numel() for shape in fitted(*self.export_blocksize))
            expected = f"blocks smaller than a layer, the largest of which is {largest}"
            self._expect("export_blocksize", expected, smaller)

    def per_epoch(self, images: int) -> int:
        """The steps of an epoch on so many training images."""
        return math.ceil(images / self.bs)

    def _epochs(self, images: int) -> int:
        return self.epochs or max(EPOCHS, math.ceil(STEPS / self.per_epoch(images)))

    def steps(self, images: int) -> int:
        """Those of a round from θ₀ on."""
        return self.iterations or self._epochs(images) * self.per_epoch(images)

    def steps_between(self, images: int) -> int:
        """From one evaluation of a round to the next."""
        epochs = 1 if self.epochs else math.ceil(self._epochs(images) / EPOCHS)
        return self.every or epochs * self.per_epoch(images)

    def rewind_step(self, images: int) -> int:
        """The step at which later rounds begin; SettingError if a round ends there."""
        late, step, total = _STEPS.fullmatch(self.rewind), 0, self.steps(images)
        if late:
            count, unit = late.groups()
            step = int(count) * (self.per_epoch(images) if unit == "ep" else 1)
        self._expect("rewind", f"a step before the end of a round, {total} steps", step < total)
        return step

    def _expect(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            got = reprlib.repr(getattr(self, name)).strip("'")
            raise SettingError(f"{name}: expected {expected}, got {got}")

    @property
    def rounds(self) -> int:
        """How many follow the dense round 0."""
        return 1 if self.one_shot else self.prune_rounds

    @property
    def rate(self) -> float:
        """The fraction of the weights still alive that one round prunes."""
        return 1 - (1 - self.prune_pc) ** (1 / self.prune_rounds)

    def search(
        self, model: nn.Module, levels: tuple[int, ...] | None = None, rewind: str | None = None
    ) -> Search:
        """The library's search of this model of the registry, before its first round.

        Layerwise, the output layer is pruned at half the rate, as in the paper. The lasso is left
        to who trains it. rewind: by default that of these settings.
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
            rewind=rewind or ("weights" if self.rewind == "weights" else "init"),
        )

    def search_settings(self) -> dict:
        """What a ticket says of its run, as JSON holds it: everything but where the data lay."""
        return {name: value for name, value in asdict(self).items() if name != "data_dir"}

    @classmethod
    def from_dict(cls, settings: dict) -> "RunConfig":
        """The inverse of dataclasses.asdict, JSON's lists made tuples again.

        Raises SettingError, whatever JSON it gets, unless these are the settings of a run.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(settings, dict) or not settings.keys() <= known:
            raise SettingError(
                f"expected the settings of a run, {', '.join(sorted(known))}, "
                f"got {reprlib.repr(settings)}"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


_KINDS = {
    int: "a whole number of 64 bits",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "two whole numbers",
    NoneType: "nothing",
}


def describe_type(kind: type) -> str:
    """The type of a setting in words."""
    if isinstance(kind, UnionType):
        return " or ".join(map(describe_type, get_args(kind)))
    return _KINDS[get_origin(kind) or kind]


def is_a(value: object, kind: type) -> bool:
    """Whether a setting's value has this type exactly: a bool is no int, an int fits 64 bits."""
    if isinstance(kind, UnionType):
        return any(is_a(value, part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return type(value) is tuple and len(value) == len(parts) and all(map(is_a, value, parts))
    if type(value) is int and kind in (int, float):
        return abs(value) < 2**63
    return type(value) is kind


def is_path(text: str) -> bool:
    """Whether the files that we write can hold this path."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
