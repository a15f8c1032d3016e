"""The examples on small settings: what is exported is what loads, at the density asked for."""

import runpy
from pathlib import Path

import pytest
import torch

import sparse_lth
from sparse_lth.base import BlockSparse

FOLDER = Path(__file__).parent.parent / "examples"
SMALL = {"mlp": "1 1", "resnet": "50 1 1", "transformer": "2 1"}


def test_every_example_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_a_model_that_is_not_ours_is_searched_exported_loaded_and_timed(
    name, tmp_path, monkeypatch, capsys
):
    timed = []

    def quick(models, inputs):
        timed.append((models, inputs))
        return sparse_lth.timing.benchmark(models, inputs, rivals=(), turns=2)

    monkeypatch.setattr(sparse_lth, "benchmark", quick)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *SMALL[name].split()])
    script = FOLDER / f"{name}.py"
    assert len(script.read_text().splitlines()) < 40
    found = runpy.run_path(str(script), run_name="__main__")
    ticket, exported, loaded = (found[key] for key in ("ticket", "exported", "loaded"))
    total = sum(mask.numel() for mask in ticket.masks.values())
    R, C = ticket.settings["blocksize"]
    assert ticket.density == pytest.approx(0.1, abs=R * C / total)
    ((models, inputs),) = timed
    assert [*models] == ["dense", "pruned"]
    sparse = {n: m for n, m in loaded.named_modules() if isinstance(m, BlockSparse)}
    assert sparse.keys() == ticket.masks.keys()
    for layer, module in sparse.items():
        assert torch.equal(module.to_dense().weight != 0, ticket.masks[layer]), layer
    with torch.inference_mode():
        expected = exported(inputs)
        assert torch.equal(loaded.eval()(inputs), expected)
    dense = ticket.apply_(models["dense"], "trained").eval()
    with torch.inference_mode():
        torch.testing.assert_close(dense(inputs), expected, rtol=1e-4, atol=1e-4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Ticket(")
    assert sum(line.startswith(("dense", "pruned")) for line in lines) == 2
