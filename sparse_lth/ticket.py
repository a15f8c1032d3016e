"""Ticket, what a search found, and the block-sparse model made of it: save, load, convert."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from . import masks as masking
from .files import FormatError, join_groups, load_tensors, save_tensors, split_prefix
from .layers import SparseLinear, sparsify_
from .lottery import State, masked_model
from .masks import weight_layers
from .program.config import RunConfig
from .program.models import MODELS, build
from .sequential import SparseSequential


class TicketError(FormatError):
    """A file holds no whole ticket, or no whole model; the message says what is wrong."""


@dataclass(frozen=True)
class Ticket:
    """A winning ticket: masks with the rewind weights θ₀ they apply to, and what they trained to.

    settings: the RunConfig of the search as a dict, without the place of the data
    init, trained: float32 by parameter name; init is θ_k after late rewinding; trained is exactly
        0 where pruned
    masks: bool by layer name, True = kept
    rounds: a record for each round, 0 being dense: density, validation_accuracy, test_accuracy, ...
    """

    settings: dict
    init: dict[str, Tensor]
    masks: dict[str, Tensor]
    trained: dict[str, Tensor]
    rounds: tuple[dict, ...]

    @property
    def model(self) -> str:
        return self.settings["model"]

    @property
    def dataset(self) -> str:
        return self.settings["dataset"]

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def density(self) -> float:
        return masking.density(self.masks)

    @classmethod
    def from_state(cls, config: RunConfig, state: State) -> "Ticket":
        """The ticket of a round that is trained and tested."""
        rounds = tuple(record for record in state.history if "test_accuracy" in record)
        settings = config.search_settings()
        trained = {name: weight.cpu().clone() for name, weight in state.weights.items()}
        return cls(settings, state.init, state.masks, trained, rounds)

    def network(self, weights: str = "trained") -> nn.Module:
        """The network under the masks of torch's prune; weights: "trained" or "init" (θ₀)."""
        return masked_model(self.model, getattr(self, weights), self.masks)

    def dense_network(self) -> nn.Module:
        """The trained network in plain dense layers, its pruned weights zeros."""
        return _make_permanent(self.network()).eval()

    def sparse_network(self, blocksize: tuple[int, int]) -> SparseSequential:
        """The trained network with every linear layer that has an empty block made sparse."""
        network = _make_permanent(sparsify_(self.network(), blocksize))
        return SparseSequential(OrderedDict(network.named_children())).eval()

    def save(self, path: str | Path) -> None:
        tensors = join_groups(self, ("init", "masks", "trained"))
        save_tensors(path, "ticket", tensors, {"settings": self.settings, "rounds": self.rounds})

    @classmethod
    def load(cls, path: str | Path) -> "Ticket":
        """Raises TicketError, naming what is wrong, unless the file holds a whole ticket."""
        tensors, about = _load(path, "ticket", ("settings", "rounds"))
        settings, rounds = about["settings"], about["rounds"]
        try:  # whether there is a GPU here does not matter to a ticket
            known = RunConfig.from_dict({**settings, "device": "cpu"}).search_settings()
        except (TypeError, ValueError) as error:
            raise TicketError(f"{path}: expected the settings of a run: {error}") from error
        if settings.keys() != known.keys():
            raise TicketError(f"{path}: expected settings {sorted(known)}, got {sorted(settings)}")
        try:
            tested = [float(record["test_accuracy"]) for record in rounds]
        except (KeyError, TypeError, ValueError):
            tested = []
        if not tested:
            raise TicketError(f"{path}: expected a test_accuracy for every round, got {rounds}")
        model = build(settings["model"])
        init, masks, trained = (split_prefix(tensors, n) for n in ("init", "masks", "trained"))
        parameters = dict(model.named_parameters())
        weights = {name: layer.weight for name, layer in weight_layers(model).items()}
        if len(tensors) != len(init) + len(masks) + len(trained):
            raise TicketError(f"{path}: expected init, masks and trained, got {sorted(tensors)}")
        _expect_like(path, "init", init, parameters)
        _expect_like(path, "trained", trained, parameters)
        _expect_like(path, "masks", masks, weights, torch.bool)
        for name, mask in masks.items():
            if trained[f"{name}.weight"][~mask].any():
                raise TicketError(f"{path}: expected trained.{name}.weight to be 0 where pruned")
        return cls(settings, init, masks, trained, tuple(rounds))


def save_sparse(path: str | Path, network: nn.Module, ticket: Ticket) -> None:
    """Writes what `load_sparse` reads: the tensors of a `Ticket.sparse_network`, and its layers."""
    layers = [name for name, m in network.named_modules() if isinstance(m, SparseLinear)]
    about = {"model": ticket.model, "dataset": ticket.dataset, "layers": layers}
    save_tensors(path, "model", network.state_dict(), about)


def load_sparse(path: str | Path) -> SparseSequential:
    """The model of `--export-sparse`, ready to call: (batch, 1, 28, 28) images -> (batch, 10).

    Images are normalised as `sparse_lth.data` does: (pixel / 255 - 0.1307) / 0.3081.
    Raises TicketError, naming what is wrong, unless the file holds a whole model.
    """
    tensors, about = _load(path, "model", ("model", "layers"))
    if about["model"] not in (*MODELS,) or not isinstance(about["layers"], list):
        raise TicketError(
            f"{path}: expected a model of {', '.join(MODELS)} and a list of layers, "
            f"got {about['model']!r} and {about['layers']!r}"
        )
    network = SparseSequential(OrderedDict(build(about["model"]).named_children()))
    for name in about["layers"]:
        dense = dict(network.named_modules()).get(name) if isinstance(name, str) else None
        if not isinstance(dense, nn.Linear):
            raise TicketError(f"{path}: expected the name of a linear layer, got {name!r}")
        part = split_prefix(tensors, name)
        try:
            layer = SparseLinear.from_blocks(dense.in_features, dense.out_features, **part)
            if layer.bias is None:
                raise ValueError("expected a bias, got none")
        except (TypeError, ValueError) as error:
            raise TicketError(f"{path}: {name}: {error}") from error
        setattr(network, name, layer)
    _expect_like(path, "model", tensors, network.state_dict())
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def _make_permanent(network: nn.Module) -> nn.Module:
    """Takes torch's prune out of the network and leaves its zeros in the weights."""
    for layer in weight_layers(network).values():
        if prune.is_pruned(layer):
            prune.remove(layer, "weight")
    return network


def _load(path: str | Path, kind: str, keys: tuple[str, ...]) -> tuple[dict[str, Tensor], dict]:
    try:
        tensors, about = load_tensors(path, kind)
    except (OSError, FormatError) as error:
        raise TicketError(str(error)) from error
    for key in keys:
        if not isinstance(about, dict) or key not in about:
            raise TicketError(f"{path}: expected {key!r} in the metadata, got {about}")
    return tensors, about


def _expect_like(
    path: str | Path,
    group: str,
    tensors: dict[str, Tensor],
    like: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """The same names and shapes, this dtype but for int32 indices, and finite numbers."""
    if tensors.keys() != like.keys():
        raise TicketError(f"{path}: expected {group} tensors {sorted(like)}, got {sorted(tensors)}")
    for name, tensor in tensors.items():
        expected = like[name].shape, torch.int32 if name.endswith("_indices") else dtype
        if (tensor.shape, tensor.dtype) != expected:
            raise TicketError(
                f"{path}: expected {group} {name} of shape {tuple(expected[0])} and {expected[1]}, "
                f"got {tuple(tensor.shape)}, {tensor.dtype}"
            )
        if not tensor.isfinite().all():
            raise TicketError(f"{path}: expected finite numbers in {group} {name}")
