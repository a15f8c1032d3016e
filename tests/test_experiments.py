import csv
import sys
from functools import partial

import pytest

from sparse_lth.experiments import page, paper, results
from sparse_lth.experiments.chains import OF_NETWORK, ROW, TICKET, Plan, grid
from sparse_lth.experiments.claims import BEYOND, PAIRS
from sparse_lth.experiments.evidence import UNTESTED
from sparse_lth.experiments.page import FIGURES
from sparse_lth.experiments.verdicts import judge
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


BONUS = {TICKET: 0.004, "late rewinding": 0.005, "random reinit": -0.01, "fine-tuning": -0.01}


def _rows():
    """Made-up results of the whole grid, five replicates of three evaluations."""
    plan = Plan(iterations=200)
    for chain in grid(plan, 5):
        for prunings, level in enumerate((0, *chain.levels)):
            for method in (chain.method, *(chain.controls if level else ())):
                for iteration in (0, 20, 200):
                    accuracy = 0.1 if iteration == 0 else 0.97 + 0.001 * chain.replicate
                    accuracy += BONUS.get(method, 0) * (level > 0) - 0.001 * (iteration == 20)
                    values = (method, chain.model, chain.shape, chain.replicate, level, prunings)
                    values += (iteration, 0.8**level, 0.1, abs(iteration - 20), 0.9)
                    yield dict(zip(ROW, (*values, accuracy, accuracy), strict=True))


def _speeds():
    for chain in grid(Plan(), 1):
        for level in (0, *chain.levels):
            if chain.method in (TICKET, "dense"):
                width = int(chain.model.split("-")[1]) / 300 * 0.9**level
                values = (chain.method, chain.model, chain.shape, level)
                values += (100 * width, 90 * width, 120 * width, 1 / width, "made up", 1, "made up")
                names = (*results.NETWORK, *results.TIMES, *results.MACHINE)
                yield dict(zip(names, values, strict=True))


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A folder that holds nothing but files of results."""
    folder = tmp_path_factory.mktemp("made_up")
    results.write([*_rows()], folder / "results.csv")
    results.write([*_speeds()], folder / "latency.csv")
    return folder


def test_figures_and_page_are_drawn_from_the_files_alone(made_up, capsys, monkeypatch):
    assert paper.main(["plot", str(made_up)]) == 0
    assert capsys.readouterr().out == f"page: {made_up / 'index.html'}\n"
    html = (made_up / "index.html").read_text()
    assert len(list((made_up / "figures").glob("*.png"))) == 9
    assert html.count("<img") == html.count("data:image/svg+xml;base64,") >= 9  # a panel each
    assert "http" not in html
    assert "200 iterations for each of" in html
    assert f"Of {len(PAIRS) + 8 + len(BEYOND)} claims" in html
    assert html.count("<li>") == len(BEYOND)
    monkeypatch.setattr(page, "FIGURES", {"latency": page.FIGURES["latency"]})
    before = [(made_up / "figures" / f"latency.{kind}").read_bytes() for kind in ("png", "svg")]
    assert paper.main(["plot", str(made_up)]) == 0
    assert before == [(made_up / "figures" / f"latency.{k}").read_bytes() for k in ("png", "svg")]


def test_one_command_tells_every_verdict(made_up, capsys):
    assert paper.main(["claims", str(made_up)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (len(PAIRS) + 8)
    text = "At 21.1 % the ticket is more accurate than the ticket drawn anew"
    (n,) = (n for n, line in enumerate(lines) if text in line)
    assert lines[n].startswith("not decided: ")  # the differences have no spread
    assert lines[n + 1].strip() == (
        "97.50 % (4 prunings) against 96.10 % (4 prunings): "
        "+1.40 points (95 %: +1.40 to +1.40), p = 1.000"
    )


def test_what_was_not_trained_and_timed_is_left_out_of_the_page(tmp_path):
    rows = [r for r in _rows() if r["method"] in (TICKET, "random reinit") and r["round"] < 8]
    results.write(rows, tmp_path / "results.csv")
    trainings = results.read(tmp_path)
    for _, drawing in FIGURES.values():
        drawing(trainings)
    verdicts = {claim.text: claim.verdict for claim in judge(trainings)}
    assert len(verdicts) == len(PAIRS)  # those of latency need times
    for pair in PAIRS:
        known = all(m in (TICKET, "random reinit") and n < 8 for m, n in (pair.first, pair.second))
        assert (verdicts[pair.text] != UNTESTED) == known


def test_the_last_row_of_the_first_replicate_has_the_speed(made_up):
    for training in results.read(made_up):
        first = training[0]
        timed = first["replicate"] == 0 and first["method"] in (TICKET, "dense")
        assert (training[-1]["latency_us"] is not None) == timed
        if timed and first["round"] == 0 and first["model"] == "lenet-150-50":
            assert training[-1]["latency_us"] == pytest.approx(50)
            assert training[-1]["latency_p80_us"] == pytest.approx(60)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "it has no rows"), ("a,b\n1,2\n", "columns ['blocksize', 'iteration', 'method'")],
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


def test_without_a_gpu_one_line_says_so_and_nothing_is_begun(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = tmp_path / "results"
    assert paper.main([*QUICK, "--device", "cuda", "--results", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --device: expected cpu, since torch sees no GPU here")
    assert error.count("\n") == 1
    assert not folder.exists()


def test_a_folder_with_another_plan_is_refused(tmp_path, capsys):
    plan = Plan(iterations=11, dataset="digits")
    paper.remember(plan, tmp_path / "plan.json")
    with pytest.raises(SystemExit):
        paper.main([*QUICK, "--results", str(tmp_path)])
    assert '"iterations": 11' in capsys.readouterr().err


def test_a_results_file_alone_is_gone_on_from(tmp_path, monkeypatch):
    plan, trained = Plan(iterations=10, rewind="1it", dataset="digits"), []
    chains = grid(plan, 1, ["dense", "one-shot"])
    values = {name: kind(1) if kind in (int, float) else 0.1 for name, kind in ROW.items()}
    rows = [values | dict(zip(OF_NETWORK, n, strict=True)) for c in chains for n in c.networks]
    paper.remember(plan, tmp_path / "plan.json")
    monkeypatch.setattr(paper, "run_pool", lambda plan, chains, *rest: trained.extend(chains))
    monkeypatch.setattr(paper, "draw", lambda folder: None)

    def go_on(rows):
        trained.clear()
        results.write(rows, tmp_path / "results.csv")
        before = (tmp_path / "results.csv").read_bytes()
        flags = [*QUICK, "--networks", "dense", "one-shot", "--results", str(tmp_path)]
        assert paper.main(flags) == 0
        assert (tmp_path / "results.csv").read_bytes() == before
        return trained

    assert go_on(rows) == []
    for n, row in enumerate(rows):
        (chain,) = go_on([*rows[:n], *rows[n + 1 :]])
        assert tuple(row[name] for name in OF_NETWORK) in chain.networks


def test_networks_that_are_not_there_cost_no_measured_latency(made_up, capsys):
    before = (made_up / "latency.csv").read_bytes()
    assert paper.main(["measure", str(made_up)]) == 0
    assert "no latency" in capsys.readouterr().out
    assert (made_up / "latency.csv").read_bytes() == before


def _quick_times(calls):
    """Calls each network once; the times are made up."""
    assert all(call().shape == (1, 10) for call in calls.values())
    return {key: Times((1e-5, 2e-5, 3e-5)) for key in calls}


@pytest.mark.slow
def test_the_whole_grid_without_tensorboard_and_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper, "find_spec", lambda name: None)
    monkeypatch.setattr(paper, "Plan", partial(Plan, levels=(15,)))
    monkeypatch.setattr("sparse_lth.experiments.latency.in_turn", _quick_times)
    flags = [*QUICK, "--workers", "2", "--results", str(tmp_path)]
    assert paper.main(flags) == 0
    assert "no TensorBoard curves: pip install tensorboard" in capsys.readouterr().out
    assert not (tmp_path / "tensorboard").exists()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with open(tmp_path / "latency.csv", newline="") as file:
        measured = [*csv.DictReader(file)]
    assert len(measured) == len(list((tmp_path / "networks").iterdir())) + 4
    assert paper.main(flags) == 0  # with nothing left to train or to measure
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
