"""Run: a finished run, read back from its folder; the report is drawn from it alone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import FormatError, parse_json
from ..ticket import Ticket
from .config import RunConfig
from .flags import flags_of
from .folder import load_config, resume_command, ticket_path
from .lottery import expect_history
from .tickets import load_ticket

SHOWN = 9  # rounds at most in a picture, the dense one among them
SUMMARY = {"device", "threads", "density", "images", "confusion", "mean_image", "layers", "rows"}


@dataclass(frozen=True)
class Run:
    """history: a record for every epoch; summary: of `measure`; tickets: of the rounds to show.

    config has a CPU as its device, so that it can be read anywhere.
    """

    folder: Path
    config: RunConfig
    history: list[dict]
    summary: dict
    tickets: list[Ticket]

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """SettingError where no run is in the folder, FormatError where one is not whole."""
        config = load_config(folder, "report", device="cpu")
        path = folder / "metrics.jsonl"
        try:
            *history, summary = map(parse_json, path.read_text("utf-8").splitlines())
            if not summary.keys() >= SUMMARY:
                raise FormatError(
                    f"expected a summary at its end; to finish the run: {resume_command(folder)}"
                )
            expect_history(history)
        except (OSError, ValueError) as error:
            raise FormatError(f"{path}: expected the metrics of a finished run: {error}") from error
        return cls(folder, config, history, summary, load_tickets(folder, config.rounds))

    @property
    def ticket(self) -> Ticket:
        return self.tickets[-1]

    @property
    def rounds(self) -> tuple[dict, ...]:
        """The last record of every round."""
        return self.ticket.rounds

    @property
    def flags(self) -> dict[str, str]:
        """What was set, as flags."""
        return {**flags_of(self.config), "--device": self.ticket.settings["device"]}


def load_tickets(folder: Path, rounds: int) -> list[Ticket]:
    """The tickets of at most SHOWN rounds, the dense network's first and the last round's last."""
    shown = np.linspace(0, rounds, min(rounds + 1, SHOWN)).round().astype(int)
    return [load_ticket(ticket_path(folder, round)) for round in shown]
