"""Closes a benchmark run with one table of speedups."""

import pytest


def pytest_configure(config):
    config.speedups = {}  # what bench_linear records: {(layer, batch): {(blocksize, density): x}}


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter, config):
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
