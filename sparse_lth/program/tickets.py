"""Tickets of the models of the registry: their settings are those of a run."""

from pathlib import Path

from torch import nn

from ..files import FormatError
from ..ticket import Ticket, TicketError
from ..weights import prunable, write_
from .lottery import CONTROL, State, expect_of_run, run_config
from .models import MODELS


def make_ticket(state: State) -> Ticket:
    """The ticket of a round that is trained and tested; its rounds tell of their controls, too."""
    rounds, control = [], {}
    for record in state.history:
        if "control" in record:
            accuracies = ("validation_accuracy", "test_accuracy")
            control = {f"{CONTROL}_{name}": record.get(name) for name in accuracies}
        elif "test_accuracy" in record:
            rounds.append(record | control)
            control = {}
    trained = {name: weight.cpu().clone() for name, weight in state.weights.items()}
    model = MODELS[state.settings["model"]].empty()
    dense = prunable(model, state.settings["blocksize"]).dense
    return Ticket(state.init, state.masks, trained, tuple(rounds), dense, state.settings)


def load_ticket(path: str | Path) -> Ticket:
    """Raises TicketError, naming what is wrong, unless the file holds the ticket of a run."""
    ticket = Ticket.load(path)
    try:
        expect_of_run(run_config(ticket.settings), ticket.init, ticket.masks)
        for record in ticket.rounds:
            for name in ("validation_accuracy", "test_accuracy"):
                if not isinstance(record.get(name), float):
                    raise FormatError(f"expected a {name} for every round, got {record}")
    except ValueError as error:
        raise TicketError(f"{path}: {error}") from error
    return ticket


def network(ticket: Ticket, weights: str = "trained") -> nn.Module:
    """The network under the masks of torch's prune; weights: "trained" or "init"."""
    return ticket.apply_(_fresh(ticket), weights)


def dense_network(ticket: Ticket) -> nn.Module:
    """The trained network in plain dense layers, its pruned weights zeros."""
    model = network(ticket)
    write_(model, {}, {})
    return model.eval()


def sparse_network(ticket: Ticket, blocksize: tuple[int, int]) -> nn.Module:
    """The trained network with every linear layer that has an empty block made sparse."""
    return ticket.sparse_network(_fresh(ticket), blocksize)


def _fresh(ticket: Ticket) -> nn.Module:
    return MODELS[ticket.settings["model"]].fresh()
