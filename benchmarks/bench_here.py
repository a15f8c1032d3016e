"""Is it faster here? The rows that `pytest benchmarks --benchmark-only` runs by itself on a CPU.

Networks with 10 % of their weights against the same networks dense. All rows of a network and a
batch are timed in turn, and pytest-benchmark's own table then shows some more calls of each.
"""

import functools

import pytest
import torch
from torch import nn

from benchmarks import peers
from benchmarks.bench_cpu import LENET, TURNS, dense_lenet, name_of, ticket_layers
from sparse_lth import SparseLinear, SparseSequential
from sparse_lth.kernels import backend
from sparse_lth.timing import Times, in_turn

BATCHES = [1, 128, 1024]
DENSITY = 0.1
NETWORKS = {  # its sizes
    "LeNet-300-100": LENET,
    "1024x1024": (1024, 1024),
    "4096x4096": (4096, 4096),
}
BLOCKSIZES = {f"sparse {name_of(blocksize)}": blocksize for blocksize in [(1, 1), (16, 16)]}
DENSE = ("torch", "torch bf16", "ONNX Runtime")  # of the peers


def dense_network(network: str) -> nn.Module:
    return dense_lenet() if network == "LeNet-300-100" else nn.Linear(*NETWORKS[network])


def sparse_network(network: str, blocksize) -> nn.Module:
    if network == "LeNet-300-100":
        return SparseSequential(*ticket_layers(DENSITY, blocksize))
    return SparseLinear(*NETWORKS[network], True, blocksize, DENSITY)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(network, batch) -> the calls and their times by row, and why the others cannot run."""

    @functools.cache
    def measure(network: str, batch: int) -> tuple[dict, dict[str, Times], dict[str, str]]:
        dense, x = dense_network(network).eval(), torch.rand(batch, NETWORKS[network][0])
        calls, left_out = {}, {}
        for name in DENSE:
            make, _ = peers.DENSE[name]
            try:
                calls[name] = make(dense, x, tmp_path_factory.mktemp("peer"))
            except pytest.skip.Exception as reason:
                left_out[name] = str(reason)
        for name, blocksize in BLOCKSIZES.items():
            calls[name] = functools.partial(sparse_network(network, blocksize), x)
        with torch.inference_mode():  # in which a sparse layer should not be made
            return calls, in_turn(calls, TURNS), left_out

    return measure


@pytest.mark.parametrize("row", [*DENSE, *BLOCKSIZES])
@pytest.mark.parametrize("batch", BATCHES, ids="batch:{}".format)
@pytest.mark.parametrize("network", NETWORKS)
def test_here(benchmark, tabulate, measured, network, batch, row):
    calls, times, left_out = measured(network, batch)
    if row in left_out:
        pytest.skip(left_out[row])
    benchmark.name, benchmark.group = row, f"{network}, batch {batch}"
    with torch.inference_mode():
        benchmark.pedantic(calls[row], rounds=5, warmup_rounds=1)
    own, best = times[row], min((times[n] for n in DENSE if n in times), key=lambda t: t.p50)
    speedup = own.over(times["torch"]).p50
    benchmark.extra_info |= {
        "device": f"cpu, {torch.get_num_threads()} threads",
        "backend": backend(torch.empty(0)).name if row in BLOCKSIZES else row,
        "shape": [batch, *NETWORKS[network]],
        "dtype": peers.DENSE[row][1] if row in DENSE else "float32",
        "blocksize": BLOCKSIZES.get(row),
        "density": DENSITY if row in BLOCKSIZES else 1.0,
        **{f"p{n} us": 1e6 * getattr(own, f"p{n}") for n in (20, 50, 80)},
        "speedup": speedup,
    }
    title = f"{network}: times as fast as dense float32 torch"
    tabulate(title, row, speedup, batch=batch)
    if row in BLOCKSIZES:
        tabulate(title, f"{row}, over the best dense", own.over(best).p50, batch=batch)
