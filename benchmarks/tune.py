"""Measures tiles on this machine's GPU and keeps the best of each case for the layers to use.

    python -m benchmarks.tune --shape 4096x4096 --blocksizes 64x64 128x16 --dtypes bfloat16

A case is what `sparse_lth.kernels.tiles.Case` says; cases measured before are kept. Beside its best
tile is kept the density above which the dense product is faster. Delete the file that it names to
go back to the table that comes built in.
"""

import argparse
import functools
import itertools
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import gpu
from sparse_lth import SparseLinear
from sparse_lth.kernels import linear_triton, sddmm_triton, tiles

MATMUL = [
    tiles.Tile(*sizes, warps, stages)
    for sizes, warps in [
        ((32, 32, 64), 2),
        ((64, 32, 64), 4),
        ((64, 64, 64), 4),
        ((128, 64, 64), 4),
        ((256, 32, 64), 4),
        ((128, 128, 32), 8),
        ((128, 128, 64), 8),
        ((256, 64, 64), 8),
        ((256, 128, 64), 8),
    ]
    for stages in (3, 4)
]
FEW_ROWS = [
    tiles.Tile(16, block_n, block_k, warps, 4)
    for block_n in (16, 32)
    for block_k in (64, 128)
    for warps in (1, 2, 4)
]
ONE_ROW = [tiles.Tile(1, n, k, 4, 1) for n in (16, 32) for k in (128, 256, 512)]
SDDMM = [
    tiles.Tile(block_m, 128, block_k, warps, stages)
    for block_m in (32, 64)
    for block_k, warps in ((64, 4), (128, 8))
    for stages in (3, 4)
]


LOW, HIGH = 0.1, 0.5  # densities: tiles compete at the first, both say what density costs


@dataclass(frozen=True)
class Problem:
    """A layer and a batch, with copies enough that none stays in the GPU's L2 (see `gpu.copies`).

    xs: (batch, in_features) each; grads: (batch, out_features) each
    """

    layers: list[SparseLinear]
    xs: list[Tensor]
    grads: list[Tensor]

    @classmethod
    def make(cls, shape, dtype: str, blocksize, batch: int, density: float) -> "Problem":
        weight = gpu.weight_of(shape, dtype, blocksize, density)
        touched = density * weight.numel() + batch * sum(shape)
        count = gpu.copies(touched * weight.itemsize)
        xs, grads = (
            [torch.randn(batch, n, device="cuda", dtype=weight.dtype) for _ in range(count)]
            for n in shape[::-1]
        )
        return cls(gpu.ours(weight, blocksize, count), xs, grads)

    def case(self, op: str) -> tiles.Case:
        x = self.xs[0]
        return tiles.case(op, x.dtype, len(x), self.layers[0].weight_values.shape)

    def microseconds(self, op: str) -> float:
        """The median time of a call through the launcher that users call."""
        calls = [
            functools.partial(OPS[op], *copies)
            for copies in zip(self.layers, self.xs, self.grads, strict=True)
        ]
        return gpu.device_times(calls, graph=True)["p50_us"]


OPS = {
    "linear": lambda layer, x, grad: linear_triton.linear(
        x, layer.weight_values, layer.pattern, None, layer.out_features
    ),
    "grad_input": lambda layer, x, grad: linear_triton.linear_grad_input(
        grad, layer.weight_values, layer.pattern, layer.in_features
    ),
    "sddmm": lambda layer, x, grad: sddmm_triton.sddmm(
        grad, x, layer.pattern, layer.blocksize[::-1]
    ),
}


def candidates(case: tiles.Case) -> list[tiles.Tile]:
    """What to try."""
    if case.op == "sddmm":
        return SDDMM
    if case.batch == 1 and case.op == "linear":
        return [*ONE_ROW, *FEW_ROWS]
    return FEW_ROWS if case.batch <= 16 else MATMUL


def best(low: Problem, high: Problem, op: str, table: dict[str, tiles.Tuned]) -> tiles.Tuned:
    """The candidate with the least time, and where the dense product overtakes it.

    table: what the launchers read, here while they are measured
    """
    key = low.case(op).key()

    def timed(problem: Problem, tile: tiles.Tile, crossover: float) -> float:
        table[key] = tiles.Tuned(tile, crossover)
        tiles.launch.cache_clear()
        return problem.microseconds(op)

    times = {}
    for tile in candidates(low.case(op)):
        try:
            times[tile] = timed(low, tile, crossover=1)
        except Exception as error:  # a tile that this GPU cannot take is no candidate
            print(f"  {tile}: {str(error).splitlines()[0]}")
    tile = min(times, key=times.get)
    dense, more = timed(low, tile, crossover=0), timed(high, tile, crossover=1)
    print(f"  {LOW}: {times[tile]:.1f} us, {HIGH}: {more:.1f} us, dense: {dense:.1f} us")
    slope = max(1e-9, (more - times[tile]) / (HIGH - LOW))
    crossover = LOW + (dense - times[tile]) / slope
    return tiles.Tuned(tile, round(min(1.0, max(0.0, crossover)), 3))


def pair(text: str) -> tuple[int, int]:
    rows, cols = text.split("x")
    return int(rows), int(cols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=pair, default=(4096, 4096), help="outputs x inputs")
    parser.add_argument("--blocksizes", type=pair, nargs="+", default=[(64, 64), (128, 16)])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 512, 4096])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "tune measures a CUDA device, and there is none\n")
    name = torch.cuda.get_device_name()
    table = tiles.tuned(name)  # what the launchers read, here while it is written
    path = tiles.tuned_path(name)
    for blocksize, dtype, batch in itertools.product(args.blocksizes, args.dtypes, args.batches):
        low, high = (
            Problem.make(args.shape, dtype, blocksize, batch, density) for density in (LOW, HIGH)
        )
        for op in OPS:
            key = low.case(op).key()
            table[key] = best(low, high, op, table)
            print(f"{key}: {table[key]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
