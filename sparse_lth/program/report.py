"""The report of a run, on the terminal and as a page: the same figures in both."""

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import write
from .charts import Axis, Chart, Series, linear, logarithmic
from .findings import context, direction, factor, headline, notes, percent, quantity, tone, verdict
from .flags import command_of
from .lottery import CONTROL
from .pages import png, render
from .results import Run

KEPT = (59, 130, 246)  # style.css's --kept, legible on a light page and on a dark one
PRUNED = (128, 128, 128)
STYLES = {"good": "green", "bad": "red"}
REINIT = f"{CONTROL}_test_accuracy"
BINS = 60  # of a histogram
Row = tuple[str, ...]


def print_tables(console: Console, run: Run) -> None:
    """The rounds, and dense against pruned."""
    header, *rows = _rounds_table(run)
    print_table(console, "Accuracy per round", header, rows)
    header, *rows = _comparison(run.summary)
    print_table(console, "Dense against pruned", header, rows, _tones(run.summary))
    about = context(run.summary, run.config.dataset)
    for line in (about, run.ticket.rewound, *notes(run.summary), headline(run.summary)):
        console.print(Text(line), highlight=False, soft_wrap=True)


def print_table(
    console: Console,
    title: str,
    header: Row,
    rows: Sequence[Row],
    tones: Sequence[str] | None = None,
) -> None:
    """tones: of the last cell of each row, where that has words"""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    for n, name in enumerate(header):
        left = n == 0 or (tones and n == len(header) - 1)
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row, colour in zip(rows, tones or [""] * len(rows), strict=True):
        *cells, last = map(Text, row)
        last.stylize(STYLES.get(colour, ""))
        table.add_row(*cells, last)
    console.print()
    console.print(table)


def write_page(path: Path, run: Run) -> None:
    """One HTML file that needs nothing else."""
    summary = run.summary
    header, *rows = _comparison(summary)
    machine = {name: summary.get(name) for name in ("python", "torch", "triton")}
    page = render(
        "program/report.html",
        title=f"{run.config.model} on {run.config.dataset}",
        kicker=f"{run.config.model} on {run.config.dataset}, {percent(summary['density'])} of the "
        "weights kept. Is it actually faster?",
        headline=headline(summary),
        context=context(summary, run.config.dataset),
        header=header,
        rows=rows,
        tones=_tones(summary),
        notes=[run.ticket.rewound, *notes(summary)],
        bars=_bars(summary),
        latency=_latency_chart(run) if "latency" in summary else None,
        accuracy=_accuracy_chart(run),
        rounds=_rounds_table(run),
        losses=_loss_charts(run),
        histograms=_histograms(run),
        images=summary["images"],
        worse=_worse(summary),
        shown=[f"round {ticket.rounds[-1]['round']}" for ticket in run.tickets],
        layers=_layers(run),
        full=[layer for layer in summary["layers"] if layer["kept"] == np.prod(layer["shape"])],
        pixels=_pixels(run),
        masks=_masks(run),
        mask_legend=_mask_legend(run),
        next=_next(run),
        flags=run.flags,
        command=command_of(run.flags),
        machine={name: version for name, version in machine.items() if version},
    )
    write(path, page)


def _comparison(summary: dict) -> list[Row]:
    """The header; then for each measure its figures and the verdict."""
    timed = "latency" in summary
    rows = [("", *(("plain torch", "best dense") if timed else ("dense",)), "pruned", "pruned is")]
    for row in summary["rows"]:
        names = ("plain", "dense", "pruned") if "plain" in row else ("dense", "pruned")
        figures = [quantity(row[name], row["unit"]) for name in names]
        if timed and "plain" not in row:
            figures.insert(1, "")
        rows.append((row["measure"], *figures, verdict(row)))
    density = summary.get("stored_density", summary["density"])
    dense = ", ".join(layer["layer"] for layer in summary["layers"] if "dense" in layer)
    name = f"density\n({dense} dense)" if dense else "density"
    figures = ["100 %", *([""] if timed else []), percent(density)]
    return [*rows, (name, *figures, f"{factor(1 / density)} fewer")]


def _tones(summary: dict) -> list[str]:
    """Of the verdict of each row of `_comparison`."""
    return [*map(tone, summary["rows"]), ""]


def _rounds_table(run: Run) -> list[Row]:
    """The header; then each round's figures, with --reinit those of its control, too."""
    names = ["validation_accuracy", "test_accuracy"]
    names += [REINIT] if any(REINIT in record for record in run.rounds) else []
    rows = [("round", "density", *(name.replace("_", " ") for name in names))]
    for record in run.rounds:
        figures = (quantity(100 * record[n], "%") if n in record else "" for n in names)
        rows.append((str(record["round"]), percent(record["density"]), *figures))
    return rows


def _bars(summary: dict) -> list[dict]:
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


def _accuracy_chart(run: Run) -> Chart:
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


def _latency_chart(run: Run) -> Chart:
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


def _loss_charts(run: Run) -> list[Chart]:
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


def _histograms(run: Run) -> list[Chart]:
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


def _worse(summary: dict) -> list[list[dict]]:
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


def _layers(run: Run) -> list[tuple[str, list[float]]]:
    """The density of each layer that was pruned, in every shown round."""
    rows = []
    for name, mask in run.ticket.masks.items():
        if not mask.all():
            masks = [ticket.masks[name] for ticket in run.tickets]
            rows.append((name, [int(m.sum()) / m.numel() for m in masks]))
    return rows


def _pixels(run: Run) -> dict | None:
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


def _masks(run: Run) -> list[dict]:
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


def _mask_legend(run: Run) -> list[tuple[str, str]]:
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


def _next(run: Run) -> list[tuple[str, str]]:
    """(why, command), three times"""
    flags, config = dict(run.flags), run.config
    accuracy, *speeds = (row for row in run.summary["rows"] if row.get("unit") != "bytes")
    lost, faster = direction(accuracy) == -1, all(direction(row) == 1 for row in speeds)
    kept = 1 - config.prune_pc
    if not speeds:
        text = "Remove the pruned weights instead of multiplying them, and time the network"
        flags = {"--export-sparse": "", "--dataset": config.dataset, "--model": config.model}
    elif lost:
        text = "Prune less, to lose less"
        flags["--prune_pc"] = f"{max(1 - 2 * kept, config.prune_pc / 2):.4g}"
    else:
        text = "Prune further, to see where accuracy breaks" if faster else "Prune more, for speed"
        flags["--prune_pc"] = f"{1 - kept / 2:.4g}"
    seed = str(config.seed + 1)
    other = run.folder.with_name(f"{run.folder.name}_seed_{seed}")
    again = command_of({**run.flags, "--seed": seed, "--out_dir": str(other)})
    both = shlex.join(["python", "main.py", "report", str(run.folder), str(other)])
    board = shlex.join(["tensorboard", "--logdir", str(run.folder / "tensorboard")])
    return [
        (text, command_of(flags)),
        ("See whether it was luck: another seed, and both on one page", f"{again}\n{both}"),
        ("Look into the training: losses, weights and masks, round beside round", board),
    ]
