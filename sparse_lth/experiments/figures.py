"""The paper's figures, drawn from the results alone; a network that was not trained is left out.

Points are means over the replicates, bars reach from the least of them to the greatest.
"""

from collections.abc import Callable, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .measures import (
    EARLY_ACCURACY,
    EARLY_ITERATION,
    EARLY_TRAIN_ACCURACY,
    END_ACCURACY,
    END_TRAIN_ACCURACY,
    START_ACCURACY,
    Measure,
)
from .results import Training, select

COLOURS = {  # Okabe and Ito's: distinct to the colour-blind too
    "winning ticket": "#0072b2",
    "random reinit": "#d55e00",
    "random mask": "#7f7f7f",
    "one-shot": "#009e73",
    "late rewinding": "#cc79a7",
    "learning-rate rewinding": "#56b4e9",
    "fine-tuning": "#e69f00",
    "continued training": "#009e73",
    "reinit from the ticket": "#e69f00",
    "pruned before training": "#000000",
    "noise of 0.5 std": "#56b4e9",
    "noise of 3 std": "#cc79a7",
    "1x1": "#0072b2",
    "16x1": "#009e73",
    "16x4": "#e69f00",
    "16x16": "#d55e00",
    "dense": "#000000",
}
TICKET = {"method": "winning ticket", "blocksize": "1x1"}


def curves(trainings: list[Training]) -> Figure:
    """Test accuracy against iteration: tickets of several P_m; one beside its controls."""
    figure, (left, right) = _panels(2)
    for round, colour in ((0, "#000000"), (3, "#56b4e9"), (7, "#0072b2"), (15, "#d55e00")):
        for network in select(trainings, **TICKET, round=round):
            _curve(left, network, f"{100 * network[0][0]['density']:.1f} %", colour)
    for method in ("winning ticket", "random reinit", "random mask"):
        for network in select(trainings, method=method, blocksize="1x1", round=7):
            _curve(right, network, method, COLOURS[method])
    for axes, title in ((left, "winning tickets"), (right, "at 21.1 %")):
        _label(axes, title, "iteration", "test accuracy (%)")
        _from_top(axes, 4)
    return figure


def methods(*names: str) -> Callable[[list[Training]], Figure]:
    """Early-stop iteration, test accuracy there and at the end against P_m, for these methods."""

    def draw(trainings: list[Training]) -> Figure:
        figure, panels = _panels(3)
        measures = {
            "early-stop iteration": EARLY_ITERATION,
            "test accuracy at early stop (%)": EARLY_ACCURACY,
            "test accuracy at the end (%)": END_ACCURACY,
        }
        for axes, (label, measure) in zip(panels, measures.items(), strict=True):
            for name in names:
                networks = select(trainings, method=name, blocksize="1x1")
                _against_density(axes, networks, measure, name)
            _label(axes, "", "weights kept (%)", label)
        return figure

    return draw


def training_accuracy(trainings: list[Training]) -> Figure:
    """Training accuracy at the early stop and at the end against P_m."""
    figure, panels = _panels(2)
    for axes, where, measure in zip(
        panels, ("early stop", "the end"), (EARLY_TRAIN_ACCURACY, END_TRAIN_ACCURACY), strict=True
    ):
        for name in ("winning ticket", "random reinit", "random mask"):
            networks = select(trainings, method=name, blocksize="1x1")
            _against_density(axes, networks, measure, name)
        _label(axes, "", "weights kept (%)", f"training accuracy at {where} (%)")
    return figure


def untrained(trainings: list[Training]) -> Figure:
    """Test accuracy of mask and weights alone, before any training, against P_m."""
    figure, (axes,) = _panels(1)
    for name in ("winning ticket", "late rewinding", "random reinit", "random mask"):
        networks = select(trainings, method=name, blocksize="1x1")
        _against_density(axes, networks, START_ACCURACY, name)
    axes.axhline(10, color="#999999", linewidth=0.8, linestyle=":")
    _label(axes, "before any training", "weights kept (%)", "test accuracy (%)")
    return figure


def blocks(trainings: list[Training]) -> Figure:
    """Accuracy against density by blocksize, and the speedup over dense on a second axis."""
    figure, (axes,) = _panels(1, width=7)
    speed = axes.twinx()
    for name in ("1x1", "16x1", "16x4", "16x16"):
        networks = select(trainings, method="winning ticket", blocksize=name)
        _against_density(axes, networks, EARLY_ACCURACY, name)
        measured = [n[0][-1] for n in networks if n[0][-1]["speedup"]]
        density = [100 * row["density"] for row in measured]
        speedup = [row["speedup"] for row in measured]
        speed.plot(density, speedup, color=COLOURS[name], linestyle="--", linewidth=1)
    speed.set_ylabel("speedup over dense, batch 1 (dashed)")
    speed.set_yscale("log")
    plain_numbers(speed.yaxis)
    speed.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    _from_top(axes, 6)
    _label(axes, "", "weights kept (%)", "test accuracy at early stop (%)", "lower center")
    return figure


def latency(trainings: list[Training]) -> Figure:
    """Accuracy against measured latency: tickets, and dense networks that are narrower."""
    figure, (axes,) = _panels(1, width=7)
    for name in ("1x1", "16x1", "16x4", "16x16"):
        networks = select(trainings, method="winning ticket", blocksize=name)
        pruned = [network for network in networks if network[0][0]["round"]]
        _against_latency(axes, pruned, f"ticket, {name}", COLOURS[name])
    _against_latency(axes, dense_networks(trainings), "dense, narrower", COLOURS["dense"])
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    _from_top(axes, 6)
    _label(axes, "", "latency at batch 1 (µs, log scale)", "test accuracy at early stop (%)")
    return figure


def dense_networks(trainings: list[Training]) -> list[list[Training]]:
    """The dense network and the narrower ones."""
    dense = select(trainings, method="winning ticket", round=0)
    return dense[:1] + select(trainings, method="dense")


def _panels(count: int, width: float = 4.6) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width * count, 3.6), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _curve(axes: Axes, network: list[Training], label: str, colour: str) -> None:
    """The evaluations that all replicates have: each has its own early stop besides."""
    tested = [
        {r["iteration"]: 100 * r["test_accuracy"] for r in rows if r["test_accuracy"] is not None}
        for rows in network
    ]
    steps = sorted(set.intersection(*(set(t) for t in tested)))
    values = [[t[step] for t in tested] for step in steps]
    axes.plot(steps, [mean(v) for v in values], color=colour, label=label)
    low, high = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def _against_density(
    axes: Axes, networks: list[list[Training]], measure: Measure, label: str
) -> None:
    x = [100 * network[0][0]["density"] for network in networks]
    _bars(axes, x, networks, measure, label, COLOURS[label])
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlim(120, 3)


def _against_latency(axes: Axes, networks: list[list[Training]], label: str, colour: str) -> None:
    measured = [network for network in networks if network[0][-1]["latency_us"]]
    x = [network[0][-1]["latency_us"] for network in measured]
    _bars(axes, x, measured, EARLY_ACCURACY, label, colour)


def _bars(
    axes: Axes,
    x: list[float],
    networks: list[list[Training]],
    measure: Measure,
    label: str,
    colour: str,
) -> None:
    """Means joined by a line, with a bar from the least replicate to the greatest."""
    if not x:
        return  # no entry in the legend for what was not run
    values = [[measure.of(training) for training in network] for network in networks]
    y = [mean(v) for v in values]
    errors = [[m - min(v) for m, v in zip(y, values, strict=True)]]
    errors += [[max(v) - m for m, v in zip(y, values, strict=True)]]
    axes.errorbar(x, y, errors, color=colour, label=label, marker="o", markersize=4, capsize=2)


def _from_top(axes: Axes, points: float) -> None:
    """Shows so many points of accuracy: below are networks that have hardly learned."""
    tops = [max(line.get_ydata()) for line in axes.get_lines() if len(line.get_ydata())]
    if not tops:
        return
    top = max(tops)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, top - points), min(high, top + points / 10))


def plain_numbers(axis) -> None:
    """Numbers as they are said, on a log axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, title: str, x: str, y: str, legend: str = "best") -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small", loc=legend)
