"""The paper's figures, drawn from the results file alone.

Points are means over the replicates, bars reach from the least of them to the greatest.
"""

from collections.abc import Callable, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .results import ResultsError, Training, early_stop, select

COLOURS = {  # Okabe and Ito's: distinct to the colour-blind too
    "winning ticket": "#0072b2",
    "random reinit": "#d55e00",
    "random mask": "#7f7f7f",
    "one-shot": "#009e73",
    "late rewinding": "#cc79a7",
    "learning-rate rewinding": "#56b4e9",
    "fine-tuning": "#e69f00",
    "1x1": "#0072b2",
    "16x1": "#009e73",
    "16x4": "#e69f00",
    "16x16": "#d55e00",
    "dense": "#000000",
}
TICKET = {"method": "winning ticket", "blocksize": "1x1"}
Measure = Callable[[Training], float]


def early_accuracy(training: Training) -> float:
    """Test accuracy at the early stop, in percent."""
    return 100 * early_stop(training)["test_accuracy"]


def early_iteration(training: Training) -> float:
    return early_stop(training)["iteration"]


def start_accuracy(training: Training) -> float:
    """Test accuracy before any training, in percent."""
    return 100 * training[0]["test_accuracy"]


def end_accuracy(training: Training) -> float:
    """Test accuracy after all iterations, in percent."""
    return 100 * training[-1]["test_accuracy"]


def tenth_accuracy(training: Training) -> float:
    """Test accuracy after a tenth of the iterations, or where it is next known, in percent."""
    tenth = training[-1]["iteration"] / 10
    known = (r for r in training if r["iteration"] >= tenth and r["test_accuracy"] is not None)
    return 100 * next(known)["test_accuracy"]


def curves(trainings: list[Training]) -> Figure:
    """Test accuracy against iteration: tickets of several P_m; one beside its controls."""
    figure, (left, right) = _panels(2)
    networks = select(trainings, **TICKET)
    for density, colour in (
        (1, "#000000"),
        (0.513, "#56b4e9"),
        (0.211, "#0072b2"),
        (0.036, "#d55e00"),
    ):
        network = nearest(networks, density)
        _curve(left, network, f"{100 * network[0][0]['density']:.1f} %", colour)
    for method in ("winning ticket", "random reinit", "random mask"):
        network = nearest(select(trainings, method=method, blocksize="1x1"), 0.211)
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
            "early-stop iteration": early_iteration,
            "test accuracy at early stop (%)": early_accuracy,
            "test accuracy at the end (%)": end_accuracy,
        }
        for axes, (label, measure) in zip(panels, measures.items(), strict=True):
            for name in names:
                networks = select(trainings, method=name, blocksize="1x1")
                _against_density(axes, networks, measure, name)
            _label(axes, "", "weights kept (%)", label)
        return figure

    return draw


def untrained(trainings: list[Training]) -> Figure:
    """Test accuracy of mask and weights alone, before any training, against P_m."""
    figure, (axes,) = _panels(1)
    for name in ("winning ticket", "late rewinding", "random reinit", "random mask"):
        networks = select(trainings, method=name, blocksize="1x1")
        _against_density(axes, networks, start_accuracy, name)
    axes.axhline(10, color="#999999", linewidth=0.8, linestyle=":")
    _label(axes, "before any training", "weights kept (%)", "test accuracy (%)")
    return figure


def blocks(trainings: list[Training]) -> Figure:
    """Accuracy against density by blocksize, and the speedup over dense on a second axis."""
    figure, (axes,) = _panels(1, width=7)
    speed = axes.twinx()
    for name in ("1x1", "16x1", "16x4", "16x16"):
        networks = select(trainings, method="winning ticket", blocksize=name)
        _against_density(axes, networks, early_accuracy, name)
        measured = [n[0][-1] for n in networks if n[0][-1]["speedup"]]
        density = [100 * row["density"] for row in measured]
        speedup = [row["speedup"] for row in measured]
        speed.plot(density, speedup, color=COLOURS[name], linestyle="--", linewidth=1)
    speed.set_ylabel("speedup over dense, batch 1 (dashed)")
    speed.set_yscale("log")
    _plain(speed.yaxis)
    speed.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    _from_top(axes, 6)
    _label(axes, "", "weights kept (%)", "test accuracy at early stop (%)", "lower center")
    return figure


def latency(trainings: list[Training]) -> Figure:
    """Accuracy against measured latency: tickets, and dense networks that are narrower."""
    figure, (axes,) = _panels(1, width=7)
    for name in ("1x1", "16x1", "16x4", "16x16"):
        networks = select(trainings, method="winning ticket", blocksize=name)
        _against_latency(axes, networks[1:], f"ticket, {name}", COLOURS[name])
    _against_latency(axes, dense_networks(trainings), "dense, narrower", COLOURS["dense"])
    axes.set_xscale("log")
    _plain(axes.xaxis)
    _from_top(axes, 6)
    _label(axes, "", "latency at batch 1 (µs, log scale)", "test accuracy at early stop (%)")
    return figure


def dense_networks(trainings: list[Training]) -> list[list[Training]]:
    """The dense network and the narrower ones."""
    return select(trainings, **TICKET)[:1] + select(trainings, method="dense")


def nearest(networks: list[list[Training]], density: float) -> list[Training]:
    """The network whose density is nearest to this; ResultsError where there is none."""
    if not networks:
        raise ResultsError("expected results of the whole grid, got none of a network to be drawn")
    return min(networks, key=lambda network: abs(network[0][0]["density"] - density))


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
    _plain(axes.xaxis)
    axes.set_xlim(120, 3)


def _against_latency(axes: Axes, networks: list[list[Training]], label: str, colour: str) -> None:
    measured = [network for network in networks if network[0][-1]["latency_us"]]
    x = [network[0][-1]["latency_us"] for network in measured]
    _bars(axes, x, measured, early_accuracy, label, colour)


def _bars(
    axes: Axes,
    x: list[float],
    networks: list[list[Training]],
    measure: Measure,
    label: str,
    colour: str,
) -> None:
    """Means joined by a line, with a bar from the least replicate to the greatest."""
    values = [[measure(training) for training in network] for network in networks]
    y = [mean(v) for v in values]
    errors = [[m - min(v) for m, v in zip(y, values, strict=True)]]
    errors += [[max(v) - m for m, v in zip(y, values, strict=True)]]
    axes.errorbar(x, y, errors, color=colour, label=label, marker="o", markersize=4, capsize=2)


def _from_top(axes: Axes, points: float) -> None:
    """Shows so many points of accuracy: below are networks that have hardly learned."""
    top = max(max(line.get_ydata()) for line in axes.get_lines())
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, top - points), min(high, top + points / 10))


def _plain(axis) -> None:
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
    axes.legend(frameon=False, fontsize="small", loc=legend)
