"""Several runs side by side: those that differ in their seed alone as a mean and its interval."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.text import Text

from ..files import write
from .charts import Axis, Chart, Series, linear, logarithmic
from .findings import context, headline, percent, quantity
from .flags import command_of, plain
from .means import Mean
from .pages import render
from .report import print_table
from .results import Run

COLOURS = ("--test", "--validation", "--good", "--bad", "--ink", "--soft")


@dataclass(frozen=True)
class Group:
    """name: the settings in which its runs differ from those of other groups"""

    name: str
    runs: Sequence[Run]

    def gain(self, batch: int) -> Mean | None:
        """How many times as fast as the best dense network; None where that was not measured."""
        rows = [
            row for run in self.runs for row in run.summary["rows"] if row.get("batch") == batch
        ]
        return Mean.of([row["gain"] for row in rows]) if len(rows) == len(self.runs) else None

    def accuracy(self, round: int) -> Mean:
        """Of the test, in percent, after this round; -1 is the last."""
        return Mean.of([100 * run.rounds[round]["test_accuracy"] for run in self.runs])

    @property
    def row(self) -> tuple[str, ...]:
        gains = [self.gain(batch) for batch in (1, 64, 1024)]
        return (
            self.name,
            str(len(self.runs)),
            percent(self.runs[0].summary["density"]),
            self.accuracy(0).text(".2f", " %"),
            self.accuracy(-1).text(".2f", " %"),
            *(gain.text(".2f", "x") if gain else "not timed" for gain in gains),
        )


HEADER = (
    "runs with",
    "seeds",
    "density",
    "dense accuracy",
    "pruned accuracy",
    *(f"batch {batch}" for batch in (1, 64, 1024)),
)


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """The runs by their settings but for the seed, in the order in which they came."""
    groups = {}
    for run in runs:
        settings = {**run.ticket.settings, "seed": None}
        if settings["export_blocksize"] == settings["blocksize"]:
            settings["export_blocksize"] = "in the same blocks"
        groups.setdefault(json.dumps(settings), (settings, []))[1].append(run)
    every = [settings for settings, _ in groups.values()]
    differing = [name for name in every[0] if any(s[name] != every[0][name] for s in every)]
    return [
        Group(", ".join(f"{n} {plain(s[n])}" for n in differing) or "the same settings", members)
        for s, members in groups.values()
    ]


def print_comparison(console: Console, runs: Sequence[Run]) -> None:
    groups = groups_of(runs)
    print_table(console, "Runs side by side", HEADER, [group.row for group in groups])
    console.print(Text(conclusion(groups)), highlight=False, soft_wrap=True)


def write_comparison(path: Path, runs: Sequence[Run]) -> None:
    """One HTML file that needs nothing else."""
    groups = groups_of(runs)
    page = render(
        "program/comparison.html",
        title="Runs side by side",
        kicker=f"{len(runs)} runs side by side",
        headline=conclusion(groups),
        context="; ".join(dict.fromkeys(context(r.summary, r.config.dataset) for r in runs)),
        header=HEADER,
        rows=[group.row for group in groups],
        accuracy=_accuracy_chart(groups),
        latency=_latency_chart(groups),
        runs=[(run.folder, headline(run.summary), command_of(run.flags)) for run in runs],
    )
    write(path, page)


def conclusion(groups: Sequence[Group]) -> str:
    """One sentence, or two."""
    best = max(groups, key=lambda group: group.accuracy(-1).value)
    timed = [group for group in groups if group.gain(1)]
    fastest = max(timed, key=lambda group: group.gain(1).value, default=None)
    accuracy = f"{best.accuracy(-1).text('.2f', ' %')} against {best.accuracy(0).text('.2f', ' %')}"
    speed = (
        f"{fastest.gain(1).text('.2f', 'x')} as fast as the best dense" if fastest else "not timed"
    )
    if len(groups) == 1:
        return f"{len(best.runs)} seeds: {accuracy} dense, and at batch 1 {speed}."
    text = f"Most accurate: {best.name}, with {accuracy} dense."
    return f"{text} Fastest at batch 1: {fastest.name}, {speed}." if fastest else text


def _series(
    name: str, n: int, points: Sequence[tuple[float, Mean, str]], unit: str = " %"
) -> Series:
    """points: (x, mean of y, what it is)"""
    spans = [(x, y.value - y.half, y.value + y.half) for x, y, _ in points if y.half is not None]
    shown = [(x, y.value, f"{text}: {y.text('.2f', unit)}") for x, y, text in points]
    return Series(name, shown, f"color: var({COLOURS[n % len(COLOURS)]})", spans=spans)


def _around(series: Sequence[Series]) -> Axis:
    values = [y for one in series for _, y, _ in one.points]
    values += [y for one in series for span in one.spans for y in span[1:]]
    return linear("test accuracy (%)", values, least=1.0)


def _accuracy_chart(groups: Sequence[Group]) -> Chart:
    """Test accuracy against density on a log axis, dense on the left."""
    series = []
    for n, group in enumerate(groups):
        points = []
        for round, record in enumerate(group.runs[0].rounds):
            text = f"{group.name}, {percent(record['density'])}"
            points.append((100 * record["density"], group.accuracy(round), text))
        series.append(_series(group.name, n, points))
    x = logarithmic("", [x for one in series for x, _, _ in one.points])
    axis = Axis("density (% of weights kept, log scale)", x.high, x.low, x.ticks, log=True)
    return Chart("Test accuracy against density", axis, _around(series), series)


def _latency_chart(groups: Sequence[Group]) -> Chart | None:
    """Test accuracy against latency at batch 1, of the pruned networks and the dense ones."""
    series = []
    for n, group in enumerate(groups):
        rows = [row for run in group.runs for row in run.summary["rows"] if row.get("batch") == 1]
        if len(rows) < len(group.runs):
            continue
        points = []
        for kind, round in (("dense", 0), ("pruned", -1)):
            time = mean(row[kind] for row in rows)
            text = f"{group.name}, {kind}, {quantity(time, 'µs')}"
            points.append((time, group.accuracy(round), text))
        series.append(_series(group.name, n, points))
    if not series:
        return None
    times = [x for one in series for x, _, _ in one.points]
    x = logarithmic("latency at batch 1 (µs, log scale)", times)
    return Chart("Test accuracy against latency", x, _around(series), series)
