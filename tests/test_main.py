import errno
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import main
from sparse_lth import Int8SparseLinear, SparseConv2d, SparseLinear, Ticket, load_sparse
from sparse_lth.program import data, measure
from sparse_lth.program.flags import build_parser, command_of, flags_of, new_config
from sparse_lth.program.folder import owned

ROOT = Path(main.__file__).parent
QUICK = ["--dataset", "digits", "--epochs", "1", "--prune_rounds", "1"]
TINY = ["--model", "lenet-15-5", *QUICK]


@pytest.fixture(autouse=True)
def _measure_in_no_time(monkeypatch):
    monkeypatch.setattr(measure, "TURNS", 3)
    monkeypatch.setattr(measure, "benchmark", partial(measure.benchmark, rivals=("one call",)))


def _run(*flags):
    return main.main([str(flag) for flag in flags])


def test_the_whole_path(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert _run(*QUICK, "--export-sparse", "--out-dir", run_dir) == 0
    out = capsys.readouterr().out
    assert "pruning 90%" in out.splitlines()[0]
    assert "--export-sparse" in out.splitlines()[0]
    assert out.splitlines()[0].startswith("lenet-300-100 on digits: ")
    ticket = Ticket.load(run_dir / "ticket.safetensors")
    assert ticket.settings["blocksize"] == [16, 16]
    assert "Nothing was rewound" in ticket.rewound
    for text in (out, (run_dir / "report.html").read_text("utf-8")):
        assert ticket.rewound in text
    assert ticket.density == pytest.approx(0.1, abs=0.005)
    assert load_sparse(run_dir / "sparse_model.safetensors")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("test_accuracy") for r in records[:2]] == [
        r["test_accuracy"] for r in ticket.rounds
    ]
    assert next(row["measure"] for row in records[2]["rows"]) == "test accuracy"
    assert {"config.json", "report.html", "tensorboard"} <= {p.name for p in run_dir.iterdir()}
    rounds = [Ticket.load(run_dir / f"ticket_round_{n}.safetensors") for n in range(2)]
    assert [ticket.density for ticket in rounds] == [1.0, ticket.density]


def test_a_report_is_drawn_again_from_the_folder_alone(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert _run(*TINY, "--export-sparse", "--blocksize", "2x2", "--out_dir", one) == 0
    out, page = capsys.readouterr().out, (one / "report.html").read_bytes()
    (one / "report.html").unlink()
    assert _run("report", one) == 0
    assert (one / "report.html").read_bytes() == page
    assert out.endswith(capsys.readouterr().out)
    assert _run(*TINY, "--seed", "1", "--out_dir", two) == 0
    capsys.readouterr()
    assert _run("report", one, two) == 0
    assert f"report: {tmp_path / 'comparison.html'}" in capsys.readouterr().out
    assert _run("report", one, two, "--out", tmp_path / "page.html") == 0
    pages = [(tmp_path / name).read_bytes() for name in ("comparison.html", "page.html")]
    assert pages[0] == pages[1]


def test_a_run_that_did_not_end_has_no_report(tmp_path, capsys):
    assert _run(*TINY, "--out_dir", tmp_path) == 0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    assert _run("report", tmp_path) == 1
    error = capsys.readouterr().err
    assert "expected the metrics of a finished run" in error
    assert f"python main.py --resume {tmp_path}" in error


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--prune_pc", "0.2"],
        ["--export-sparse"],
        ["--export-sparse", "--quantize", "int8"],
        ["--export-sparse", "--rewind", "init"],
        ["--export-sparse", "--scope", "erk"],
        ["--export-sparse", "--block_lasso", "0.1", "--rewind", "weights", "--last_lr", "linear"],
        ["--export-sparse", "--last_lr", "linear", "--blocksize", "16x4"],
        ["--export-sparse", "4x4", "--blocksize", "1x1"],
        ["--export-sparse", "--reinit"],
        ["--export-sparse", "8x8", "--model", "lenet-5", "--rewind", "500it", "--seed", "3"],
        ["--reinit", "--lr", "0.01", "--bs", "64", "--scope", "global", "--dataset", "digits"],
        ["--one-shot", "--prune_pc", "0.5", "--blocksize", "4x2", "--train-sparse", "off"],
    ],
)
def test_the_command_of_a_report_repeats_its_run(flags):
    def settings(flags):
        return new_config(vars(build_parser().parse_args(flags)))

    config = settings(flags)
    python, program, *again = shlex.split(command_of(flags_of(config)))
    assert (python, program) == ("python", "main.py")
    assert settings(again) == config


def test_without_flags_of_a_search_it_is_one_worth_seeing():
    for flags in ({}, {"dataset": "digits", "seed": 1}):
        assert new_config(flags) == new_config({**flags, "export_blocksize": None})
    assert new_config({"epochs": 2}).export_blocksize is None


def test_blocks_to_export_are_trained_as_is_best_for_blocks_unless_flags_say_how():
    def how(**flags):
        config = new_config({"export_blocksize": None, **flags})
        return config.scope, config.rewind, config.block_lasso, config.last_lr

    assert how() == how(blocksize=(8, 4)) == ("erk", "weights", 0.05, "linear")
    for flags in ({"blocksize": (1, 1)}, {"model": "lenet-5"}, {"rewind": "init"}):
        assert how(**flags) == ("layerwise", "init", 0, "constant")
    assert how(reinit=True) == how(scope="layerwise") == how(rewind="init")
    assert how(rewind="weights") == ("layerwise", "weights", 0, "constant")
    config = new_config({"prune_pc": 0.9, "blocksize": (8, 4)})
    assert (config.rewind, config.block_lasso) == ("init", 0)


def test_an_exported_lenet_5_keeps_a_tenth_of_all_its_weights(tmp_path, capsys):
    assert _run(*QUICK, "--model", "lenet-5", "--export-sparse", "--out-dir", tmp_path) == 0
    assert "1x1 blocks" in capsys.readouterr().out
    model = load_sparse(tmp_path / "sparse_model.safetensors")
    layers = {name: m for name, m in model.named_children() if hasattr(m, "bias")}
    assert {type(layers.pop(name)) for name in ("conv1", "conv2")} == {SparseConv2d}
    assert {type(layer) for layer in layers.values()} == {SparseLinear}
    stored = sum(len(m.weight_values) for m in model.modules() if hasattr(m, "weight_values"))
    all_weights = 150 + 2400 + 400 * 120 + 120 * 84 + 840
    assert stored / all_weights == pytest.approx(0.1, abs=1e-4)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["stored_density"] == pytest.approx(stored / all_weights)
    assert not any("dense" in layer for layer in last["layers"])


def test_an_exported_model_in_int8_is_a_thirtieth_of_the_dense_one(tmp_path):
    # ERK may keep more of fc2's last blocks, which are mostly padding
    flags = "--export-sparse", "--quantize", "int8", "--scope", "layerwise", "--out-dir", tmp_path
    assert _run(*QUICK, *flags) == 0
    path = tmp_path / "sparse_model.safetensors"
    layers = [type(m) for m in load_sparse(path).modules() if hasattr(m, "in_features")]
    assert layers == [Int8SparseLinear, Int8SparseLinear, nn.Linear]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    rows = {row["measure"]: row for row in last["rows"]}
    assert rows["file size"]["pruned"] == path.stat().st_size
    assert rows["file size"]["gain"] >= 30
    in_float32 = Ticket.load(tmp_path / "ticket.safetensors").rounds[-1]["test_accuracy"]
    assert rows["test accuracy"]["pruned"] == pytest.approx(
        100 * in_float32, abs=2.1
    )  # two of 99 images


def test_what_stays_dense_is_said_beside_the_density(tmp_path, capsys):
    flags = "--model", "lenet-5", "--export-sparse", "--blocksize", "16x1", "--out-dir", tmp_path
    assert _run(*QUICK, *flags) == 0
    out, page = capsys.readouterr().out, (tmp_path / "report.html").read_text("utf-8")
    for text in (out, page):
        assert "(conv1, fc3 dense)" in text
        assert "conv1 stays dense: expected blocks of at most (6, 25) to fit conv1" in text


def test_without_export_the_original_defaults_hold(tmp_path, capsys):
    assert _run(*QUICK, "--out_dir", tmp_path) == 0
    assert "pruning 20%" in capsys.readouterr().out
    settings = Ticket.load(tmp_path / "ticket.safetensors").settings
    assert settings["blocksize"] == [1, 1]
    assert not (tmp_path / "sparse_model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune_pc", "1.5"], "prune_pc: expected a fraction above 0 and below 1, got 1.5"),
        (["--prune_rounds", "0"], "prune_rounds: expected 1 to 1000, got 0"),
        (["--epochs", "0"], "epochs: expected 1 to 1000000000, got 0"),
        (["--bs", "-1"], "bs: expected 1 to 1000000000, got -1"),
        (
            ["--prune_pc", "0.9", "--blocksize", "100x300"],
            "expected to leave at least one of the 1 blocks of fc2, got a density of 0.1 there",
        ),
        (["--lr", "nan"], "lr: expected a finite number above 0, got nan"),
        (["--seed", "-1"], "seed: expected 0 or more, got -1"),
        (["--blocksize", "512x512"], "blocksize: expected blocks that fit a layer, the largest"),
        (["--blocksize", "0x4"], "blocksize: expected two sizes of at least 1, got (0, 4)"),
        (["--blocksize", "16"], "expected RxC, as in 16x16, got 16"),
        (["--export-sparse", "0x1"], "export_blocksize: expected two sizes"),
        (
            ["--rewind", "5"],
            "rewind: expected init, weights, or a step of round 0, as in 500it or 1ep, got 5",
        ),
        (["--reinit", "--rewind", "1ep"], "reinit: expected rewind init beside it, got rewind 1ep"),
        (["--block-lasso", "-1"], "block_lasso: expected a finite number of at least 0, got -1"),
        (["--block_lasso", "inf"], "block_lasso: expected a finite number of at least 0, got inf"),
        (["--rewind", "99999it"], "rewind: expected a step before the end of a round"),
        (["--rewind", "8ep"], "rewind: expected a step before the end of a round"),
        (["--export-sparse", "999x999"], "blocks smaller than a layer, the largest of which is"),
        (["--export-sparse", "100000x100000"], "export_blocksize: expected blocks smaller than"),
        (["--prune_pc", "1e-30"], "prune_pc: expected to prune at least one weight"),
        (["--bs", "99999999999999999999"], "bs: expected a whole number of 64 bits, got 9999"),
        (["--prune_rounds", "9" * 400], "prune_rounds: expected a whole number of 64 bits, got 9"),
        (["--out_dir", "a" * 300], "--out_dir: expected a new or empty folder, got aaa"),
        (["--out_dir", "caf\udce9"], r"--out_dir: expected a path in UTF-8, got 'caf\udce9'"),
        (["--resume", "caf\udce9"], "--resume: expected a path in UTF-8"),
        (["--data_dir", "caf\udce9"], "data_dir: expected a path in UTF-8"),
        (["--prune_percent", "1"], "unrecognized arguments: --prune_percent"),
        (["--dataset", "cifar"], "invalid choice: 'cifar'"),
        (["--resume", "/nowhere"], "--resume: expected the folder of a run, got /nowhere"),
        (["report", "/nowhere"], "report: expected the folder of a run, got /nowhere"),
        (["--lr", "1", "report", "x"], "unrecognized arguments: report x"),
    ],
)
def test_wrong_flags_get_one_message_and_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        _run(*flags)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        _run("--device", "cuda")
    assert "device: expected cpu or auto, since torch sees no GPU" in capsys.readouterr().err


def test_a_run_folder_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(SystemExit):
        _run(*QUICK, "--out_dir", tmp_path)
    assert f"expected a new or empty folder, got {tmp_path}" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_resume_takes_its_settings_from_the_run(tmp_path, capsys):
    assert _run(*QUICK, "--out_dir", tmp_path) == 0
    before = (tmp_path / "ticket.safetensors").read_bytes()
    assert _run("--resume", tmp_path, *QUICK, "--dataset", "auto") == 0
    assert (tmp_path / "ticket.safetensors").read_bytes() == before
    with pytest.raises(SystemExit):
        _run("--resume", tmp_path, "--lr", "1")
    assert "--lr: expected 0.001, as in the run to resume, got 1.0" in capsys.readouterr().err


def test_resume_compares_the_settings_with_those_in_the_state(tmp_path, capsys):
    assert _run(*QUICK, "--out_dir", tmp_path) == 0
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 1}))
    capsys.readouterr()
    assert _run("--resume", tmp_path) == 1
    expected = "expected a search with seed 1, as config.json has it, got the state of one with 0"
    assert expected in capsys.readouterr().err


def test_a_state_that_is_cut_is_refused_by_name(tmp_path, capsys):
    assert _run(*QUICK, "--out_dir", tmp_path) == 0
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    capsys.readouterr()
    assert _run("--resume", tmp_path) == 1
    error = capsys.readouterr().err
    assert "state.safetensors: expected a sparse_lth state" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_full_disk_loses_nothing_saved(tmp_path, capsys, monkeypatch):
    calls = 0

    def full(fd):
        nonlocal calls
        calls += 1
        if calls == 6:  # config, then state and metrics of two epochs, then a round's ticket
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flags = ["--dataset", "digits", "--epochs", "3", "--prune_rounds", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert _run(*flags, "--out_dir", tmp_path / "a") == 1
    error = capsys.readouterr().err
    assert "cannot write: No space left on device" in error
    assert "ticket_round_0.safetensors" in error
    assert f"--resume {tmp_path / 'a'}" in error
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 2
    assert not list((tmp_path / "a").glob("*.part"))
    assert _run("--resume", tmp_path / "a") == 0
    assert _run(*flags, "--out_dir", tmp_path / "b") == 0
    _assert_same_ticket(tmp_path / "a", tmp_path / "b")


def test_interrupt_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparse_lth.program.progress.watch", interrupt)
    assert _run(*QUICK, "--out_dir", tmp_path / "run") == 130
    error = capsys.readouterr().err
    assert error.splitlines() == [
        "error: interrupted",
        f"to go on: python main.py --resume {tmp_path / 'run'}",
    ]


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    assert _run(*QUICK, "--lr", "1e30", "--out_dir", tmp_path / "run") == 1
    assert "expected a finite loss, got nan" in capsys.readouterr().err


def test_a_rewind_step_that_only_the_data_show_to_be_late_leaves_no_folder(
    tmp_path, capsys, monkeypatch
):
    def no_mnist(*_):
        raise data.DownloadError("no net")

    flags = ["--dataset", "auto", "--data_dir", tmp_path / "data", "--epochs", "1", "--bs", "100"]
    monkeypatch.setattr(data, "_provide", no_mnist)
    with pytest.raises(SystemExit) as exit:
        _run(*flags, "--rewind", "15it", "--out_dir", tmp_path / "run")
    assert exit.value.code == 2
    assert "rewind: expected a step before the end of a round, 14 steps" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_runs_in_one_folder_are_not_both_accepted(tmp_path, capsys):
    with owned(tmp_path / "run", new=True):
        assert _run(*QUICK, "--out_dir", tmp_path / "run") == 1
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    error = capsys.readouterr().err
    assert error.startswith("error: expected a folder that no other run works in, got ")
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_the_settings_that_a_resumed_run_repeats_need_not_stand_alone(tmp_path):
    flags = ["--model", "lenet-15-5", "--blocksize", "5x5", "--prune_pc", "0.5"]
    assert _run(*QUICK, *flags, "--export-sparse", "--out_dir", tmp_path) == 0
    assert _run("--resume", tmp_path, "--prune_pc", "0.5", "--blocksize", "5x5") == 0
    assert _run("--resume", tmp_path, "--export-sparse") == 0


def _assert_same_ticket(a, b):
    assert (a / "ticket.safetensors").read_bytes() == (b / "ticket.safetensors").read_bytes()
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_search_killed_at_random_moments_ends_with_the_same_ticket(tmp_path):
    flags = ["--dataset", "digits", "--epochs", "20", "--prune_rounds", "3", "--prune_pc", "0.8"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def run_until(lines, *flags):
        """Kills the run after so many lines, of which most are epochs; None lets it end."""
        command = [sys.executable, "-u", "main.py", *map(str, flags)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(lines or 0):
                process.stdout.readline()
            if lines:
                process.send_signal(signal.SIGKILL)
            process.stdout.read()
        assert process.returncode == (-signal.SIGKILL if lines else 0)

    run_until(None, *flags, "--out_dir", whole)
    chance = random.Random()
    for lines in (*(chance.randint(1, 25) for _ in range(3)), None):
        begun = (killed / "config.json").exists()
        run_until(lines, *(["--resume", killed] if begun else [*flags, "--out_dir", killed]))
        if not (killed / "config.json").exists():
            assert not killed.exists() or not any(killed.iterdir())
    _assert_same_ticket(killed, whole)


def _program(*flags, shell="{}", **environment):
    """Runs the program in a shell, as a part of this command line -> the finished process."""
    command = shlex.join([sys.executable, str(ROOT / "main.py"), *map(str, flags)])
    return subprocess.run(
        ["bash", "-c", shell.format(command)],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=100,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        ("{} | head -1; exit ${{PIPESTATUS[0]}}", 141, "nobody reads the output any more"),
        ("{} >/dev/full", 1, "No space left on device"),
        ("{} >&-", 0, ""),
        ("{} 2>&-", 0, ""),
    ],
)
def test_an_output_that_nobody_takes(tmp_path, shell, status, said):
    ended = _program(*TINY, "--out_dir", tmp_path / "a b", shell=shell)
    assert ended.returncode == status
    error = ended.stderr.decode()
    assert said in error
    assert len(error.splitlines()) <= 2
    if status == 141:
        assert error.splitlines()[1].endswith(f"--resume '{tmp_path / 'a b'}'")
        assert _run("--resume", tmp_path / "a b") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_an_output_that_is_not_utf_8(tmp_path, environment):
    flags = [*TINY, "--export-sparse", "--blocksize", "2x2", "--out_dir", tmp_path]
    ended = _program(*flags, **environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"latency, batch 1" in ended.stdout


@pytest.mark.slow
def test_interrupts_at_random_moments_end_without_a_traceback(tmp_path):
    chance = random.Random()
    for attempt in range(10):
        flags = [*TINY, "--epochs", 99, "--out_dir", tmp_path / str(attempt)]
        seconds = chance.uniform(0.2, 4)  # the handler is there after some hundredths of a second
        ended = _program(*flags, shell=f"timeout -s INT --preserve-status {seconds} {{}}")
        assert ended.returncode == 130
        assert b"Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_while_its_settings_are_written_a_folder_can_be_used_again(tmp_path, call):
    script = (
        "import main, os, signal, sys\n"
        f"os.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main.main(sys.argv[1:])"
    )
    flags = [*TINY, "--out_dir", str(tmp_path)]
    killed = subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert {p.suffix for p in tmp_path.iterdir()} == {"", ".part"}
    assert _run(*flags) == 0
    assert not list(tmp_path.glob(".*.part"))


def test_help_needs_none_of_the_slow_libraries():
    script = (
        "import sys, main\n"
        "try: main.main(['--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torchvision', 'sklearn', 'tensorboard', 'rich', 'matplotlib'}\n"
        "print(slow & sys.modules.keys(), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr == "set()\n"
    assert "--prune_rounds" in ended.stdout


def test_one_shot_late_rewinding_is_in_the_ticket_and_goes_on_with_resume(tmp_path, capsys):
    flags = ["--one-shot", "--rewind", "1it", "--prune_pc", "0.8", "--prune_rounds", "3"]
    assert _run(*QUICK, *flags, "--out_dir", tmp_path) == 0
    assert "in one shot" in capsys.readouterr().out.splitlines()[0]
    ticket = Ticket.load(tmp_path / "ticket.safetensors")
    assert (ticket.settings["one_shot"], ticket.settings["rewind"]) == (True, "1it")
    assert len(ticket.rounds) == 2
    assert _run("--resume", tmp_path) == 0


def test_reinit_adds_a_control_to_each_round_and_finds_the_same_ticket(tmp_path, capsys):
    assert _run(*TINY, "--out_dir", tmp_path / "alone") == 0
    capsys.readouterr()
    assert _run(*TINY, "--reinit", "--out_dir", tmp_path / "beside") == 0
    said = capsys.readouterr().out
    assert "reinit test accuracy" in said
    alone, beside = (
        Ticket.load(tmp_path / name / "ticket.safetensors") for name in ("alone", "beside")
    )
    for group in ("init", "masks", "trained"):
        for name, tensor in getattr(alone, group).items():
            assert torch.equal(tensor, getattr(beside, group)[name]), (group, name)
    assert len(beside.rounds) == len(alone.rounds)
    for n, (a, b) in enumerate(zip(alone.rounds, beside.rounds, strict=True)):
        assert a == {name: value for name, value in b.items() if not name.startswith("reinit")}
        assert ("reinit_test_accuracy" in b) == (n > 0)
    lines = (tmp_path / "beside" / "metrics.jsonl").read_text().splitlines()
    controls = [record for record in map(json.loads, lines) if record.get("control")]
    assert {record["control"] for record in controls} == {"reinit"}
    assert controls[-1]["test_accuracy"] == beside.rounds[-1]["reinit_test_accuracy"]
