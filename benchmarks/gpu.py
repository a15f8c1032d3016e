"""Time of a call on a GPU, and what the others make of the same sparse layer."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_lth import SparseLinear, bsr
from tests.bounds import assert_close

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Of an H200, in bytes and FLOP per second, as kernels/README.md has them
L2, HBM, TENSOR = 5.5e12, 4.8e12, 700e12


def sparse_weight(out_features: int, in_features: int, density: float, blocksize, dtype) -> Tensor:
    """A dense (out_features, in_features) weight with random blocks of zeros."""
    rows, cols = bsr.grid_shape((out_features, in_features), blocksize)
    keep = torch.rand(rows * cols, device="cuda").argsort() < round(density * rows * cols)
    mask = keep.view(rows, cols)
    for dim, size in enumerate(blocksize):
        mask = mask.repeat_interleave(size, dim)
    weight = torch.randn(out_features, in_features, device="cuda", dtype=dtype)
    return weight * mask[:out_features, :in_features]


def ours(weight: Tensor, blocksize) -> nn.Module:
    dense = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    dense.weight = nn.Parameter(weight)
    return SparseLinear.from_dense(dense, blocksize=blocksize)


def contenders(density: float, blocksize) -> dict[str, Callable]:
    """By name, what makes a (batch, in) -> (batch, out) function of a weight."""

    def bsr_dense_addmm(weight):
        from torch.sparse import _triton_ops

        sparse = weight.to_sparse_bsr(blocksize)
        return lambda x: _triton_ops.bsr_dense_addmm(
            x.new_zeros(len(weight), len(x)), sparse, x.t(), beta=0
        ).t()

    def csr(weight):
        sparse = weight.to_sparse_csr()
        return lambda x: (sparse @ x.t()).t()

    def two_of_four(weight):
        kept = torch.tensor([True, True, False, False], device="cuda")
        weight.mul_(kept.repeat(-(-weight.shape[1] // 4))[: weight.shape[1]])
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        return lambda x: F.linear(x, sparse)

    found = {
        "dense": lambda weight: lambda x: F.linear(x, weight),
        "sparse_lth": lambda weight: ours(weight, blocksize).requires_grad_(False),
        "bsr_dense_addmm": bsr_dense_addmm,
        "csr": csr,
    }
    return found | ({"2:4": two_of_four} if density == 0.5 else {})


def device_times(calls: list[Callable[[], object]], graph: bool) -> dict[str, float]:
    """Microseconds of one call, p20, p50 and p80, with the calls taking turns.

    The calls do the same on different memory, more than the L2 in all (see `copies`). With graph
    the turns are captured and replayed, which leaves out what launching from Python costs.
    """
    for call in calls * 3:
        call()
    turn = [lambda: [call() for call in calls]] if graph else calls
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            turn[0]()
        turn = [captured.replay]
    times, spent = [], 0.0
    for run in itertools.islice(itertools.cycle(turn), 1000):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / (len(calls) if graph else 1))
        spent += times[-1] * (len(calls) if graph else 1)
        if spent > 2e5 and len(times) >= 20:
            break
    points = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8]))
    return dict(zip(("p20_us", "p50_us", "p80_us"), points.tolist(), strict=True))


def copies(touched: int) -> int:
    """How many copies of a problem of this many bytes are twice the L2."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, -(-2 * l2 // touched)))


def limit(out_features: int, in_features: int, density: float, blocksize) -> float:
    """The greatest speedup over cuBLAS that memory allows at a large batch in 16 bits.

    Activations must be read and written once, and a tile of 256 rows x one block row reads its
    inputs from L2.
    """
    R = blocksize[0]
    activations = out_features * in_features / (out_features + in_features) * HBM / TENSOR
    gather = min(1, L2 / TENSOR * 256 * R / (256 + R))
    return min(activations, gather / density)


def record(benchmark, times: dict, dense_times: dict, flop: float, **context) -> None:
    """A row: its context, times, speedup over dense, and TFLOP/s on the kept weights."""
    versions = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
    benchmark.extra_info.update(context | versions | times)
    benchmark.extra_info["speedup"] = dense_times["p50_us"] / times["p50_us"]
    benchmark.extra_info["tflops"] = flop / times["p50_us"] / 1e6


def check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y against x @ weight.T in float64."""
    x, weight = x.double(), weight.double()
    assert_close(y, F.linear(x, weight), F.linear(x.abs(), weight.abs()))
