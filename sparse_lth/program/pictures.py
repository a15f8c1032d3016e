"""The pictures of a report, as data: charts, tables of colours, and images of weights."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from .charts import Axis, Chart, Series, linear, logarithmic
from .findings import percent, quantity
from .lottery import CONTROL
from .pages import png
from .results import Run

KEPT = (59, 130, 246)  # style.css's --kept, legible on a light page and on a dark one
PRUNED = (128, 128, 128)
BINS = 60  # of a histogram


def bars(summary: dict) -> list[dict]:
    """For each batch the three ways to run the network: times as fast as in plain torch."""
    groups = []
    for row in (row for row in summary["rows"] if "batch" in row):
        names = {"plain": "dense, plain torch", "dense": f"dense, {row['rival']}"}
        names = {**names, "pruned": "pruned"}
        low, high = row["gain_range"]
        bars = []
        for key, name in names.items():
            times = row["plain"] / row[key] if row["batch"] == 1 else row[key] / row["plain"]
            figure = quantity(row[key], row["unit"])
            hover = f"{name}: {figure}, {times:.2f} times plain torch"
            if key == "pruned":
                hover += f"; {low:.2f} to {high:.2f} times the best dense network"
            bars.append({"name": name, "times": times, "figure": figure, "hover": hover})
        if row["rival"] == "plain torch":
            del bars[1]
        groups.append({"measure": row["measure"], "bars": bars})
    longest = max((bar["times"] for group in groups for bar in group["bars"]), default=1)
    for bar in (bar for group in groups for bar in group["bars"]):
        bar["share"] = round(bar["times"] / longest, 4)
    return groups


def _noise(summary: dict) -> tuple[float, float, str]:
    """The band of a chart: where accuracies do not differ from the dense network's."""
    low, high = summary["rows"][0]["noise"]
    text = f"{low:.2f} to {high:.2f} %: the dense network's 95 % interval"
    return low, high, f"{text} on {summary['images']:,} test images"


def _accuracy_axis(values: Sequence[float], noise: tuple[float, float, str]) -> Axis:
    return linear("accuracy (%)", [*values, *noise[:2]], least=1.0)  # less is noise, blown up


def accuracy_chart(run: Run) -> Chart:
    """Accuracy against density on a log axis, dense on the left."""
    series, values = [], []
    kinds = {
        "validation": "color: var(--validation); stroke-dasharray: 5 3",
        "test": "color: var(--test)",
        f"{CONTROL}_test": "color: var(--soft); stroke-dasharray: 2 3",
    }
    for kind, style in kinds.items():
        name, points = kind.replace("_", " "), []
        for record in (r for r in run.rounds if f"{kind}_accuracy" in r):
            value = 100 * record[f"{kind}_accuracy"]
            text = f"round {record['round']}, {percent(record['density'])}: {name} {value:.2f} %"
            points.append((100 * record["density"], value, text))
            values.append(value)
        if points:
            series.append(Series(name, points, style))
    density = [100 * record["density"] for record in run.rounds]
    ticks = density[:: -(-len(density) // 7)]
    around = logarithmic("", density)
    x = Axis("density (% of weights kept, log scale)", around.high, around.low, ticks, log=True)
    noise = _noise(run.summary)
    return Chart("Accuracy against density", x, _accuracy_axis(values, noise), series, noise)


def latency_chart(run: Run) -> Chart:
    """Test accuracy against latency: the dense network, and every shown round's."""
    row = next(row for row in run.summary["rows"] if row.get("batch") == 1)
    dense, *pruned = run.tickets
    accuracy = 100 * dense.rounds[-1]["test_accuracy"]
    ways = {"plain torch": row["plain"], row["rival"]: row["dense"]}
    series = []
    for n, (way, time) in enumerate(ways.items()):
        text = f"dense, {way}: {quantity(time, 'µs')}, {accuracy:.2f} %"
        style = f"color: var(--{('soft', 'ink')[n]})"
        series.append(Series(f"dense, {way}", [(time, accuracy, text)], style, line=False))
    points = []
    for ticket, time in zip(pruned, run.summary["latency"][1:], strict=True):
        record = ticket.rounds[-1]
        value = 100 * record["test_accuracy"]
        text = f"round {record['round']}, {percent(record['density'])} of the weights: "
        points.append((time, value, f"{text}{quantity(time, 'µs')}, {value:.2f} %"))
    series.append(Series("pruned, round by round", points, "color: var(--test)"))
    times, values, _ = zip(*(point for one in series for point in one.points), strict=True)
    noise = _noise(run.summary)
    return Chart(
        "Test accuracy against latency",
        logarithmic("latency at batch 1 (µs, log scale)", times),
        _accuracy_axis(values, noise),
        series,
        noise,
    )


def loss_charts(run: Run) -> list[Chart]:
    """Training and validation loss by epoch, a line for each shown round, on the same scale."""
    shown = [ticket.rounds[-1]["round"] for ticket in run.tickets]
    kinds = {"train_loss": "training loss", "validation_loss": "validation loss"}
    y = logarithmic("", [max(record[kind], 1e-9) for record in run.history for kind in kinds])
    epochs = max(2, *(record["epoch"] for record in run.history))
    x = Axis("epoch of the round", 1, epochs, [*range(1, epochs + 1, -(-epochs // 8))])
    charts = []
    for kind, label in kinds.items():
        series = []
        for n, round in enumerate(shown):
            records = [r for r in run.history if r["round"] == round and "control" not in r]
            points = [
                (
                    record["epoch"],
                    max(record[kind], 1e-9),
                    f"round {round}, epoch {record['epoch']}: {label} {record[kind]:.4f}",
                )
                for record in records
            ]
            name = f"round {round}" if n else "dense"
            series.append(Series(name, points, _round_style(n, len(shown))))
        axis = Axis(f"{label} (log scale)", y.low, y.high, y.ticks, log=True)
        charts.append(Chart(f"{label} by epoch", x, axis, series))
    return charts


def _round_style(n: int, count: int) -> str:
    """From pale to strong, the dense network apart."""
    share = round(100 * (0.25 + 0.75 * n / (count - 1)))
    return f"color: color-mix(in srgb, var(--test) {share}%, var(--line))" if n else ""


def histograms(run: Run) -> list[Chart]:
    """The weights of each pruned layer, dense and in the last round, on the same scale."""
    before, after = run.tickets[0].trained, run.tickets[-1].trained
    layers = {name: mask for name, mask in run.ticket.masks.items() if not mask.all()}
    weights = {
        name: (before[f"{name}.weight"].flatten(), after[f"{name}.weight"][mask])
        for name, mask in layers.items()
    }
    widest = max((float(w.abs().max()) for pair in weights.values() for w in pair), default=1.0)
    edges = np.linspace(-widest, widest, BINS + 1)
    counts = {
        name: [np.histogram(w.numpy(), edges)[0] for w in pair] for name, pair in weights.items()
    }
    most = max((int(c.max()) for pair in counts.values() for c in pair), default=1)
    y = logarithmic("weights (log scale)", [0.7, most])
    x = linear("weight", [-widest, widest])
    styles = {
        "dense": "color: var(--soft); --area: currentColor; fill-opacity: .25; --dot: transparent",
        "pruned": "color: var(--test); --area: currentColor; fill-opacity: .25; --dot: transparent",
    }
    charts = []
    for name, pair in counts.items():
        series = []
        for (kind, style), count in zip(styles.items(), pair, strict=True):
            points = [(-widest, y.low, "")]
            for (low, high), number in zip(pairwise(edges), count.tolist(), strict=True):
                text = f"{kind}, {low:.3f} to {high:.3f}: {number:,} weights"
                points.append(((low + high) / 2, max(number, y.low), text))
            points.append((widest, y.low, ""))
            series.append(Series(f"{name}, {kind}", points, style))
        charts.append(Chart(f"Weights of {name}, dense and pruned", x, y, series))
    return charts


def worse(summary: dict) -> list[list[dict]]:
    """How many more images of a class, a row, the pruned network takes for each class."""
    dense, pruned = (np.array(summary["confusion"][name]) for name in ("dense", "pruned"))
    more = pruned - dense
    table = []
    for truth, row in enumerate(more.tolist()):
        cells = []
        for taken, number in enumerate(row):
            what = "recognised" if truth == taken else f"taken for {taken}"
            was, now = dense[truth, taken], pruned[truth, taken]
            better = (number > 0) == (truth == taken)
            cells.append(
                {
                    "text": f"{number:+d}" if number else "",
                    "tone": "good" if better else "bad",
                    "heat": round(60 * abs(number) / max(1, abs(more).max())),
                    "hover": f"{truth} {what}: {now} times, dense {was}",
                }
            )
        table.append(cells)
    return table


def layers(run: Run) -> list[tuple[str, list[float]]]:
    """The density of each layer that was pruned, in every shown round."""
    rows = []
    for name, mask in run.ticket.masks.items():
        if not mask.all():
            masks = [ticket.masks[name] for ticket in run.tickets]
            rows.append((name, [int(m.sum()) / m.numel() for m in masks]))
    return rows


def pixels(run: Run) -> dict | None:
    """How many first-layer weights each input pixel keeps; None behind a convolution."""
    first = run.summary["layers"][0]
    mask, mean = run.ticket.masks.get(first["layer"]), np.array(run.summary["mean_image"])
    if mask is None or mask.dim() != 2 or mask.shape[1] != mean.size:
        return None
    kept = mask.sum(0).view(mean.shape).numpy()
    return {
        "kept": png(_coloured(kept / max(1, kept.max()), KEPT)),
        "mean": png(_coloured(mean, PRUNED)),
        "most": int(kept.max()),
        "none": int((kept == 0).sum()),
        "outputs": len(mask),
    }


def masks(run: Run) -> list[dict]:
    """Which weights of each pruned layer are kept, and when the others were pruned."""
    figures, opacities = [], _opacities(run)
    for layer in run.summary["layers"]:
        masks = [t.masks[layer["layer"]] for t in run.tickets if layer["layer"] in t.masks]
        if not masks or masks[-1].all():
            continue
        last, total = masks[-1].flatten(1), masks[-1].numel()
        alive = sum(mask.flatten(1).int() for mask in masks)  # in so many of the shown rounds
        opacity = torch.tensor([0.0, *opacities, 1.0])[alive]
        rgba = np.where(
            last[..., None], _coloured(last.numpy(), KEPT), _coloured(opacity.numpy(), PRUNED)
        )
        shape = " x ".join(map(str, layer["shape"]))
        text = f"{layer['layer']}, {shape}: {layer['kept']:,} weights kept"
        text += f" ({percent(layer['kept'] / total)})"
        if layer.get("stored", layer["kept"]) != layer["kept"]:
            text += f", {layer['stored']:,} stored ({percent(layer['stored'] / total)})"
        rows, cols = last.shape
        width = cols * max(1, min(8, 784 // cols, 300 // rows))
        kind = "large" if width > cols else "full"
        figures.append({"source": png(rgba), "text": text, "width": width, "kind": kind})
    return figures


def _opacities(run: Run) -> list[float]:
    """Of weights pruned in the n-th shown round after the dense one, from pale to strong."""
    count = len(run.tickets) - 1
    return [0.08 + 0.5 * n / count for n in range(count)]


def mask_legend(run: Run) -> list[tuple[str, str]]:
    """(what a colour means, the colour)"""
    rounds = [ticket.rounds[-1]["round"] for ticket in run.tickets[1:]]
    legend = [
        (f"pruned in round {n}" if n - before == 1 else f"in rounds {before + 1} to {n}", opacity)
        for before, n, opacity in zip([0, *rounds], rounds, _opacities(run), strict=False)
    ]
    grey, blue = (",".join(map(str, colour)) for colour in (PRUNED, KEPT))
    return [("kept", f"rgb({blue})"), *((text, f"rgba({grey},{a:.2f})") for text, a in legend)]


def _coloured(opacity: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """opacity: (height, width), 0 to 1 -> (height, width, 4) uint8"""
    rgba = np.empty((*opacity.shape, 4), np.uint8)
    rgba[..., :3], rgba[..., 3] = colour, (255 * opacity).round()
    return rgba
