"""Every command, snippet, link and name of the README and the pages is followed."""

import argparse
import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
import yaml
from torch import nn

import sparse_lth
from sparse_lth.experiments import claims, measures, results
from sparse_lth.experiments.evidence import FAILS, HOLDS, UNDECIDED
from sparse_lth.experiments.verdicts import judge
from sparse_lth.kernels import linear_native
from sparse_lth.program import command, flags
from sparse_lth.program.models import MODELS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), ROOT / "kernels/README.md"]
PAGES += [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PROJECT = (ROOT / "pyproject.toml").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python|pytest|pip|mkdocs|ruff|tensorboard) [^`]+)`")
INDENTED = re.compile(r"^    ((?:pytest|python) .*)$", re.MULTILINE)
REMEASURE = re.compile(r"<!-- remeasure: (\w.*?) -->", re.DOTALL)
LINK = re.compile(r"(?:\]\(|src=\")([^)\"\s]+)[)\"]")
SLOW = re.compile("transformers|onnx.export")
OTHERS = {
    "mkdocs": ("build", "serve"),
    "ruff": ("check", "format"),
    "tensorboard": ("--logdir",),
    "venv": (".venv",),
}
PYTEST_FLAGS = {"--benchmark-only": 0, "--full-grid": 0, "--benchmark-json": 1, "-k": 1, "-m": 1}


def _at(path, text, position):
    return f"{path.relative_to(ROOT)}:{text[:position].count(chr(10)) + 1}"


def _blocks(language):
    """(where, what) of the fenced blocks of a language"""
    for path in PAGES:
        text = path.read_text()
        for match in FENCE.finditer(text):
            if match[1] == language:
                yield _at(path, text, match.start()), match[2]


def _commands():
    """(where, command line): of shell blocks, in a sentence, indented, or what made a figure"""
    for where, block in _blocks("sh"):
        yield from ((where, line) for line in block.splitlines())
    for path in PAGES:
        text = path.read_text()
        prose = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
        for kind in (INLINE, INDENTED, REMEASURE):
            for match in kind.finditer(prose):
                yield _at(path, prose, match.start()), " ".join(match[1].split())


def _cases(found):
    return [
        pytest.param(what, id=where, marks=pytest.mark.slow if SLOW.search(what) else ())
        for where, what in found
    ]


class Model(nn.Sequential):
    """What a reader's `MyModel` is: a quarter of its blocks hold weights."""

    def __init__(self):
        super().__init__(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
        for layer in (self[0], self[2]):
            layer.weight.data[:, 32:] = 0


def _train(model, after_epoch_1=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model(torch.randn(4, 128)).square().sum().backward()
    optimizer.step()
    after_epoch_1()


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The names that the pages take as given, in a folder with a finished run."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    sparse_lth.find_ticket(Model(), _train, 0.5, 1).save(run / "ticket.safetensors")
    network = MODELS["lenet-300-100"].new(torch.Generator())
    network.fc1.weight.data[:, 32:] = 0
    sparse_lth.sparsify_(network)
    sparse_lth.save_sparse(network, run / "sparse_model.safetensors", "lenet-300-100")
    quick = functools.partial(sparse_lth.benchmark, rivals=(), turns=2)
    monkeypatch.setattr(sparse_lth, "benchmark", quick)
    return {
        "MyModel": Model,
        "model": Model(),
        "train": _train,
        "evaluate": lambda model: 0.5,
        "x": torch.randn(2, 128),
    }


@pytest.mark.skipif(linear_native.WHY_NOT is not None, reason="on torch all layers stay dense")
@pytest.mark.parametrize("code", _cases(_blocks("python")))
def test_snippet_runs(code, reader, monkeypatch):
    if "transformers" in code:
        pytest.importorskip("transformers")
    if "onnx" in code:
        pytest.importorskip("onnxscript")
    monkeypatch.setitem(sparse_lth.masks.CRITERIA, "change", None)  # is gone again afterwards
    exec(compile(code, "snippet", "exec"), reader)


@pytest.mark.parametrize("line", _cases(_commands()))
def test_command_is_one(line, monkeypatch):
    for words in _split(line):
        _check(words, monkeypatch)


def test_a_command_that_is_none_is_noticed(monkeypatch):
    for line in (
        "python main.py --prune-rounds-of 3",
        "python main.py --prune_pc 2",
        "python -m benchmarks.blocksizes --shape 3",
        "python -m sparse_lth.experiments draw runs/paper",
        "pytest benchmarks/bench_none.py --benchmark-only",
        "pytest benchmarks/bench_cpu.py -k nothing_like_it",
        "pytest -m fast",
        "pip install -e '.[everything]'",
        "make",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            test_command_is_one(line, monkeypatch)


def _split(line):
    """The commands of a line, without the paths of their interpreters."""
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(line, comments=True)]
    while "&&" in words:
        yield words[: words.index("&&")]
        words = words[words.index("&&") + 1 :]
    if words:
        yield words


class _Parsed(Exception):
    """Raised in place of what a program would go on to do with its flags."""


def _check(words, monkeypatch):
    program, *args = words
    if program in ("python", "python3") and args[0] == "-m" and args[1] in ("pytest", "venv"):
        program, *args = args[1:]
    if program in ("python", "python3"):
        _check_python(args, monkeypatch)
    elif program == "pytest":
        _check_pytest(args)
    elif program == "pip":
        assert args[0] == "install"
        for extra in re.findall(r"\.\[(.*)\]", " ".join(args)):
            assert re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE), extra
    else:
        assert program in OTHERS, f"expected a command that can be checked, got {program}"
        assert args[0] in OTHERS[program]


def _check_python(args, monkeypatch):
    if args[0] == "-c":
        exec(compile(args[1], "command", "exec"), {})
    elif args[0] == "main.py":
        if args[1:2] == ["report"]:
            flags.build_report_parser().parse_args(args[2:])
        elif args[1:2] != ["--help"]:
            given = vars(flags.build_parser().parse_args(args[1:]))
            if "resume" not in given:
                given.pop("out_dir", None)
                _config(given)
    else:
        _, module, *rest = args
        module = module.replace("sparse_lth.experiments", "sparse_lth.experiments.paper")
        _parse(importlib.import_module(module).main, rest, monkeypatch)


def _config(given):
    try:
        command.new_config(given)
    except ValueError as error:
        raise AssertionError(str(error)) from error


def _parse(main, args, monkeypatch):
    """Has a program read its flags, and stops it there; SystemExit where they are wrong."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, argv=None, namespace=None):
        parse(self)
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(sys, "argv", ["program", *args])
        with pytest.raises(_Parsed):
            main()


def _check_pytest(args):
    paths, names = [], args[:]
    while names:
        name = names.pop(0)
        if not name.startswith("-"):
            assert (ROOT / name).exists(), name
            paths.append(ROOT / name)
            continue
        assert name in PYTEST_FLAGS, name
        value = names.pop(0) if PYTEST_FLAGS[name] else None
        if name == "-m":
            assert f'    "{value}: ' in PROJECT
        if name == "-k":
            assert re.search(rf"def test_\w*{value}", "".join(p.read_text() for p in paths))


def test_ci_runs_the_test_command():
    """.ci/run takes the second fenced block of the README."""
    awk = re.search(r"awk '(.*)' README", (ROOT / ".ci/run").read_text())[1]
    taken = subprocess.check_output(["awk", awk, README], text=True)
    second = [*FENCE.finditer(README.read_text())][1]
    assert second[1] == "sh"
    assert taken == second[2]
    assert taken.rstrip().endswith("-m pytest")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in LINK.findall(FENCE.sub("", path.read_text())):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text()), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_every_page_is_in_the_site_and_linked_from_the_readme():
    text = "\n".join(
        line for line in (ROOT / "mkdocs.yml").read_text().splitlines() if "!!" not in line
    )
    nav = [*(page for entry in yaml.safe_load(text)["nav"] for page in entry.values())]
    pages = {path.name for path in ROOT.glob("docs/*.md")}
    assert {*nav} == pages | {"README.md", "kernels/README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    linked = {*LINK.findall(README.read_text())}
    assert {f"docs/{name}" for name in pages - {"api.md"}} <= linked


def test_every_flag_is_on_its_page():
    page = (ROOT / "docs/program.md").read_text()
    known = {name for action in flags.build_parser()._actions for name in action.option_strings}
    shown = {*re.findall(r"`(--[\w-]+)", page)}
    assert shown <= known | {"--logdir"}
    longest = {name.replace("-", "_") for name in known if name.startswith("--")}
    assert longest - {"__help"} <= {name.replace("-", "_") for name in shown}


def test_every_public_name_is_on_the_page_of_the_api():
    objects = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    for name in objects:
        module, _, attribute = name.rpartition(".")
        module = module.replace("kernels.", "sparse_lth.kernels.", module.startswith("kernels."))
        assert hasattr(importlib.import_module(module), attribute), name
    assert {*sparse_lth.__all__} <= {name.rpartition(".")[2] for name in objects}


def test_every_claim_is_on_the_page_of_the_paper():
    page = (ROOT / "docs/paper.md").read_text()
    for pair in claims.PAIRS:
        assert f"| {pair.text} | {pair.kind} |" in page
    for claim, why in claims.BEYOND:
        assert f"- {claim} {why}" in page


FOUND = {"at the paper's length": "paper-full", "scaled": "paper-scaled"}
MEASURES = {
    "early stop": measures.EARLY_ITERATION,
    "test accuracy there": measures.EARLY_ACCURACY,
    "at the end": measures.END_ACCURACY,
}
METHODS = {
    "ticket": "winning ticket",
    "drawn anew": "random reinit",
    "random mask": "random mask",
    "one shot": "one-shot",
}


@pytest.fixture(scope="module", params=FOUND)
def found(request):
    """A section of the page of the paper, and the results that it is about."""
    page = (ROOT / "docs/paper.md").read_text()
    section = page.partition(f"## What was found, {request.param}\n")[2].partition("\n## ")[0]
    return section, results.read(ROOT / "docs" / FOUND[request.param])


def test_the_page_of_the_paper_has_the_verdicts_of_its_results(found):
    section, trainings = found
    judged = judge(trainings)
    counts = [sum(c.verdict == verdict for c in judged) for verdict in (HOLDS, FAILS, UNDECIDED)]
    said = "Of the {} claims that are about these networks {} hold, {} do not, and {} are not"
    assert said.format(sum(counts), *counts) in section
    held = [f"{c.text} {c.measured}." for c in judged if c.verdict == HOLDS]
    held = [re.sub(r" \(\d+ prunings\)", "", claim).lower() for claim in held]
    assert re.findall(r"^- (.*)$", section.lower(), re.MULTILINE) == held


def test_the_page_of_the_paper_has_the_means_of_its_results(found):
    section, trainings = found
    lines = re.findall(r"^\|(.*)\|$", section, re.MULTILINE)
    (_, *titles), _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    for kept, *cells in rows:
        for title, cell in zip(titles, cells, strict=True):
            start, _, method = title.rpartition(", ")
            if start:
                measure = MEASURES[start]
            values = [
                measure.of(training)
                for training in trainings
                if (training[0]["method"], training[0]["blocksize"]) == (METHODS[method], "1x1")
                and f"{100 * training[0]['density']:.1f} %" == kept
            ]
            if cell:
                assert len(values) == 5
                assert measure.value.format(mean(values)).removeprefix("iteration ") == cell


def test_one_version_everywhere():
    version = re.search(r'^version = "(.*)"', PROJECT, re.MULTILINE)[1]
    changes = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version == changes[1]


def test_workflows_are_yaml_and_run_what_is_here():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        assert yaml.safe_load(path.read_text())["jobs"], path
    assert "bash .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_blocksizes_prints_a_table_and_draws_it(tmp_path, monkeypatch, capsys):
    from benchmarks import blocksizes

    quick = functools.partial(sparse_lth.benchmark, rivals=())
    monkeypatch.setattr(blocksizes, "benchmark", quick)
    monkeypatch.setattr(blocksizes, "TURNS", 2)
    small = ["--shape", "32x16", "--batch", "1", "3", "--blocksizes", "1x1", "16x4"]
    blocksizes.main([*small, "--densities", "0.5", "--plot", str(tmp_path / "x.svg")])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows] == 2 * ["| blocks", "| ---", "| 1x1", "| 16x4"]
    assert all(float(row.split("|")[2]) > 0 for row in rows if "x" in row)
    assert (tmp_path / "x.svg").read_text().count("batch ") >= 2


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "its blocks" in (tmp_path / "api.html").read_text()
