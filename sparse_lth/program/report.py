"""The report of a run, on the terminal and as a page: the same figures in both."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import write
from . import pictures
from .findings import context, direction, factor, headline, notes, percent, quantity, tone, verdict
from .flags import command_of
from .lottery import CONTROL
from .pages import render
from .results import Run

STYLES = {"good": "green", "bad": "red"}
REINIT = f"{CONTROL}_test_accuracy"
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
        bars=pictures.bars(summary),
        latency=pictures.latency_chart(run) if "latency" in summary else None,
        accuracy=pictures.accuracy_chart(run),
        rounds=_rounds_table(run),
        losses=pictures.loss_charts(run),
        histograms=pictures.histograms(run),
        images=summary["images"],
        worse=pictures.worse(summary),
        shown=[f"round {ticket.rounds[-1]['round']}" for ticket in run.tickets],
        layers=pictures.layers(run),
        full=[layer for layer in summary["layers"] if layer["kept"] == np.prod(layer["shape"])],
        pixels=pictures.pixels(run),
        masks=pictures.masks(run),
        mask_legend=pictures.mask_legend(run),
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
