"""The files of results: a row for each evaluation, and a row for each network that was timed.

Read back, they are the networks that were trained.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .. import files

TIMES = ("latency_us", "latency_p20_us", "latency_p80_us", "speedup")
MACHINE = ("device", "threads", "backend")
_TEXT = ("method", "model", "blocksize", "device", "backend", "dataset", "recipe")
NETWORK = ("method", "model", "blocksize", "round")


class ResultsError(ValueError):
    """A file or folder does not hold the results that it should; the message says what it does."""


Row = dict  # a value by column, None where the CSV has nothing
Training = list[Row]  # of one network, by iteration


def write(rows: Sequence[Row], path: Path) -> None:
    """One tidy CSV, whole at any moment."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write(path, text.getvalue())


def read(folder: Path) -> list[Training]:
    """Every network's training, from results.csv; the last row of each replicate 0 has TIMES and
    MACHINE too, None where latency.csv has none. ResultsError unless the files hold results."""
    path = folder / "results.csv"
    trainings = defaultdict(list)
    for row in read_rows(path, (*NETWORK, "replicate", "iteration")):
        trainings[(*_network(row), row["replicate"])].append(row)
    if not trainings:
        raise ResultsError(f"expected a results file, got {path}: it has no rows")
    for rows in trainings.values():
        rows.sort(key=lambda row: row["iteration"])
        rows[-1] |= dict.fromkeys((*TIMES, *MACHINE))
    path = folder / "latency.csv"
    for row in read_rows(path, (*NETWORK, *TIMES, *MACHINE)) if path.exists() else ():
        if rows := trainings.get((*_network(row), 0)):
            rows[-1] |= row
    return [*trainings.values()]


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Of a CSV that has these columns, and maybe more; ResultsError if it is none."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [
                {name: _value(name, text) for name, text in row.items()}
                for row in csv.DictReader(file)
            ]
    except (OSError, TypeError, ValueError) as error:
        raise ResultsError(f"expected a results file, got {path}: {error}") from error
    if rows and (missing := {*columns} - rows[0].keys()):
        raise ResultsError(f"expected columns {sorted(missing)} in {path}, got {[*rows[0]]}")
    return rows


def _network(row: Row) -> tuple:
    return tuple(row[name] for name in NETWORK)


def _value(name: str, text: str) -> str | float | None:
    if name in _TEXT or not text:
        return text or None
    return float(text)


def early_stop(training: Training) -> Row:
    """The evaluation of least validation loss, of equal ones the first."""
    return min(training, key=lambda row: row["validation_loss"])


def select(trainings: list[Training], **columns) -> list[list[Training]]:
    """The replicates of every network with these values, the densest network first.

    -> for each (model, blocksize, round) its trainings, by replicate
    """
    networks = defaultdict(list)
    for training in trainings:
        row = training[0]
        if all(row[name] == value for name, value in columns.items()):
            networks[row["model"], row["blocksize"], row["round"]].append(training)
    replicated = [
        sorted(n, key=lambda training: training[0]["replicate"]) for n in networks.values()
    ]
    return sorted(replicated, key=lambda network: -network[0][0]["density"])
