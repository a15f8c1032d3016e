"""Forward of a block-sparse linear layer against the dense one: pytest benchmarks --benchmark-only

Where torch sees a GPU, the rows are those of `gpu_cases`, else those of `test_linear` on the CPU.
There each round times one dense call and then one sparse call, so that a busy moment of the machine
falls on both. Every row checks its output first.
"""

from functools import cache
from statistics import median, quantiles
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu
from sparse_lth import SparseLinear
from sparse_lth.kernels import backend
from sparse_lth.masks import expand, keep_highest
from tests.bounds import assert_close

DENSITIES = (0.5, 0.2, 0.1, 0.05)
BLOCKSIZES = (16, 32, 64)
LAYERS = ((784, 300), (1024, 1024), (4096, 4096))  # in_features, out_features
BATCHES = (1, 64, 1024)
DTYPE = torch.float32
SECONDS, ROUNDS = 0.3, (5, 500)  # for a row: about so long, at least and at most so often


@cache
def dense_case(in_features: int, out_features: int, batch: int) -> tuple[Tensor, nn.Linear]:
    """x: (batch, in_features), and the layer before it is pruned; the same in every row"""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features, dtype=DTYPE)
    weight = torch.randn(out_features, in_features, generator=generator)
    linear.weight.data.copy_(weight / in_features**0.5)
    linear.bias.data.copy_(torch.randn(out_features, generator=generator))
    x = torch.randn(batch, in_features, generator=generator)
    return x, linear


def random_mask(weight: Tensor, blocksize: int, density: float) -> Tensor:
    """bool of the weight's shape, round(density * blocks) blocks kept"""
    rows, cols = (-(-size // blocksize) for size in weight.shape)
    scores = torch.rand(rows, cols, generator=torch.Generator().manual_seed(1))
    blocks = keep_highest(scores, round(density * rows * cols))
    return expand(blocks, (blocksize, blocksize), weight.shape).to(weight.device)


def check(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Against float64."""
    magnitude = F.linear(x.abs(), weight.abs(), bias.abs()).double()
    assert_close(out, F.linear(x.double(), weight.double(), bias.double()), magnitude)


def percentiles(seconds: list[float], prefix: str = "") -> dict[str, float]:
    p20, *_, p80 = quantiles(seconds, n=5, method="inclusive")
    return {f"{prefix}p20": p20, f"{prefix}p50": median(seconds), f"{prefix}p80": p80}


def gpu_cases(full: bool) -> list[gpu.Case]:
    """16 rows and fewer are in bench_small_batch.py."""
    batches, largest, peers = (64, 256, 1024, 4096), ((4096, 4096),), gpu.PEERS
    if full:
        return gpu.grid(batches, dtypes=gpu.DTYPES, backends=("sparse_lth", *peers))
    return [
        *gpu.grid(batches, densities=(0.5, 0.1, 0.05)),
        *gpu.grid((4096,), largest, densities=(0.3, 0.2, 0.02)),
        *gpu.grid((4096,), largest, ("float16", "float32"), densities=(0.5, 0.1)),
        *gpu.grid((4096,), blocksizes=((64, 64),), densities=(0.5, 0.1), backends=peers),
    ]


@pytest.mark.gpu
def test_linear_on_a_gpu(gpu_row, case):
    gpu_row(gpu.compared, case, gpu.forward, gpu.dense_forward, "linear")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rows are those of the GPU")
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda sizes: f"{sizes[0]}x{sizes[1]}")
def test_linear(benchmark, tabulate, layer, batch, blocksize, density):
    x, linear = dense_case(*layer, batch)
    mask = random_mask(linear.weight, blocksize, density)
    sparse = SparseLinear.from_dense(linear, mask, (blocksize, blocksize))
    weight, bias = linear.weight.detach() * mask, linear.bias.detach()
    dense_times = []

    def run_dense() -> None:
        start = perf_counter()
        F.linear(x, weight, bias)
        dense_times.append(perf_counter() - start)

    with torch.inference_mode():
        check(sparse(x), x, weight, bias)
        start = perf_counter()
        run_dense(), sparse(x)
        rounds = round(SECONDS / (perf_counter() - start))
        rounds = max(ROUNDS[0], min(ROUNDS[1], rounds))
        dense_times.clear()
        benchmark.pedantic(sparse, (x,), setup=run_dense, rounds=rounds)
    if not benchmark.enabled:
        return
    dense, pruned = percentiles(dense_times, "dense_"), percentiles(benchmark.stats.stats.data)
    speedup = dense["dense_p50"] / pruned["p50"]
    benchmark.extra_info |= {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "shape": [batch, *layer],
        "density": density,
        "blocksize": [blocksize, blocksize],
        "backend": backend(x).name,
        **pruned,
        **dense,
        "speedup": speedup,
    }
    row, blocks = f"{layer[0]}x{layer[1]} batch {batch}", f"{blocksize}x{blocksize}"
    title = "speedup of sparse over dense, below 1 where it is slower"
    tabulate(title, row, speedup, density=density, blocksize=blocks)
