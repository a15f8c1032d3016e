"""The table of block tickets, and the picture of their accuracy against their latency."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..program.means import Mean
from . import results
from .blocks import DENSE, Recipe, read_rows
from .figures import plain_numbers

BELOW = 2.0  # points under the dense network, where the picture ends
COLOURS = (  # Okabe and Ito's, and two more
    *("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#7f7f7f", "#8c564b"),
)


class Line(NamedTuple):
    """A recipe's results: percent of weights that are left, on the average, and of test accuracy,
    and the same less that of the first recipe of its density, seed by seed."""

    recipe: Recipe
    seeds: int
    kept: float
    accuracy: Mean
    difference: Mean | None


def compare(rows: Sequence[dict], recipes: Sequence[Recipe]) -> Iterator[Line]:
    """Of each recipe that has results, the densest first."""
    found, kept = defaultdict(dict), defaultdict(list)
    for row in rows:
        found[row["recipe"]][row["seed"]] = 100 * row["test_accuracy"]
        kept[row["recipe"]].append(100 * row["kept"])
    for recipe in sorted(recipes, key=lambda recipe: -recipe.density):
        first = next(other for other in recipes if other.density == recipe.density)
        own, others = found[recipe.name], found[first.name]
        differences = [own[seed] - others[seed] for seed in own if seed in others]
        beside = recipe is not first and differences
        if own:
            values = fmean(kept[recipe.name]), Mean.of([*own.values()])
            yield Line(recipe, len(own), *values, Mean.of(differences) if beside else None)


def report(folder: Path, recipes: Sequence[Recipe], dataset: str) -> None:
    """Prints the table; draws the accuracy of tickets spread by ERK against their latency."""
    rows = [row for row in read_rows(folder / "blocks.csv") if row["dataset"] == dataset]
    times = {
        row["recipe"]: row
        for row in results.read_rows(folder / "latency.csv", ("recipe", *results.TIMES))
    }
    lines = [*compare(rows, recipes)]
    table = Table(title="Test accuracy of tickets in %, mean and 95 % interval", box=None)
    for name in (
        *("blocks", "density", "kept", "training", "seeds", "accuracy", "minus the first"),
        *("µs for an image", "over dense"),
    ):
        table.add_column(name)
    for line in lines:
        recipe, time = line.recipe, times[line.recipe.name]
        table.add_row(
            *(recipe.shape, f"{100 * recipe.density:g} %", f"{line.kept:.1f} %"),
            *(recipe.text, str(line.seeds)),
            line.accuracy.text(".2f"),
            "" if line.difference is None else line.difference.text(".2f", sign="+"),
            *(f"{time['latency_us']:.1f}", f"{time['speedup']:.2f}x"),
        )
    Console().print(table)
    plain = [100 * row["dense_accuracy"] for row in rows if row["recipe"] == recipes[0].name]
    path = folder / "blocks.png"
    spread = [line for line in lines if line.recipe.settings.get("scope") == "erk"]
    draw(spread, times, Mean.of(plain)).savefig(path, dpi=120, metadata={"Software": None})
    print(f"picture: {path}")


def draw(lines: Sequence[Line], times: Mapping[str, dict], dense: Mean) -> Figure:
    """Accuracy against latency: a line for each way to a ticket, from one density to the next. It
    says which tickets it leaves out: those far below the dense network."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ways = defaultdict(list)
    for line in lines:
        ways[line.recipe.shape, line.recipe.text].append(line)
    for n, ((shape, text), members) in enumerate(ways.items()):
        points = [(times[line.recipe.name]["latency_us"], line.accuracy) for line in members]
        _errorbar(axes, points, f"{shape}, {text}", COLOURS[n % len(COLOURS)])
    _errorbar(axes, [(times[DENSE]["latency_us"], dense)], "dense", "#000000")
    floor = dense.value - BELOW
    left_out = [
        f"{line.recipe.shape} at {100 * line.recipe.density:g} %"
        for line in lines
        if line.accuracy.value < floor
    ]
    if left_out:
        axes.set_title(f"not shown, below {floor:.1f} %: {', '.join(left_out)}", fontsize="small")
    axes.set_ylim(bottom=floor, top=min(100, axes.get_ylim()[1]))
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel("latency at batch 1 (µs, log scale)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(color="#dddddd", linewidth=0.6)
    figure.legend(frameon=False, fontsize="small", loc="outside right upper")
    return figure


def _errorbar(axes: Axes, points: Sequence[tuple[float, Mean]], label: str, colour: str) -> None:
    x, y = zip(*points, strict=True)
    halves = [mean.half or 0 for mean in y]
    values = [mean.value for mean in y]
    axes.errorbar(x, values, halves, color=colour, label=label, marker="o", markersize=4, capsize=2)
