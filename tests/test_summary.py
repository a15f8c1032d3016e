"""The table and the plot of a run, of made-up figures."""

import json

import pytest

from benchmarks import gpu, summary

MACHINE = {"name": "GPU A1", "driver": "1.2", "torch": "2.9", "cuda": "13.0", "triton": "3.5"}


def _measure(case):
    """A kept weight takes its share of 100 us."""
    return gpu.row(case, {"p50_us": 100 * case.density}, flop=1e6, limit=20.0)


@pytest.fixture
def report(tmp_path):
    """pytest-benchmark's JSON, with a row of a CPU among them."""
    cases = gpu.grid((4096,), ((4096, 4096),), ("bfloat16",), ((64, 64),), (0.5, 0.1))
    rows = [gpu.compared(case, _measure, _measure, "linear") for case in cases]
    rows.append({"device": "cpu", "speedup": 2.0})
    path = tmp_path / "run.json"
    benchmarks = [{"extra_info": row} for row in rows]
    info = {"machine_info": {"gpu": MACHINE}, "datetime": "2020-01-02T03:04:05"}
    path.write_text(json.dumps(info | {"benchmarks": benchmarks}))
    return path


def test_a_run_is_kept_with_its_gpu_its_table_and_its_plot(report, tmp_path, capsys):
    out = tmp_path / "results"
    summary.main([str(report), "--out", str(out)])
    kept = json.loads((out / "GPU-A1.json").read_text())
    assert [kept[name] for name in ("gpu", "driver", "date")] == ["GPU A1", "1.2", "2020-01-02"]
    assert [row["backend"] for row in kept["rows"]] == ["dense", "sparse_lth", "sparse_lth"]
    table = (out / "GPU-A1.md").read_text()
    assert "| linear | 4096 | 64x64 | sparse_lth | 2.00 | 10.00 |" in table
    assert "GPU A1 (driver 1.2, cuda 13.0, torch 2.9, triton 3.5), 2020-01-02" in table
    assert table in capsys.readouterr().out
    drawn = (out / "GPU-A1.svg").read_text()
    assert drawn.startswith("<?xml")
    summary.main([str(out / "GPU-A1.json"), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "GPU-A1.md").read_text() == table


def test_the_plot_has_a_line_for_each_blocksize(report):
    (axes,) = summary.figure(summary.load(report)).axes
    line, one = axes.lines
    assert line.get_label() == "sparse_lth 64x64"
    assert list(zip(*line.get_data(), strict=True)) == [(0.1, 10.0), (0.5, 2.0)]
    assert set(one.get_ydata()) == {1}


def test_a_row_says_what_it_is(report):
    *_, row = summary.load(report)["rows"]
    assert row["share_of_limit"] == 0.5
    text = " ".join(summary.line(row).split())
    assert text == (
        "linear 4096x4096 batch 4096 bfloat16 64x64 0.1 sparse_lth 10.0 us 10.00x 50% of limit "
        "0.1 TFLOP/s"
    )


def test_what_is_missing_is_said(report, tmp_path):
    results = summary.load(report)
    with pytest.raises(ValueError, match="rows of 1024x1024 in bfloat16, got none"):
        summary.markdown(results, (1024, 1024))
    report.write_text(json.dumps({"benchmarks": [{"extra_info": {"device": "cpu"}}]}))
    with pytest.raises(ValueError, match="expected rows of a GPU"):
        summary.load(report)


@pytest.mark.parametrize(
    ("batch", "density", "dtype", "speedup"),
    [
        (1 << 20, 0.001, "bfloat16", 12.44),  # activations: 4096^2 / 8192 * 4.8 / 790
        (4096, 0.5, "bfloat16", 2.0),  # arithmetic
        (4096, 0.05, "bfloat16", 12.1),  # activations again, and a part of the weight
        (1, 0.5, "float32", 2.0),  # the reading of the weight
    ],
)
def test_the_limit_is_arithmetic_or_memory(batch, density, dtype, speedup):
    case = gpu.Case((4096, 4096), dtype, (64, 64), density, batch)
    assert gpu.limit(case) == pytest.approx(speedup, rel=0.01)


@pytest.mark.parametrize("full", [False, True])
def test_every_peer_gets_the_dense_row_it_is_compared_with(full):
    from benchmarks import bench_backward, bench_linear, bench_small_batch

    for module in (bench_linear, bench_backward, bench_small_batch):
        cases = module.gpu_cases(full)
        assert {case.dense() for case in cases} <= set(cases)
        assert all(case.density == 0.5 for case in cases if case.backend == "2:4")
