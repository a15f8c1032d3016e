"""What a run found, on the terminal and as a page: the same figures in both."""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bsr import blocks_of
from ..files import write
from ..masks import expand
from ..ticket import Ticket

KEPT = (59, 130, 246)  # blue, legible on a light page and on a dark one
# matplotlib writes these colours and the page has them by name: a dark page recolours the plot
INK, LINE, TEST, VALIDATION = COLOURS = ("#000001", "#000002", "#000003", "#000004")
NAMES = ("var(--ink)", "var(--line)", "var(--test)", "var(--validation)")
REINIT = "reinit_test_accuracy"
COMPARISON = ("", "dense", "pruned", "pruned is")
MACHINE = ("threads", "backend", "python", "torch", "triton")
TONES = dict.fromkeys(("faster", "smaller", "higher"), "good")
TONES |= dict.fromkeys(("slower", "larger", "lower"), "bad")
STYLES = {"good": "green", "bad": "red"}


def print_tables(console: Console, ticket: Ticket, summary: dict) -> None:
    """The rounds, and dense against pruned; summary: of `measure.compare` or `summarise`."""
    _print_table(console, "Accuracy per round", *_rounds_table(ticket))
    lines = [headline(summary)]
    if "rows" in summary:
        _print_table(console, "Dense against pruned", COMPARISON, _comparison_rows(summary))
        lines = [context(ticket, summary), growth(summary), *lines]
    for line in filter(None, lines):
        console.print(Text(line), highlight=False, soft_wrap=True)


def write_page(path: str | Path, ticket: Ticket, summary: dict) -> None:
    """One HTML file that needs nothing else; summary: of `measure.compare` or `summarise`."""
    model, dataset = ticket.settings["model"], ticket.settings["dataset"]
    title = f"{model} on {dataset}, {percent(ticket.density)} of the weights kept"
    comparison = ""
    if "rows" in summary:
        comparison = "<h2>Dense against pruned</h2>"
        comparison += _html_table(COMPARISON, _comparison_rows(summary))
        comparison += f'<p class="soft">{escape(growth(summary))}</p>'
    settings = [*ticket.settings.items()]
    settings += [("processor", summary["device"])]
    settings += [(name, summary[name]) for name in MACHINE if summary.get(name)]
    template = Template(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    page = template.substitute(
        title=escape(title),
        headline=escape(headline(summary)),
        context=escape(context(ticket, summary)),
        comparison=comparison,
        plot=_accuracy_figure(ticket.rounds),
        rounds=_html_table(*_rounds_table(ticket)),
        pixels=_pixels_figure(summary),
        masks="\n".join(_mask_figure(ticket, layer) for layer in summary["layers"]),
        settings="\n".join(
            f"<dt>{escape(str(name))}</dt><dd>{escape(_plain(value))}</dd>"
            for name, value in settings
        ),
    )
    write(path, page)


def headline(summary: dict) -> str:
    """One sentence that says whether the pruned network is faster."""
    if "rows" not in summary:
        return (
            "Not measured: under masks a network runs at dense speed; "
            "--export-sparse measures a real one."
        )
    speeds = [row for row in summary["rows"] if "batch" in row]
    faster = [_direction(row) == 1 for row in speeds]
    answer = "Yes" if all(faster) else "It depends on the batch" if any(faster) else "No"
    verdicts = [verdict(row).partition(" (")[0] for row in speeds]
    *parts, last = [
        f"{text} at batch {row['batch']}" for text, row in zip(verdicts, speeds, strict=True)
    ]
    return f"{answer}: {', '.join(parts)} and {last}."


def context(ticket: Ticket, summary: dict) -> str:
    """Where the figures are from."""
    backend = f", {summary['backend']} backend" if "backend" in summary else ""
    threads = f"{summary['threads']} thread{'s' if summary['threads'] > 1 else ''}"
    return f"{summary['device']}, {threads}{backend}, {ticket.settings['dataset']}"


def growth(summary: dict) -> str:
    """How many more weights the file stores than are kept, and what stayed dense; else empty."""
    layers, text = summary["layers"], []
    stored, kept = (sum(layer[key] for layer in layers) for key in ("stored", "kept"))
    if stored != kept:
        share = percent(summary["stored_density"] * kept / stored)
        text.append(
            f"The stored density, {percent(summary['stored_density'])}, is {factor(stored / kept)} "
            f"the {share} that is kept: a block is stored with its zeros, and so is a dense layer."
        )
    text += [f"{x['layer']} stays dense: {x['dense']}." for x in layers if "dense" in x]
    return " ".join(text)


def verdict(row: dict) -> str:
    """How the pruned network does in this row of `measure.compare`, in words."""
    if "gain" not in row:
        points = row["pruned"] - row["dense"]
        return f"{abs(points):.2f} points {'lower' if points < 0 else 'higher'}"
    if _direction(row) == 0:
        low, high = row["gain_range"]
        return f"no clear difference ({low:.2f}x to {high:.2f}x)"
    better, worse = ("faster", "slower") if "batch" in row else ("smaller", "larger")
    gain = row["gain"]
    return f"{factor(max(gain, 1 / gain))} {better if gain > 1 else worse}"


def _direction(row: dict) -> int:
    """1 better, -1 worse, 0 where the gain and its range disagree which."""
    gains = (row["gain"], *row.get("gain_range", ()))
    return 1 if min(gains) > 1 else -1 if max(gains) <= 1 else 0


def percent(fraction: float) -> str:
    return f"{100 * fraction:#.3g}".rstrip(".") + " %"


def factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1.1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def quantity(value: float, unit: str) -> str:
    """With its unit; times to three digits, which is more than a machine repeats."""
    if unit == "%":
        return f"{value:.2f} %"
    if unit == "bytes":
        return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"
    value = float(f"{value:.3g}")
    unit = "/s" if unit == "images/s" else f" {unit}"
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:g}{unit}"


def _rounds_table(ticket: Ticket) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows; with --reinit there is a column of the controls, which round 0 has not."""
    names = ["validation_accuracy", "test_accuracy"]
    names += [REINIT] if any(REINIT in record for record in ticket.rounds) else []
    rows = []
    for n, record in enumerate(ticket.rounds):
        accuracies = (f"{record[name]:.2%}" if name in record else "" for name in names)
        cells = (accuracy.replace("%", " %") for accuracy in accuracies)
        rows.append((str(record.get("round", n)), percent(record["density"]), *cells))
    return ("round", "density", *(name.replace("_", " ") for name in names)), rows


def _comparison_rows(summary: dict) -> list[tuple[str, ...]]:
    rows = [
        (
            row["measure"],
            quantity(row["dense"], row["unit"]),
            quantity(row["pruned"], row["unit"]),
            verdict(row),
        )
        for row in summary["rows"]
    ]
    stored = summary["stored_density"]
    dense = ", ".join(layer["layer"] for layer in summary["layers"] if "dense" in layer)
    name = f"density\n({dense} dense)" if dense else "density"
    return [*rows, (name, "100 %", percent(stored), f"{factor(1 / stored)} fewer")]


def _plain(value: object) -> str:
    """A setting as a flag would have it: (16, 16) as 16x16."""
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _print_table(
    console: Console, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for n, name in enumerate(header):
        last = n == len(header) - 1 and header is COMPARISON
        table.add_column(name, justify="left" if n == 0 or last else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, STYLES.get(_tone(cell), "")) for cell in row))
    console.print()
    console.print(table)


def _html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = ""
    for first, *cells in rows:
        body += f'<tr><th scope="row">{escape(first)}</th>'
        body += "".join(f'<td class="{_tone(cell)}">{escape(cell)}</td>' for cell in cells)
        body += "</tr>\n"
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


def _tone(cell: str) -> str:
    """ "good", "bad" or "" by the last word of a verdict"""
    return TONES.get(cell.rpartition(" ")[2], "")


def _accuracy_figure(rounds: Sequence[dict]) -> str:
    """Accuracy against density on a log axis, dense on the left, as inline SVG."""
    density = [100 * record["density"] for record in rounds]
    figure = Figure(figsize=(4.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for key, colour, marker in (("validation", VALIDATION, "s"), ("test", TEST, "o")):
        accuracy = [100 * record[f"{key}_accuracy"] for record in rounds]
        axes.plot(density, accuracy, color=colour, marker=marker, markersize=5, label=key)
    axes.set_xscale("log")
    axes.invert_xaxis()
    ticks = density[:: -(-len(density) // 7)]
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    middle, half = sum(axes.get_ylim()) / 2, max(0.5, np.ptp(axes.get_ylim()) / 2)
    axes.set_ylim(middle - half, middle + half)  # a percent at least: less is noise, blown up
    axes.set_xlabel("density (% of weights kept, log scale)", color=INK)
    axes.set_ylabel("accuracy (%)", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=LINE, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK)
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparse_lth"}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=metadata)
    text = svg.getvalue()
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    for colour, name in zip(COLOURS, NAMES, strict=True):
        text = text.replace(colour, name)
    label = "Accuracy against density; the table has the same figures."
    text = text.replace("<svg", f'<svg class="plot" role="img" aria-label="{label}"', 1)
    return f"<figure>{text}</figure>"


def _pixels_figure(summary: dict) -> str:
    """How many first-layer weights each input pixel keeps; empty behind a convolution."""
    if summary["pixels"] is None:
        return ""
    kept, outputs = np.array(summary["pixels"]), summary["layers"][0]["shape"][0]
    text = f"Input pixels by the first-layer weights they keep, of {outputs}"
    text += f"; {(kept == 0).sum()} pixels keep none"
    picture = _img(kept / max(1, kept.max()), text, width=280)
    scale = f'<div class="scale">0<i></i>{kept.max()} weights</div>'
    return f"<figure>{picture}{scale}<figcaption>{text}</figcaption></figure>"


def _mask_figure(ticket: Ticket, layer: dict) -> str:
    """The weights of a layer that are kept and, paler, the zeros that are stored with them."""
    mask = ticket.masks.get(layer["layer"], torch.ones(layer["shape"], dtype=torch.bool))
    shape, total = " x ".join(map(str, layer["shape"])), mask.numel()
    text = f"{layer['layer']}, {shape}: {layer['kept']:,} weights kept"
    text += f" ({percent(layer['kept'] / total)})"
    stored = mask
    if layer.get("stored", layer["kept"]) != layer["kept"]:
        text += (
            f", {layer['stored']:,} stored ({percent(layer['stored'] / total)}), pale ones zeros"
        )
        stored = mask.new_ones(mask.shape)
        if layer["stored"] < total:
            blocksize = ticket.settings["export_blocksize"]
            stored = expand(blocks_of(mask, blocksize).any((2, 3)), blocksize, mask.shape)
    opacity = (mask + 0.3 * (stored & ~mask)).flatten(1)
    rows, cols = opacity.shape
    scale = max(1, min(8, 784 // cols, 300 // rows))
    picture = _img(opacity.numpy(), f"Mask of {text}", scale * cols)
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"


def _img(opacity: np.ndarray, alt: str, width: int) -> str:
    """opacity: (height, width), 0 to 1 -> an <img> that holds its own pixels"""
    rgba = np.empty((*opacity.shape, 4), np.uint8)
    rgba[..., :3], rgba[..., 3] = KEPT, (255 * opacity).round()
    png = io.BytesIO()
    imsave(png, rgba, format="png")
    source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    kind = "large" if width > opacity.shape[1] else "full"
    return f'<img class="{kind}" width="{width}" alt="{escape(alt)}" src="{source}">'
