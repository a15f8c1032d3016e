"""Ticket: what a search found in a model; save, load, put it on a fresh model, make it sparse."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import masks as masking
from .convert import sparsify_
from .files import FormatError, TicketError, join_groups, load_tensors, save_tensors, split_prefix
from .masks import Masks
from .sequential import SparseSequential
from .weights import Tensors, read, weight_layers, weight_name, write_

ABOUT = ("rounds", "dense", "settings")  # what a file says of its tensors


@dataclass(frozen=True, repr=False)
class Ticket:
    """A winning ticket: masks with the weights that their training began from, and what they
    trained to.

    init, trained: the model's parameters and buffers by name, on the CPU. init is θ₀ or, after late
        rewinding, θ_k; where nothing was rewound it is what the round before the last trained to.
        trained is exactly 0 where pruned
    masks: bool by layer name, True = kept, of the layers that may be pruned
    dense: why, by name, other linear and convolutional layers stayed dense
    rounds: a record of each round, 0 being dense: round, density, and what was measured
    settings: of the search, as JSON holds them
    """

    init: Tensors
    masks: Masks
    trained: Tensors
    rounds: tuple[dict, ...] = ()
    dense: dict[str, str] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        kept, total = (
            sum(int(f(m)) for m in self.masks.values()) for f in (Tensor.sum, Tensor.numel)
        )
        text = f"{kept:,} of {total:,} weights ({self.density:.2%}) in {len(self.masks)} layers"
        dense = f", {len(self.dense)} layers left dense" if self.dense else ""
        return f"Ticket({text}, {len(self.rounds)} rounds{dense})"

    @property
    def density(self) -> float:
        """Kept / all, of the weights that may be pruned."""
        return masking.density(self.masks)

    @property
    def rewound(self) -> str:
        """What was rewound between the rounds and what was not: what `init` is, in words."""
        rewind, lasso = self.settings.get("rewind"), self.settings.get("block_lasso")
        if rewind == "weights":
            text = (
                "Nothing was rewound: each round went on from the weights that the round before "
                f"had trained, so that {len(self.rounds)} rounds of training made this network."
            )
        else:
            moment = "when round 0 began" if rewind in ("init", None) else f"at {rewind} of round 0"
            text = f"Rewound before each round: every weight and bias, to what it was {moment}."
        if lasso:
            text += (
                f" A group lasso of {lasso} shrank whole blocks in every round between the dense "
                "one and the last."
            )
        return text

    def apply_(self, model: nn.Module, weights: str = "init") -> nn.Module:
        """Puts the ticket on a fresh model of the same class and returns it, ready to train.

        weights: "init", what the last round began from, or "trained". The masks are those of
        `torch.nn.utils.prune`. Raises ValueError, and leaves the model as it is, where it differs.
        """
        if weights not in ("init", "trained"):
            raise ValueError(f'expected weights "init" or "trained", got {weights!r}')
        own = read(model)
        if any(tensor.is_meta for tensor in own.values()):
            raise ValueError("expected a model with weights, got one on the meta device")
        expect_like("the model's", own, self.init)
        if missing := self.masks.keys() - weight_layers(model).keys():
            raise ValueError(f"expected linear or convolutional layers, got {sorted(missing)}")
        write_(model, getattr(self, weights), self.masks)
        return model

    def sparse_network(
        self, model: nn.Module, blocksize: tuple[int, int] | None = None
    ) -> nn.Module:
        """The trained ticket on a fresh model of the same class, its layers block-sparse.

        blocksize: by default that of the search. An `nn.Sequential` becomes a `SparseSequential`,
        which runs faster.
        """
        blocksize = blocksize or self.settings["blocksize"]
        model = sparsify_(self.apply_(model, "trained"), blocksize, max_density=1.0)
        write_(model, {}, {})  # takes the masks off the layers that stayed dense
        if type(model) is nn.Sequential:
            model = SparseSequential(OrderedDict(model.named_children()))
        return model.eval()

    def save(self, path: str | Path) -> None:
        tensors = join_groups(self, ("init", "masks", "trained"))
        about = {name: getattr(self, name) for name in ABOUT}
        save_tensors(path, "ticket", tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> "Ticket":
        """Raises TicketError, naming what is wrong, unless the file holds a whole ticket."""
        try:
            tensors, about = load_tensors(path, "ticket")
        except (OSError, FormatError) as error:
            raise TicketError(str(error)) from error
        groups = {name: split_prefix(tensors, name) for name in ("init", "masks", "trained")}
        try:
            if about.keys() != {*ABOUT}:
                raise FormatError(f"expected {', '.join(ABOUT)} in the metadata, got {about}")
            if len(tensors) != sum(map(len, groups.values())):
                raise FormatError(f"expected init, masks and trained, got {sorted(tensors)}")
            expect_masked(**groups)
            expect_records(about["rounds"])
            for name in ("dense", "settings"):
                if not isinstance(about[name], dict):
                    raise FormatError(f"expected {name} by name, got {about[name]!r}")
        except FormatError as error:
            raise TicketError(f"{path}: {error}") from error
        return cls(**groups, **{**about, "rounds": tuple(about["rounds"])})


def expect_like(group: str, tensors: Tensors, like: Mapping[str, Tensor]) -> None:
    """Raises FormatError unless both have the same names, shapes and dtypes."""
    if tensors.keys() != like.keys():
        missing, extra = sorted(like.keys() - tensors.keys()), sorted(tensors.keys() - like.keys())
        raise FormatError(
            f"expected {group} tensors to have other names: {missing} missing, {extra} too many"
        )
    for name, tensor in tensors.items():
        expected, got = ((tuple(t.shape), t.dtype) for t in (like[name], tensor))
        if got != expected:
            raise FormatError(
                f"expected {group} {name} of shape {expected[0]} and {expected[1]}, "
                f"got {got[0]}, {got[1]}"
            )


def expect_finite(group: str, tensors: Tensors, like: Mapping[str, Tensor] | None = None) -> None:
    """Raises FormatError for a NaN, or an infinite number where `like` has not got the same.

    Attention masks, for one, are infinite by design.
    """
    for name, tensor in tensors.items():
        designed = like is not None and tensor == like[name]
        if not (tensor.isfinite() | designed).all():
            raise FormatError(f"expected finite numbers in {group} {name}: did training diverge?")


def expect_masked(init: Tensors, masks: Masks, trained: Tensors) -> None:
    """Raises FormatError unless these are of one model, trained being 0 where pruned."""
    expect_like("trained", trained, init)
    expect_finite("init", init, init)
    expect_finite("trained", trained, init)
    if unknown := [name for name in masks if weight_name(name) not in init]:
        raise FormatError(f"expected masks of layers with a weight, got {unknown}")
    weights = {name: init[weight_name(name)] for name in masks}
    like = {n: torch.empty(w.shape, dtype=torch.bool, device="meta") for n, w in weights.items()}
    expect_like("masks", masks, like)
    for name, mask in masks.items():
        if trained[weight_name(name)][~mask].any():
            raise FormatError(f"expected trained {weight_name(name)} to be 0 where pruned")


def expect_records(records: object) -> None:
    """Raises FormatError unless it is a list of dicts with a round and a density each."""
    if not isinstance(records, list) or not records:
        raise FormatError(f"expected a record for every round, got {records!r}")
    for record in records:
        known = isinstance(record, dict)
        round, density = (record.get(n) if known else None for n in ("round", "density"))
        if type(round) is not int or round < 0 or type(density) not in (int, float):
            raise FormatError(f"expected a record with its round and density, got {record!r}")
        if not 0 <= density <= 1:
            raise FormatError(f"expected a density from 0 to 1, got {density}")
