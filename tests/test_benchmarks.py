"""What `pytest benchmarks` runs by itself, and what is left of a run that is cut."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INTERRUPT = """
import pytest
done = 0
@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    global done
    done += 1
    if done == 3:
        raise KeyboardInterrupt
"""


def _pytest(*args, **environment):
    command = [sys.executable, "-m", "pytest", *map(str, args), "-p", "no:cacheprovider"]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def _files(*args):
    lines = _pytest(*args, "--collect-only", "-q").stdout.splitlines()
    return {line.partition("::")[0] for line in lines if "::" in line}


@pytest.mark.slow
def test_alone_it_runs_the_first_question_and_what_is_named_or_asked_for_whole():
    first = _files("benchmarks")
    assert "benchmarks/bench_here.py" in first
    assert "benchmarks/bench_cpu.py" not in first
    assert _files("benchmarks/bench_cpu.py") == {"benchmarks/bench_cpu.py"}
    everything = {f"benchmarks/{path.name}" for path in ROOT.glob("benchmarks/bench_*.py")}
    assert _files("benchmarks", "--full-grid") == everything


@pytest.mark.slow
def test_a_run_that_is_cut_still_prints_its_tables(tmp_path):
    (tmp_path / "interrupt.py").write_text(INTERRUPT)
    chosen = ["benchmarks", "--benchmark-only", "-k", "LeNet and batch:1-", "-p", "interrupt"]
    run = _pytest(*chosen, PYTHONPATH=str(tmp_path))
    assert run.returncode == 2  # pytest's own, of an interrupted run
    assert "Traceback" not in run.stdout + run.stderr
    assert "LeNet-300-100: times as fast as dense float32 torch" in run.stdout
    table = run.stdout.partition("LeNet-300-100: times")[2]
    assert [line.split()[:2] for line in table.splitlines()[2:4]] == [
        ["torch", "1.00"],
        ["torch", "bf16"],
    ]
    assert "more rows: add --full-grid" in table
    assert "'LeNet-300-100, batch 1': 2 tests" in run.stdout  # pytest-benchmark's own table
