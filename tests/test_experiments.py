import csv
import sys
from functools import partial

import pytest

from sparse_lth.experiments import paper, results
from sparse_lth.experiments.chains import CONTROLS, TICKET, Plan, grid
from sparse_lth.experiments.claims import FAILS, HOLDS, NOISE, judge, verdict
from sparse_lth.experiments.page import write_page
from sparse_lth.timing import Times


def _training(losses):
    return [{"iteration": 100 * n, "validation_loss": loss} for n, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "iteration"),
    [
        ([3, 2, 1, 2, 3], 200),
        ([3, 2, 1, 1, 3], 200),  # of equal ones the first
        ([3, 2, 1, 2, 0.5], 400),
        ([1, 2, 3], 0),
        ([1], 0),
    ],
)
def test_the_early_stop_is_the_least_validation_loss(losses, iteration):
    assert results.early_stop(_training(losses))["iteration"] == iteration


@pytest.mark.parametrize(
    ("differences", "expected"),
    [([0.1, 0.5], HOLDS), ([-0.1, -0.5], FAILS), ([-0.1, 0.5], NOISE), ([0.0, 0.5], NOISE)],
)
def test_a_verdict_needs_all_replicates(differences, expected):
    assert verdict(differences) == expected


BONUS = {TICKET: 0.004, "late rewinding": 0.005, "random reinit": -0.01, "fine-tuning": -0.01}


def _rows():
    """Made-up results of the whole grid, two replicates of three evaluations."""
    plan = Plan(iterations=200)
    for chain in grid(plan, 2):
        for level in (0, *chain.levels):
            for method in (chain.method, *(CONTROLS if chain.controls and level else ())):
                for iteration in (0, 20, 200):
                    accuracy = 0.1 if iteration == 0 else 0.97 + 0.001 * chain.replicate
                    accuracy += BONUS.get(method, 0) * (level > 0) - 0.001 * (iteration == 20)
                    row = {
                        "method": method,
                        "model": chain.model,
                        "blocksize": "x".join(map(str, chain.blocksize)),
                        "replicate": chain.replicate,
                        "round": level,
                        "density": 0.8**level,
                        "iteration": iteration,
                        "validation_loss": 3.0 - iteration / 100,
                        "test_accuracy": accuracy,
                    }
                    if iteration == 200 and chain.replicate == 0:
                        width = int(chain.model.split("-")[1]) / 300
                        speed = (
                            100 * width,
                            90 * width,
                            120 * width,
                            1 / width,
                            "made up",
                            1,
                            "made up",
                        )
                        row |= dict(zip(results.SPEED, speed, strict=True))
                    yield row


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A folder that holds nothing but a results file."""
    folder = tmp_path_factory.mktemp("made_up")
    results.write(list(_rows()), folder / "results.csv")
    return folder


def test_figures_and_page_are_drawn_from_the_file_alone(made_up, capsys):
    assert paper.main(["plot", str(made_up)]) == 0
    assert capsys.readouterr().out == f"page: {made_up / 'index.html'}\n"
    page = (made_up / "index.html").read_text()
    assert page.count("<img") == len(list((made_up / "figures").glob("*.png"))) == 7
    assert page.count("data:image/svg+xml;base64,") == 7
    assert "http" not in page
    assert "200 iterations for each of" in page
    before = {path: path.read_bytes() for path in made_up.rglob("*.*")}
    write_page(results.read(made_up / "results.csv"), made_up)
    assert before == {path: path.read_bytes() for path in made_up.rglob("*.*")}


def test_claims_are_judged_by_the_replicates(made_up):
    claims = judge(results.read(made_up / "results.csv"))
    found = {claim.text: claim for claim in claims}
    assert len(found) == len(claims) == 23
    by_start = {text.partition(",")[0]: claim for text, claim in found.items()}
    anew = by_start["At 21.1 % the ticket is more accurate than the ticket drawn anew"]
    assert anew.measured == "97.45 % against 96.05 %: +1.40 points (+1.40 to +1.40)"
    assert anew.verdict == HOLDS
    later = by_start["At 21.1 % the ticket drawn anew stops later than the ticket"]
    assert later.measured == "iteration 200 against iteration 200: +0 iterations (+0 to +0)"
    assert later.verdict == NOISE


@pytest.mark.parametrize(
    ("content", "message"), [("", "it has no rows"), ("a,b\n1,2\n", "'method'")]
)
def test_what_is_no_results_file_is_refused(tmp_path, capsys, content, message):
    (tmp_path / "results.csv").write_text(content)
    with pytest.raises(SystemExit) as exit:
        paper.main(["plot", str(tmp_path)])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


QUICK = ["paper", "--dataset", "digits", "--iterations", "10", "--replicates", "1"]


def test_without_ray_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert paper.main([*QUICK, "--ray", "local", "--results", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: expected Ray for --ray")
    assert error.count("\n") == 1


def test_a_folder_with_another_plan_is_refused(tmp_path, capsys):
    plan = Plan(iterations=11, dataset="digits")
    paper.remember(plan, tmp_path / "plan.json")
    with pytest.raises(SystemExit):
        paper.main([*QUICK, "--results", str(tmp_path)])
    assert '"iterations": 11' in capsys.readouterr().err


def test_results_without_a_method_are_refused(tmp_path, capsys):
    rows = [row for row in _rows() if row["method"] != "one-shot"]
    results.write(rows, tmp_path / "results.csv")
    with pytest.raises(SystemExit):
        paper.main(["plot", str(tmp_path)])
    assert "expected results of the whole grid" in capsys.readouterr().err


def _quick_times(calls):
    """Calls each network once; the times are made up."""
    assert all(call().shape == (1, 10) for call in calls.values())
    return {key: Times((1e-5, 2e-5, 3e-5)) for key in calls}


@pytest.mark.slow
def test_the_whole_grid_without_tensorboard_and_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper, "find_spec", lambda name: None)
    monkeypatch.setattr(paper, "Plan", partial(Plan, levels=(7, 15), few_levels=(15,)))
    monkeypatch.setattr(paper, "in_turn", _quick_times)
    flags = [*QUICK, "--workers", "2", "--results", str(tmp_path)]
    assert paper.main(flags) == 0
    assert "no TensorBoard curves: pip install tensorboard" in capsys.readouterr().out
    assert not (tmp_path / "tensorboard").exists()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with open(tmp_path / "results.csv", newline="") as file:
        measured = [row for row in csv.DictReader(file) if row["latency_us"]]
    tickets = len(list((tmp_path / "tickets").iterdir()))
    assert len(measured) == tickets + 4
    assert paper.main(flags) == 0  # with nothing left to train or to measure
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
