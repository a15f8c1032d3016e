import io
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console

from sparse_lth.program.comparison import (
    conclusion,
    groups_of,
    print_comparison,
    write_comparison,
)
from sparse_lth.program.means import Mean
from tests.test_report import make_run, speed, timed


def seeds(*accuracies, gains=(3.0, 3.2, 3.4), **settings):
    """Runs that differ in their seed, in the accuracy of their last round and in their speed."""
    runs = []
    for seed, (correct, gain) in enumerate(zip(accuracies, gains, strict=False)):
        run = make_run(seed=seed, **settings)
        run = timed(run, *(speed(batch, gain) for batch in (1, 64, 1024)), correct=correct)
        *before, last = run.rounds
        last = {**last, "test_accuracy": correct}
        run.tickets[-1] = replace(run.ticket, rounds=(*before, last))
        runs.append(replace(run, folder=Path(f"runs/{settings.get('scope', 'any')}_{seed}")))
    return runs


def test_the_mean_of_seeds_has_student_s_interval():
    values = [97.5, 97.8, 98.1]
    found = Mean.of(values)
    assert found.value == mean(values)
    assert abs(found.half - 4.303 * stdev(values) / 3**0.5) < 1e-3  # t of 2 degrees of freedom
    assert found.text(".2f", " %") == "97.80 ± 0.75 %"
    assert found.text(".2f", sign="+") == "+97.80 ± 0.75"
    assert Mean.of([97.5]).text(".2f", " %") == "97.50 %"


def test_runs_are_grouped_by_all_but_their_seed():
    runs = [*seeds(0.97, 0.98), *seeds(0.95, scope="global"), *seeds(0.96)]
    groups = groups_of(runs)
    assert [group.name for group in groups] == ["scope layerwise", "scope global"]
    assert [len(group.runs) for group in groups] == [3, 1]
    assert [group.name for group in groups_of(runs[:2])] == ["the same settings"]


def test_page_and_terminal_show_every_mean(tmp_path):
    runs = [*seeds(0.975, 0.978, 0.981), *seeds(0.95, scope="global")]
    write_comparison(tmp_path / "page.html", runs)
    page = (tmp_path / "page.html").read_text("utf-8")
    console = Console(file=io.StringIO(), width=200)
    print_comparison(console, runs)
    for text in (page, console.file.getvalue()):
        for figure in ("97.80 ± 0.75 %", "95.00 %", "3.20 ± 0.50x", "3.00x", "97.34 ± 0.00 %"):
            assert figure in text
        assert conclusion(groups_of(runs)) in text
    assert len(page) < 1_000_000
    assert "http" not in page
    for run in runs:
        assert str(run.folder) in page
    assert "scope layerwise, pruned, 12.5 µs: 97.80 ± 0.75 %" in page


def test_runs_that_were_not_timed_are_compared_by_accuracy(tmp_path):
    runs = [make_run(seed=seed) for seed in range(2)]
    assert conclusion(groups_of(runs)).endswith("and at batch 1 not timed.")
    write_comparison(tmp_path / "page.html", runs)
    assert "Accuracy against latency" not in (tmp_path / "page.html").read_text("utf-8")


def test_blocks_that_are_exported_as_they_are_pruned_are_named_once():
    sizes = ((16, 16), (1, 1))
    runs = [make_run(blocksize=size, export_blocksize=size, prune_pc=0.5) for size in sizes]
    assert [group.name for group in groups_of(runs)] == ["blocksize 16x16", "blocksize 1x1"]
