"""Collects the rows of a benchmark run, and closes it with their speedups."""

import subprocess

import pytest
import torch

from benchmarks import gpu, summary


def pytest_addoption(parser):
    parser.addoption(
        "--full-grid", action="store_true", help="on a GPU, every case: hours instead of minutes"
    )


def pytest_configure(config):
    config.speedups = {}  # what bench_linear records: {(layer, batch): {(blocksize, density): x}}
    config.gpu_rows = []


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
    table = config.speedups
    if not table:
        return
    columns = sorted({column for row in table.values() for column in row}, reverse=True)
    lines = [
        ["blocksize", *(f"{blocksize}x{blocksize}" for _, blocksize in columns)],
        ["density", *(f"{density:g}" for density, _ in columns)],
    ]
    for (layer, batch), row in table.items():
        cells = [f"{row[column]:.2f}" if column in row else "" for column in columns]
        lines.append([f"{layer} batch {batch}", *cells])
    terminalreporter.section("speedup of sparse over dense, below 1 where it is slower")
    for first, *cells in lines:
        terminalreporter.write_line(f"{first:24}" + "".join(f"{cell:>7}" for cell in cells))
