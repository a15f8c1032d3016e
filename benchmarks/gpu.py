"""The rows of the GPU benchmarks: their cases and contenders, how they are timed and checked."""

import copy
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_lth import SparseLinear, bsr
from sparse_lth.kernels.tiles import FP32, HBM, TENSOR
from tests.bounds import assert_close

SHAPES = ((300, 784), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008))
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
BLOCKSIZES = ((16, 16), (32, 32), (64, 64), (64, 16), (128, 16), (128, 64))
DTYPES = ("bfloat16", "float16", "float32")
PEERS = ("bsr_dense_addmm", "csr", "2:4")
SECONDS, TURNS = 0.05, (5, 500)  # for a row: about so long, at least and at most so often


class Case(NamedTuple):
    shape: tuple[int, int]  # out_features, in_features
    dtype: str
    blocksize: tuple[int, int]
    density: float
    batch: int
    backend: str = "sparse_lth"

    def __str__(self) -> str:
        sizes = ["x".join(map(str, size)) for size in (self.shape[::-1], self.blocksize)]
        return f"{sizes[0]}-{self.batch}-{self.dtype}-{sizes[1]}-{self.density}-{self.backend}"

    def dense(self) -> "Case":
        return self._replace(blocksize=self.shape, density=1.0, backend="dense")


def grid(
    batches,
    shapes=SHAPES,
    dtypes=("bfloat16",),
    blocksizes=BLOCKSIZES,
    densities=DENSITIES,
    backends=("sparse_lth",),
) -> list[Case]:
    """All combinations, after the dense row of each shape, dtype and batch."""
    found = itertools.product(shapes, dtypes, blocksizes, densities, batches, backends)
    cases = [Case(*c) for c in found if c[-1] != "2:4" or c[3] == 0.5]
    return [*dict.fromkeys(case.dense() for case in cases), *cases]


@functools.lru_cache(1)  # the cases of one weight follow each other
def weight_of(shape, dtype: str, blocksize, density: float, two_of_four: bool = False) -> Tensor:
    """(out_features, in_features) with random blocks of zeros, or with two zeros in every four."""
    weight = torch.randn(shape, device="cuda", dtype=getattr(torch, dtype))
    if two_of_four:
        return weight * (torch.arange(shape[1], device="cuda") % 4 < 2)
    rows, cols = bsr.grid_shape(shape, blocksize)
    keep = torch.rand(rows * cols, device="cuda").argsort() < round(density * rows * cols)
    mask = keep.view(rows, cols)
    for dim, size in enumerate(blocksize):
        mask = mask.repeat_interleave(size, dim)
    return weight * mask[: shape[0], : shape[1]]


def ours(weight: Tensor, blocksize, count: int = 1) -> list[SparseLinear]:
    dense = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    layer = SparseLinear.from_dense(dense, blocksize=blocksize).requires_grad_(False)
    return [copy.deepcopy(layer) for _ in range(count)]


def _bsr_dense_addmm(weight: Tensor, blocksize, count: int) -> list[Callable]:
    from torch.sparse import _triton_ops

    def product(sparse: Tensor, x: Tensor) -> Tensor:
        start = x.new_zeros(len(weight), len(x))
        return _triton_ops.bsr_dense_addmm(start, sparse, x.t(), beta=0).t()

    return [functools.partial(product, weight.to_sparse_bsr(blocksize)) for _ in range(count)]


def _csr(weight: Tensor, blocksize, count: int) -> list[Callable]:
    copies = [weight.to_sparse_csr() for _ in range(count)]
    return [lambda x, sparse=sparse: (sparse @ x.t()).t() for sparse in copies]


def _two_of_four(weight: Tensor, blocksize, count: int) -> list[Callable]:
    copies = [torch.sparse.to_sparse_semi_structured(weight) for _ in range(count)]
    return [functools.partial(F.linear, weight=sparse) for sparse in copies]


def _dense(weight: Tensor, blocksize, count: int) -> list[Callable]:
    return [functools.partial(F.linear, weight=weight.clone()) for _ in range(count)]


CONTENDERS = {  # make (batch, in) -> (batch, out) functions, each with memory of its own
    "dense": _dense,
    "sparse_lth": ours,
    "bsr_dense_addmm": _bsr_dense_addmm,
    "csr": _csr,
    "2:4": _two_of_four,
}


class Unsupported(Exception):
    """A peer cannot do a case."""


def forward(case: Case) -> dict:
    """The row of a forward pass: checked, then timed as replays of a CUDA graph.

    Only `csr` is called eagerly, since cuSPARSE need not be capturable; where that is slow, its
    time includes the launch. Raises Unsupported for a peer that refuses the case.
    """
    two_of_four = case.backend == "2:4"
    weight = weight_of(case.shape, case.dtype, case.blocksize, case.density, two_of_four)
    touched = case.density * weight.numel() + case.batch * sum(case.shape)
    xs = [
        torch.randn(case.batch, case.shape[1], device="cuda", dtype=weight.dtype)
        for _ in range(copies(touched * weight.itemsize))
    ]
    with torch.inference_mode():
        try:
            layers = CONTENDERS[case.backend](weight, case.blocksize, len(xs))
            y = layers[0](xs[0])
        except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
            if case.backend not in PEERS:
                raise
            raise Unsupported(f"{case.backend} cannot: {str(error).splitlines()[0]}") from error
        check(y, xs[0], weight)
        calls = [functools.partial(*pair) for pair in zip(layers, xs, strict=True)]
        times = device_times(calls, graph=case.backend != "csr")
    flop = 2 * case.batch * weight.count_nonzero().item()
    return row(case, times, flop, limit(case))


dense_forward = functools.cache(forward)  # a dense row is measured once


def compared(case: Case, measure: Callable, measure_dense: Callable, op: str) -> dict:
    """A row with its speedup over the dense row and the share of the limit that this is."""
    dense = measure_dense(case.dense())
    found = dense if case.backend == "dense" else measure(case)
    speedup = dense["p50_us"] / found["p50_us"]
    return found | {
        "op": op,
        "dense_p50_us": dense["p50_us"],
        "speedup": speedup,
        "share_of_limit": speedup / found["limit"],
    }


def row(case: Case, times: dict, flop: float, limit: float) -> dict:
    """flop: on kept weights; limit: the greatest speedup that memory allows"""
    context = case._asdict() | {"tflops": flop / times["p50_us"] / 1e6, "limit": limit}
    return context | times


def device_times(calls: list[Callable[[], object]], graph: bool) -> dict[str, float]:
    """Microseconds of one call, p20, p50 and p80, with the calls taking turns.

    The calls do the same on different memory, more than the L2 in all (see `copies`). With graph
    the turns are captured and replayed, which leaves out what launching from Python costs.
    """

    def turn() -> list:
        return [call() for call in calls]

    for _ in range(2):
        turn()
    run = turn
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            turn()
        run = captured.replay
    times = []
    while len(times) < TURNS[0] or (sum(times) < 1e3 * SECONDS and len(times) < TURNS[1]):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    scale = 1e3 / len(calls)
    points = (p20, statistics.median(times), p80)
    return {f"{name}_us": scale * t for name, t in zip(("p20", "p50", "p80"), points, strict=True)}


def copies(touched: float) -> int:
    """How many copies of a problem of this many bytes are twice the L2, up to 64: the smallest
    layers stay there, in a benchmark as in use."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, int(2 * l2 / touched) + 1))


def limit(case: Case) -> float:
    """The greatest speedup over cuBLAS, were this an H200: arithmetic on kept weights alone, every
    tensor read or written once.

    A product takes its arithmetic or its memory traffic, whichever is longer.
    """
    size, rate = (4, FP32) if case.dtype == "float32" else (2, TENSOR)
    weight = case.shape[0] * case.shape[1]

    def seconds(density: float) -> float:
        moved = size * (density * weight + case.batch * sum(case.shape))
        return max(2 * case.batch * density * weight / rate, moved / HBM)

    return seconds(1) / seconds(case.density)


def check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y against x @ weight.T in float64."""
    x, weight = x.double(), weight.double()
    assert_close(y, F.linear(x, weight), F.linear(x.abs(), weight.abs()))
