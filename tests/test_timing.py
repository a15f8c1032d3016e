import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparse_lth import SparseLinear, benchmark
from sparse_lth.timing import Benchmark, Times, in_turn


def test_percentiles_and_speedups_of_known_times():
    dense, sparse = Times((4.0, 5.0, 6.0, 7.0, 8.0)), Times((2.0, 2.0, 2.0, 2.0, 16.0))
    assert (dense.p50, sparse.p50) == (6.0, 2.0)
    assert dense.p20 < dense.p50 < dense.p80
    assert sparse.over(dense).turns == (2.0, 2.5, 3.0, 3.5, 0.5)


def test_the_best_dense_is_the_fastest_form_of_the_baseline_and_no_other_model():
    times = {
        "dense": Times((4.0, 4.0)),
        "dense, compiled": Times((3.0, 3.0)),
        "denser": Times((1.0, 1.0)),
        "pruned": Times((2.0, 2.0)),
    }
    found = Benchmark(times, "dense", {"dense, bfloat16": "no such kernel"})
    assert found.best_dense == "dense, compiled"
    assert found.speedup("pruned").p50 == 1.5
    assert found.speedup("pruned", over="dense").p50 == 2.0
    *rows, left_out = str(found).splitlines()[1:]
    assert [row.split()[-1] for row in rows] == ["0.75", "1.00", "3.00", "1.50"]
    assert left_out == "dense, bfloat16 was left out: no such kernel"
    assert Benchmark(times, None, {}).best_dense is None


def test_calls_take_turns():
    order = []
    in_turn({name: lambda name=name: order.append(name) for name in "ab"}, turns=3)
    changes = [a for a, b in zip(order, [*order[1:], ""], strict=True) if a != b]
    assert changes[-6:] == ["a", "b"] * 3


@pytest.mark.parametrize(
    "inputs", [torch.randn(2, 8), (torch.randn(2, 8),), {"input": torch.randn(2, 8)}]
)
def test_models_run_on_any_form_of_inputs_beside_their_dense_rivals(inputs):
    models = {"dense": nn.Sequential(nn.Linear(8, 8)), "pruned": nn.Sequential(SparseLinear(8, 8))}
    found = benchmark(models, inputs, rivals=("one call", "bfloat16"), turns=3)
    assert [*found.times] == ["dense", "pruned", "dense, one call", "dense, bfloat16"] or (
        isinstance(inputs, dict) and found.left_out.keys() == {"dense, one call"}
    )


def test_a_rival_that_cannot_run_is_left_out_with_the_reason():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    found = benchmark(
        {"dense": Odd(8, 8)}, torch.randn(2, 8), rivals=("one call", "bfloat16"), turns=2
    )
    assert "expected an nn.Sequential, got Odd" in found.left_out["dense, one call"]
    assert found.left_out["dense, bfloat16"].startswith("RuntimeError")
    assert found.best_dense == "dense"


def test_without_a_baseline_nothing_is_compared():
    found = benchmark({"mine": nn.Linear(8, 8)}, torch.randn(2, 8), turns=2)
    assert found.best_dense is None
    assert found.speedup("mine").p50 == 1


def test_models_are_timed_in_eval_mode_and_left_as_they_were():
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(8, 8), norm)
    model[0].eval()
    benchmark({"dense": model}, torch.randn(4, 8), rivals=(), turns=2)
    assert norm.num_batches_tracked == 0
    assert [m.training for m in model.modules()] == [True, False, True]


def test_a_dense_model_that_masks_slow_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="expected 'dense' without masks, which slow it"):
        benchmark({"dense": model}, torch.randn(2, 8), turns=2)
    benchmark({"masked": model}, torch.randn(2, 8), turns=2)
