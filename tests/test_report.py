import copy
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from rich.console import Console

from sparse_lth.program import measure
from sparse_lth.program.charts import LEFT, linear, logarithmic
from sparse_lth.program.config import RunConfig
from sparse_lth.program.data import Split
from sparse_lth.program.findings import (
    direction,
    factor,
    headline,
    percent,
    quantity,
    tone,
    verdict,
)
from sparse_lth.program.measure import accuracy, compare, interval, summarise
from sparse_lth.program.models import MODELS
from sparse_lth.program.report import print_tables, write_page
from sparse_lth.program.results import Run
from sparse_lth.program.tickets import sparse_network
from sparse_lth.saving import save_sparse
from sparse_lth.ticket import Ticket
from sparse_lth.timing import Benchmark, Times
from sparse_lth.weights import weight_layers

TEST = Split(torch.zeros(20, 1, 28, 28), torch.arange(20) % 10)


def make_run(**settings) -> Run:
    """Three rounds of one epoch; the last mask of each layer but fc3 keeps its upper left quarter.

    The mask of the round before keeps the upper half.
    """
    config = RunConfig(epochs=1, prune_rounds=2, **settings)
    model = MODELS[config.model].empty()
    weights = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    layers = weight_layers(model)
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    rounds, tickets = [], []
    for n, density in enumerate((1.0, 0.512, 0.25)):
        record = {"round": n, "epoch": 1, "step": 9, "density": density, "trained_sparse": []}
        record |= {"train_loss": 0.5 / (n + 1), "validation_loss": 0.1}
        record |= {"validation_accuracy": 0.9712 + n / 1000, "test_accuracy": 0.9734 + n / 1000}
        rounds.append(record)
        masks, trained = {}, dict(weights)
        for name, (rows, cols, *_) in shapes.items():
            masks[name] = torch.ones(shapes[name], dtype=torch.bool)
            if name != "fc3":
                masks[name][-(-rows // 2) if n else rows :] = False
                masks[name][:, -(-cols // 2) if n == 2 else cols :] = False
            trained[f"{name}.weight"] = weights[f"{name}.weight"] * masks[name]
        about = config.search_settings()
        tickets.append(Ticket(weights, masks, trained, tuple(rounds), {}, about))
    return Run(Path("runs/one"), config, rounds, summarise(tickets, TEST), tickets)


def speed(batch: int, gain: float, spread: float = 0.01) -> dict:
    """The pruned network takes 1 / gain of what the dense one does, which is plain torch's half."""
    dense = 40.0 if batch == 1 else 180_000.0
    faster = 1 / gain if batch == 1 else gain
    return {
        "measure": f"{'latency' if batch == 1 else 'speed'}, batch {batch}",
        "unit": "µs" if batch == 1 else "images/s",
        "plain": dense * (2 if batch == 1 else 0.5),
        "dense": dense,
        "pruned": dense * faster,
        "batch": batch,
        "rival": "compiled",
        "gain": gain,
        "gain_range": [gain * (1 - spread), gain * (1 + spread)],
    }


def timed(run: Run, *speeds: dict, stored: float = 1.0, correct: float = 0.9601) -> Run:
    """The run as --export-sparse has it; stored: weights stored / weights kept."""
    summary = copy.deepcopy(run.summary)
    for layer in summary["layers"]:
        layer["stored"] = round(stored * layer["kept"])
    rows = [
        accuracy(0.9734, correct, 10_000),
        *(speeds or (speed(1, 1 / 3.2), speed(64, 1.0, 0.1), speed(1024, 2.54))),
        {"measure": "file size", "unit": "bytes", "dense": 1_066_896, "pruned": 1234, "gain": 8.6},
    ]
    summary |= {"backend": "torch", "stored_density": stored * summary["density"], "rows": rows}
    summary |= {"latency": [40.0, 30.0, 20.0], "left_out": {}, "busy": None, "images": 10_000}
    return replace(run, summary=summary)


def page_of(tmp_path, run: Run) -> str:
    write_page(tmp_path / "report.html", run)
    return (tmp_path / "report.html").read_text("utf-8")


def terminal_of(run: Run, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_tables(console, run)
    return console.file.getvalue()


def figures(run: Run) -> list[str]:
    """What page and terminal must both show."""
    shown = [percent(run.summary["stored_density"]), "compiled at batch 1"]
    for row in run.summary["rows"]:
        names = {"plain", "dense", "pruned"} & row.keys()
        shown += [quantity(row[name], row["unit"]) for name in names]
        shown += [row["measure"], verdict(row)]
    for record in run.rounds:
        shown += [percent(record["density"]), f"{100 * record['test_accuracy']:.2f} %"]
        shown += [f"{100 * record['validation_accuracy']:.2f} %"]
    return shown


@pytest.mark.parametrize("model", ["lenet-300-100", "lenet-5"])
def test_page_is_self_contained_and_has_every_figure(tmp_path, model):
    run = timed(make_run(model=model))
    settings = dict(matplotlib.rcParams)
    page = page_of(tmp_path, run)
    assert dict(matplotlib.rcParams) == settings
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page)
    sources = re.findall(r'\b(?:src|href)="([^"]{5})', page)
    assert sources
    assert set(sources) == {"data:"}
    assert page.count("<img") == len(re.findall(r'<img [^>]*alt="[^"]+"', page))
    assert len(page) < 1_000_000
    for figure in figures(run):
        assert figure in page, figure
    for layer in run.summary["layers"]:
        whole = layer["layer"] == "fc3"
        shape = " x ".join(map(str, layer["shape"]))
        assert (f"{layer['kept']:,} weights kept" in page) != whole
        assert (f"{layer['layer']}, {shape}, stayed full." in page) == whole
    assert ("Input pixels" in page) == (model == "lenet-300-100")


def test_every_picture_says_its_values(tmp_path):
    run = timed(make_run())
    said = re.findall(r'<title>([^<]+)</title>|title="([^"]+)"', page_of(tmp_path, run))
    said = {one or other for one, other in said}
    for hover in (
        "round 1, 51.2 %: test 97.44 %",
        "round 2, epoch 1: training loss 0.1667",
        "dense, compiled: 40 µs, 97.34 %",
        "round 1, 51.2 % of the weights: 30 µs, 97.44 %",
        "fc1, round 2: 25.0 % kept",
        "pruned: 128 µs, 0.62 times plain torch; 0.31 to 0.32 times the best dense network",
        "97.01 to 97.64 %: the dense network&#39;s 95 % interval on 10,000 test images",
    ):
        assert hover in said, hover


def test_the_accuracy_runs_from_dense_on_the_left(tmp_path):
    page = page_of(tmp_path, make_run())
    chart = page[page.index('aria-label="Accuracy against density"') :]
    ticks = re.findall(r'<text x="([\d.]+)" y="204"[^>]*>([\d.]+)</text>', chart)[:3]
    assert [label for x, label in sorted(ticks, key=lambda tick: float(tick[0]))] == [
        "100",
        "51.2",
        "25",
    ]


def test_axes_hold_their_values():
    for values in ([97.1, 97.9], [0.0, 0.0], [-3.0, 12.0]):
        axis = linear("", values, least=1.0)
        assert all(0 <= axis.at(value) <= 1 for value in (*values, *axis.ticks))
        assert 3 <= len(axis.ticks) <= 8
    for values in ([0.004, 0.9], [5.0, 5.0], [1.0, 1e6]):
        axis = logarithmic("", values)
        assert all(0 <= axis.at(value) <= 1 for value in (*values, *axis.ticks))
    assert linear("", [0.0, 1.0]).ticks == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_the_numbers_of_an_axis_have_room_beside_its_label(tmp_path):
    page = page_of(tmp_path, make_run())
    ends = re.findall(r'<text x="(\d+)" [^>]*text-anchor="end">', page)
    assert {int(end) for end in ends} == {LEFT - 4}
    label = 14  # where it ends
    assert LEFT - 4 - len("0.0001") * 7 >= label


def test_the_page_is_the_same_every_time(tmp_path):
    run = timed(make_run())
    assert page_of(tmp_path, run) == page_of(tmp_path, run)


def test_terminal_shows_every_figure_whole_at_80_columns():
    run = timed(make_run(), speed(1, 0.4), speed(1024, 12.6))
    text = terminal_of(run)
    for figure in figures(run):
        assert figure in text, figure
    assert "…" not in text
    threads = f"{run.summary['threads']} thread"
    for part in (run.summary["device"], "torch backend", threads):
        assert part in text


def test_a_narrow_terminal_folds_and_loses_nothing():
    assert "…" not in terminal_of(timed(make_run()), width=50)


@pytest.mark.parametrize(
    ("gains", "correct", "expected"),
    [
        ((0.3125, 0.5), 0.9734, "No: 3.2x slower at batch 1 and 2.0x slower at batch 64, and as"),
        ((1.05, 2.54), 0.9734, "Yes: 1.05x faster at batch 1 and 2.5x faster at batch 64, and as"),
        (
            (1.05, 2.54),
            0.9061,
            "Faster, but less accurate: 1.05x faster at batch 1 and 2.5x faster at batch 64, but "
            "6.73 points less accurate (90.61 % against 97.34 %).",
        ),
        ((3, 3), 0.9833, "at batch 64, and 0.99 points more accurate (98.33 % against 97.34 %)."),
        ((0.5, 3), 0.9734, "It depends on the batch: 2.0x slower at batch 1 and 3.0x faster"),
        (
            (1.001, 1.001),
            0.9734,
            "Not clear: no clear difference at batch 1 and no clear difference at batch 64, and",
        ),
        ((3, 3), 0.9730, "as accurate (97.30 % against 97.34 %, within the noise of 10,000 test"),
    ],
)
def test_the_headline_answers_speed_and_accuracy(tmp_path, gains, correct, expected):
    speeds = (speed(batch, gain) for batch, gain in zip((1, 64), gains, strict=True))
    run = timed(make_run(), *speeds, correct=correct)
    assert expected in headline(run.summary)
    for text in (page_of(tmp_path, run), terminal_of(run)):
        assert headline(run.summary) in text


def test_verdicts_and_their_tones():
    def judged(row):
        return verdict(row), tone(row)

    assert judged(speed(1, 1.2, 0.5)) == ("no clear difference (0.60x to 1.80x)", "")
    assert judged(speed(1, 1 / 200)) == ("200x slower", "bad")
    disagree = {"disagree": True}
    assert judged(speed(1, 100, 0.8) | disagree) == ("at least 20x faster", "good")
    assert judged(speed(1, 1 / 100, 0.9) | disagree) == ("at least 53x slower", "bad")
    assert judged({"gain": 0.5}) == ("2.0x larger", "bad")
    assert judged(accuracy(0.9788, 0.9788, 10_000)) == ("the same", "")
    assert judged(accuracy(0.9788, 0.9774, 10_000)) == ("within noise (-0.14)", "")
    assert judged(accuracy(0.9788, 0.9115, 10_000)) == ("6.73 points lower", "bad")
    assert judged(accuracy(0.9788, 0.9850, 10_000)) == ("0.62 points higher", "good")
    assert judged(accuracy(0.9788, 0.9115, 100)) == ("6.73 points lower", "bad")
    assert direction(accuracy(0.9788, 0.9415, 100)) == 0
    assert [factor(x) for x in (1.02, 1.26, 12.7)] == ["1.02x", "1.3x", "13x"]
    assert [percent(x) for x in (1, 0.1, 0.0512)] == ["100 %", "10.0 %", "5.12 %"]


def test_a_pruned_network_that_was_trained_for_longer_is_said_to_be():
    assert "rounds of training" not in headline(make_run().summary)
    text = headline(make_run(rewind="weights").summary)
    assert text.count(", after 3 rounds of training against 1") == 1


@pytest.mark.parametrize(("fraction", "images"), [(0.5, 10), (0.97, 297), (0.98, 10_000), (1, 20)])
def test_the_interval_is_wilson_s(fraction, images):
    """Its ends are the p from which the fraction is just 1.96 standard deviations away."""
    for end in interval(fraction, images):
        deviation = (end * (1 - end) / images) ** 0.5
        assert abs(fraction - end) == pytest.approx(1.96 * deviation, abs=1e-7)


def test_growth_of_the_stored_density_is_said(tmp_path):
    run = make_run(export_blocksize=(16, 16))
    grown = timed(run, stored=1.8)
    kept = percent(run.summary["density"])
    said = f"{percent(grown.summary['stored_density'])}, is 1.8x the {kept}"
    assert said in terminal_of(grown)
    assert said in page_of(tmp_path, grown)
    assert "stored density" not in terminal_of(timed(run))


def test_without_export_it_says_that_zeros_are_not_faster(tmp_path):
    run = make_run()
    for text in (page_of(tmp_path, run), terminal_of(run)):
        assert "Not timed: pruned weights are still there, as zeros; --export-sparse" in text
        assert "best dense" not in text


def test_settings_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>[red]&"
    run = timed(make_run())
    run.summary["device"] = evil
    run = replace(run, folder=Path(evil))
    page = page_of(tmp_path, run)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[red]&amp;" in page
    assert evil in terminal_of(run)  # not read as rich's markup


def test_the_measured_summary_is_json_and_reports(tmp_path, monkeypatch):
    asked, spoilt = [], [1e-4]

    def quick(models, x, turns):
        """A third of the turns is spoilt, so that single turns are of no use."""
        asked.append(turns)
        dense = {
            "dense": Times((4e-4, 3e-4, 4e-4) * 9),
            "dense, one call": Times((2e-4, 9e-4, 2e-4) * 9),
        }
        pruned = {
            n: Times((1e-4, 1e-4, spoilt[0]) * 8 + (1.1e-4,) * 3) for n in models if n != "dense"
        }
        return Benchmark(dense | pruned, "dense", {"compiled": "no compiler"})

    monkeypatch.setattr(measure, "benchmark", quick)
    monkeypatch.setattr(measure, "load_of_others", lambda: None)
    run = make_run(export_blocksize=(16, 16))
    save_sparse(sparse_network(run.ticket, (16, 16)), tmp_path / "model", "lenet-300-100")
    summary = compare(run.tickets, tmp_path / "model", TEST)
    assert json.loads(json.dumps(summary)) == summary
    kept = sum(int(mask.sum()) for mask in run.ticket.masks.values())
    assert sum(layer["kept"] for layer in summary["layers"]) == kept
    assert summary["layers"][0]["stored"] == 160 * 400  # 150 x 392 in whole blocks of 16
    assert headline(summary).startswith("Faster, but less accurate: 2.0x faster at batch 1, ")
    row = summary["rows"][1]
    assert (row["rival"], row["plain"], row["dense"]) == ("one call", 400, 200)
    assert summary["latency"] == [200, 100, 100]
    before = copy.deepcopy(summary)
    page = page_of(tmp_path, replace(run, summary=summary))
    assert summary == before
    assert "compiled was left out: no compiler." in page

    monkeypatch.setattr(measure, "load_of_others", lambda: [7.25, 2])
    spoilt[0] = 9e-4
    busy = compare(run.tickets, tmp_path / "model", TEST)
    assert asked == [101] * 3 + [297] * 3
    assert busy["rows"][1]["gain_range"] == pytest.approx([2 / 1.1, 2])
    assert not busy["rows"][1]["disagree"]
    assert "busy, with a load of 7.2 on 2 cores" in page_of(tmp_path, replace(run, summary=busy))


@pytest.mark.parametrize(
    ("load", "own", "busy"), [(0.1, 0, False), (2.1, 900, False), (4.0, 900, True), (2.0, 6, True)]
)
def test_a_machine_is_busy_if_others_leave_too_few_cores(monkeypatch, load, own, busy):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("time.process_time", lambda: own)  # of 60 s, or more, of two threads
    assert measure.load_of_others() == ([load, 2] if busy else None)


def test_the_confusion_counts_each_image_once():
    run = make_run()
    for table in run.summary["confusion"].values():
        assert [sum(row) for row in table] == [2] * 10  # images of each class
