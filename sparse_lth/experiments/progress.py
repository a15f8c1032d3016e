"""How far the chains are, as their files show: a line for each network, a bar, the time left."""

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..program.lottery import State
from ..program.progress import Console
from .chains import ROW, Chain, chain_path
from .results import Training, early_stop


class Watch:
    """Prints what `update` finds in the folder; on a terminal above a bar, as a context."""

    def __init__(self, chains: Sequence[Chain], folder: Path):
        self.chains, self.folder, self.console = chains, folder, Console()
        self.total = sum(len(chain.networks) for chain in chains)
        self.seen, self.files = set(), {}  # networks; by chain, when its file was written
        for _ in self._new():
            pass  # trained by an earlier run
        self.before, self.began = len(self.seen), time.monotonic()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("networks"), TimeRemainingColumn())
        terminal = self.console.is_terminal
        self.bar = Progress(
            *columns, console=self.console, disable=not terminal, speed_estimate_period=3600
        )
        self.task = self.bar.add_task("", total=self.total, completed=self.before)

    def __enter__(self) -> "Watch":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self) -> None:
        for rows in self._new():
            done = len(self.seen)
            seconds = (time.monotonic() - self.began) / (done - self.before) * (self.total - done)
            left = timedelta(seconds=round(seconds))
            self.bar.update(self.task, completed=done)
            self.say(f"{done} of {self.total}, {left} left: {describe(rows)}")

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _new(self) -> Iterator[Training]:
        """The trainings that were not there before, each added to `seen` as it comes."""
        for chain in self.chains:
            path = chain_path(self.folder, chain)
            written = path.stat().st_mtime_ns if path.exists() else None
            if written == self.files.get(chain):
                continue
            self.files[chain] = written
            wanted = {(method, level) for method, *_, level in chain.networks}
            trainings = {}
            for row in State.load(path, ROW).history:
                if (row["method"], row["round"]) in wanted:
                    trainings.setdefault((chain, row["method"], row["round"]), []).append(row)
            for network, rows in trainings.items():
                if network not in self.seen:
                    self.seen.add(network)
                    yield rows


def describe(rows: Training) -> str:
    """One line of a network."""
    early, last = early_stop(rows), rows[-1]
    model = last["model"].removeprefix("lenet-")
    return (
        f"{last['method']}, {model}, {last['blocksize']}, replicate {last['replicate']}, "
        f"round {last['round']} ({last['density']:.1%}): early stop at {early['iteration']} with "
        f"{early['test_accuracy']:.2%}, {last['test_accuracy']:.2%} at the end"
    )
