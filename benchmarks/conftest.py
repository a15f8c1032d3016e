"""Collects the rows of a benchmark run, and closes it with their speedups.

`pytest benchmarks` runs bench_here.py and, on a GPU, a part of the grid there. --full-grid runs
all, and a file that is named runs whole.
"""

import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, summary
from sparse_lth.program.measure import load_of_others

HERE = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption(
        "--full-grid",
        action="store_true",
        help="every benchmark, and on a GPU every case of each: hours instead of minutes",
    )


def pytest_configure(config):
    config.tables = {}  # {(title, *names of a column's parts): {row: {column: value}}}
    config.gpu_rows = []
    config.left_for_the_full_grid = 0
    config.began = time.monotonic()


def pytest_collection_modifyitems(config, items):
    """Leaves the rows that answer the first question, unless others were asked for."""
    named = any(".py" in arg for arg in config.invocation_params.args)
    if config.option.full_grid or named:
        return
    chosen, left = [], []
    for item in items:
        in_benchmarks = item.path.parent == HERE
        wanted = item.path.name == "bench_here.py" or item.get_closest_marker("gpu")
        (chosen if wanted or not in_benchmarks else left).append(item)
    items[:] = chosen
    config.left_for_the_full_grid = len(left)
    config.hook.pytest_deselected(items=left)


def pytest_generate_tests(metafunc):
    """The rows of a module on a GPU; without one they are a single skip."""
    if "case" in metafunc.fixturenames:
        full, present = metafunc.config.option.full_grid, torch.cuda.is_available()
        metafunc.parametrize("case", metafunc.module.gpu_cases(full) if present else [], ids=str)


@pytest.fixture
def gpu_row(benchmark, pytestconfig):
    """Runs what measures a row, and keeps the row.

    The row has the device's times; what pytest-benchmark itself times is the checking and all.
    """

    def run(measure, *args):
        try:
            row = benchmark.pedantic(measure, args)
        except gpu.Unsupported as error:
            pytest.skip(str(error))
        benchmark.extra_info.update(row)
        pytestconfig.gpu_rows.append(row)

    return run


@pytest.fixture
def tabulate(pytestconfig):
    """tabulate(title, row, value, **column): a cell of a table that closes the run."""

    def add(title, row, value, **column):
        table = pytestconfig.tables.setdefault((title, *column), {})
        table.setdefault(row, {})[tuple(column.values())] = value

    return add


@pytest.hookimpl(optionalhook=True)  # of pytest-benchmark
def pytest_benchmark_update_machine_info(machine_info):
    if torch.cuda.is_available():
        import triton

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        machine_info["gpu"] = {
            "name": torch.cuda.get_device_name(),
            "driver": driver.split()[0],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter, config):
    if config.gpu_rows:
        terminalreporter.section("on the GPU")
        for row in config.gpu_rows:
            terminalreporter.write_line(summary.line(row))
    for (title, *names), table in config.tables.items():
        columns = sorted({column for row in table.values() for column in row})
        width = max(len(str(part)) for column in columns for part in column) + 2
        lines = [[name, *(str(c[part]) for c in columns)] for part, name in enumerate(names)]
        for name, row in table.items():
            lines.append([name, *(f"{row[c]:.2f}" if c in row else "" for c in columns)])
        terminalreporter.section(title)
        for first, *cells in lines:
            cells = "".join(f"{cell:>{max(7, width)}}" for cell in cells)
            terminalreporter.write_line(f"{first:32}{cells}")
    if config.tables and (busy := load_of_others()):
        terminalreporter.section("busy")
        terminalreporter.write_line(
            f"the load is {busy[0]:.1f} on {busy[1]} cores: other programs ran, so that these "
            "figures are not to be trusted; run it again when they are done"
        )
    if left := config.left_for_the_full_grid:
        done = len(terminalreporter.stats.get("passed", []))
        line = f"{left} more rows: add --full-grid, or name a file, as benchmarks/bench_cpu.py"
        if done:
            minutes = left / done * (time.monotonic() - config.began) / 60
            line += f"; about {max(1, round(minutes))} minutes here, at the pace of these rows"
        terminalreporter.section("more")
        terminalreporter.write_line(line)
