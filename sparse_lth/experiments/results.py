"""The results file: a row for each evaluation, read back as the networks that were trained."""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .. import files

_TIMES = ("latency_us", "latency_p20_us", "latency_p80_us", "speedup")
SPEED = (*_TIMES, "device", "threads", "backend")
_TEXT = ("method", "model", "blocksize", "device", "backend")
_NETWORK = ("method", "model", "blocksize", "replicate", "round")


class ResultsError(ValueError):
    """A file or folder does not hold the results that it should; the message says what it does."""


Row = dict  # a value by column, None where the CSV has nothing
Training = list[Row]  # of one network, by iteration


def write(rows: Sequence[Row], path: Path) -> None:
    """One tidy CSV, whole at any moment; SPEED has values in the rows of measured networks."""
    text = io.StringIO()
    columns = dict.fromkeys((*rows[0], *SPEED))
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write(path, text.getvalue())


def read(path: Path) -> list[Training]:
    """Every network's training; ResultsError unless the file holds results."""
    trainings = defaultdict(list)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                row = {name: _value(name, text) for name, text in row.items()}
                trainings[tuple(row[name] for name in _NETWORK)].append(row)
        if not trainings:
            raise ValueError("it has no rows")
        return [sorted(rows, key=lambda row: row["iteration"]) for rows in trainings.values()]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"expected a results file, got {path}: {error}") from error


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
