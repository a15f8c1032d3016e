import copy
import io
import json
import re
from dataclasses import replace

import matplotlib
import pytest
import torch
from rich.console import Console

from sparse_lth.program.config import RunConfig
from sparse_lth.program.data import Split
from sparse_lth.program.measure import compare, summarise
from sparse_lth.program.models import MODELS
from sparse_lth.program.report import (
    factor,
    headline,
    percent,
    print_tables,
    quantity,
    verdict,
    write_page,
)
from sparse_lth.program.tickets import sparse_network
from sparse_lth.saving import save_sparse
from sparse_lth.ticket import Ticket
from sparse_lth.timing import Benchmark, Times
from sparse_lth.weights import weight_layers


def make_ticket(**settings) -> Ticket:
    """Three rounds; the last mask of each layer keeps its upper left quarter."""
    config = RunConfig(**settings)
    model = MODELS[config.model].empty()
    init = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    masks, trained = {}, dict(init)
    for name, layer in weight_layers(model).items():
        rows, cols, *_ = layer.weight.shape
        masks[name] = torch.zeros(layer.weight.shape, dtype=torch.bool)
        masks[name][: -(-rows // 2), : -(-cols // 2)] = True
        trained[f"{name}.weight"] = init[f"{name}.weight"] * masks[name]
    rounds = tuple(
        {
            "round": n,
            "density": density,
            "validation_accuracy": 0.9712 + n / 1000,
            "test_accuracy": 0.9734 + n / 1000,
        }
        for n, density in enumerate((1.0, 0.512, 0.25))
    )
    return Ticket(init, masks, trained, rounds, {}, config.search_settings())


def speed(batch: int, gain: float, spread: float = 0.01) -> dict:
    seconds = 123e-6
    return {
        "measure": f"throughput, batch {batch}",
        "unit": "images/s",
        "dense": batch / seconds,
        "pruned": gain * batch / seconds,
        "batch": batch,
        "gain": gain,
        "gain_range": [gain * (1 - spread), gain * (1 + spread)],
    }


def make_comparison(ticket: Ticket, *speeds: dict, stored: float = 1.0) -> dict:
    """stored: weights stored / weights kept"""
    summary = summarise(ticket, "cpu")
    for layer in summary["layers"]:
        layer["stored"] = round(stored * layer["kept"])
    rows = [
        {"measure": "test accuracy", "unit": "%", "dense": 97.34, "pruned": 96.11},
        *(speeds or (speed(1, 1 / 3.2), speed(64, 1.0, 0.1), speed(1024, 2.54))),
        {"measure": "file size", "unit": "bytes", "dense": 1_066_896, "pruned": 1234, "gain": 8.6},
    ]
    stored_density = stored * summary["density"]
    return {**summary, "backend": "torch", "stored_density": stored_density, "rows": rows}


def page_of(tmp_path, ticket: Ticket, summary: dict) -> str:
    write_page(tmp_path / "report.html", ticket, summary)
    return (tmp_path / "report.html").read_text("utf-8")


def terminal_of(ticket: Ticket, summary: dict, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_tables(console, ticket, summary)
    return console.file.getvalue()


def figures(ticket: Ticket, summary: dict) -> list[str]:
    """What page and terminal must both show."""
    shown = [percent(summary["stored_density"])]
    for row in summary["rows"]:
        shown += [quantity(row["dense"], row["unit"]), quantity(row["pruned"], row["unit"])]
        shown += [row["measure"], verdict(row)]
    for record in ticket.rounds:
        shown += [percent(record["density"]), f"{100 * record['test_accuracy']:.2f} %"]
        shown += [f"{100 * record['validation_accuracy']:.2f} %"]
    return shown


@pytest.mark.parametrize("model", ["lenet-300-100", "lenet-5"])
def test_page_is_self_contained_and_has_every_figure(tmp_path, model):
    ticket = make_ticket(model=model)
    summary = make_comparison(ticket)
    settings = dict(matplotlib.rcParams)
    page = page_of(tmp_path, ticket, summary)
    assert dict(matplotlib.rcParams) == settings
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page)
    sources = re.findall(r'\b(?:src|href)="([^"]{5})', page)
    assert sources
    assert all(source == "data:" or source.startswith("#") for source in sources)
    assert page.count("<img") == len(re.findall(r'<img [^>]*alt="[^"]+"', page))
    assert len(page) < 1_000_000
    for figure in figures(ticket, summary):
        assert figure in page, figure
    for layer in summary["layers"]:
        assert f"{layer['kept']:,} weights kept" in page
    assert ("Input pixels" in page) == (model == "lenet-300-100")


def test_the_plot_runs_from_dense_on_the_left(tmp_path):
    ticket = make_ticket()
    page = page_of(tmp_path, ticket, summarise(ticket, "cpu"))
    ticks = re.findall(r'<text [^>]*x="([\d.]+)"[^>]*>([\d.]+)</text>', page)
    assert [label for x, label in sorted(ticks[:3], key=lambda tick: float(tick[0]))] == [
        "100",
        "51.2",
        "25",
    ]
    assert "density (% of weights kept, log scale)" in page
    assert "var(--test)" in page
    assert "#000003" not in page


def test_the_page_is_the_same_every_time(tmp_path):
    ticket = make_ticket()
    summary = make_comparison(ticket)
    assert page_of(tmp_path, ticket, summary) == page_of(tmp_path, ticket, summary)


def test_terminal_shows_every_figure_whole_at_80_columns():
    ticket = make_ticket()
    summary = make_comparison(ticket, speed(1, 0.4), speed(1024, 12.6))
    text = terminal_of(ticket, summary)
    for figure in figures(ticket, summary):
        assert figure in text, figure
    assert "…" not in text
    threads = f"{summary['threads']} thread"
    for part in (summary["device"], "torch backend", threads):
        assert part in text


def test_a_narrow_terminal_folds_and_loses_nothing():
    ticket = make_ticket()
    summary = make_comparison(ticket)
    assert "…" not in terminal_of(ticket, summary, width=50)


def test_slower_is_said_as_slower(tmp_path):
    ticket = make_ticket()
    slow = make_comparison(ticket, speed(1, 0.3125), speed(64, 0.5))
    assert headline(slow) == "No: 3.2x slower at batch 1 and 2.0x slower at batch 64."
    for text in (page_of(tmp_path, ticket, slow), terminal_of(ticket, slow)):
        assert headline(slow) in text
        assert "faster" not in text.replace("Is it actually faster?", "")
    fast = make_comparison(ticket, speed(1, 1.05), speed(64, 2.54))
    assert headline(fast) == "Yes: 1.05x faster at batch 1 and 2.5x faster at batch 64."
    mixed = headline(make_comparison(ticket))
    assert mixed == (
        "It depends on the batch: 3.2x slower at batch 1, no clear difference at batch 64 "
        "and 2.5x faster at batch 1024."
    )


def test_verdicts():
    assert verdict(speed(1, 1.2, 0.5)) == "no clear difference (0.60x to 1.80x)"
    assert verdict(speed(1, 1 / 200)) == "200x slower"
    assert verdict({"gain": 0.5}) == "2.0x larger"
    assert verdict({"dense": 97.5, "pruned": 97.25}) == "0.25 points lower"
    assert verdict({"dense": 97.5, "pruned": 97.75}) == "0.25 points higher"
    assert [factor(x) for x in (1.02, 1.26, 12.7)] == ["1.02x", "1.3x", "13x"]
    assert [percent(x) for x in (1, 0.1, 0.0512)] == ["100 %", "10.0 %", "5.12 %"]


def test_growth_of_the_stored_density_is_said(tmp_path):
    ticket = make_ticket(export_blocksize=(16, 16))
    grown = make_comparison(ticket, stored=1.8)
    said = f"{percent(grown['stored_density'])}, is 1.8x the {percent(ticket.density)}"
    assert said in terminal_of(ticket, grown)
    assert said in page_of(tmp_path, ticket, grown)
    assert "stored density" not in terminal_of(ticket, make_comparison(ticket))


def test_without_export_it_says_that_masks_are_not_faster(tmp_path):
    ticket = make_ticket()
    summary = summarise(ticket, "cpu")
    for text in (page_of(tmp_path, ticket, summary), terminal_of(ticket, summary)):
        assert "a network runs at dense speed; --export-sparse measures a real one" in text
        assert "ense against pruned" not in text


def test_settings_are_escaped(tmp_path):
    ticket = make_ticket()
    evil = "<script>alert(1)</script>[red]&"
    ticket = replace(ticket, settings={**ticket.settings, "dataset": evil, evil: evil})
    summary = make_comparison(ticket)
    summary["device"] = evil
    page = page_of(tmp_path, ticket, summary)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[red]&amp;" in page
    assert evil in terminal_of(ticket, summary)  # not read as rich's markup


def test_the_measured_summary_is_json_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sparse_lth.program.measure.benchmark",
        lambda models, x, rivals: Benchmark(
            {
                "dense": Times((4e-4, 3e-4, 4e-4)),
                "dense, one call": Times((2e-4, 3e-4, 2e-4)),
                "pruned": Times((1e-4, 1e-4, 1e-4)),
            },
            "dense",
            {},
        ),
    )
    ticket = make_ticket(export_blocksize=(16, 16))
    save_sparse(sparse_network(ticket, (16, 16)), tmp_path / "model", "lenet-300-100")
    test = Split(torch.zeros(20, 1, 28, 28), torch.zeros(20, dtype=torch.int64))
    summary = compare(ticket, tmp_path / "model", test)
    assert json.loads(json.dumps(summary)) == summary
    kept = sum(int(mask.sum()) for mask in ticket.masks.values())
    assert sum(layer["kept"] for layer in summary["layers"]) == kept
    assert sum(map(sum, summary["pixels"])) == summary["layers"][0]["kept"]
    assert summary["layers"][0]["stored"] == 160 * 400  # 150 x 392 in whole blocks of 16
    assert headline(summary).startswith("Yes: 2.0x faster at batch 1, ")
    before = copy.deepcopy(summary)
    page_of(tmp_path, ticket, summary)
    assert summary == before
