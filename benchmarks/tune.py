"""Measures tiles on this machine's GPU and keeps the best of each case for the layers to use.

    python -m benchmarks.tune --shape 4096x4096 --blocksizes 64x64 128x16 --dtypes bfloat16

A case is what `sparse_lth.kernels.tiles.Case` says; cases measured before are kept, and the dense
product competes too. Delete the file that it names to go back to the table that comes built in.
"""

import argparse
import itertools
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import gpu
from sparse_lth.kernels import linear_triton, sddmm_triton, tiles

MATMUL = [
    tiles.Tile(*sizes, warps, stages)
    for sizes, warps in [
        ((32, 32, 64), 2),
        ((64, 32, 64), 4),
        ((64, 64, 64), 4),
        ((128, 64, 64), 4),
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


@dataclass(frozen=True)
class Problem:
    """One layer and a batch: x (batch, in_features), grad (batch, out_features)."""

    layer: torch.nn.Module
    x: Tensor
    grad: Tensor

    def case(self, op: str) -> tiles.Case:
        layer = self.layer
        return tiles.case(
            op, self.x.dtype, len(self.x), layer.weight_values.shape, layer.pattern.grid
        )

    def run(self, op: str) -> Tensor:
        layer, pattern = self.layer, self.layer.pattern
        if op == "linear":
            return linear_triton.linear(
                self.x, layer.weight_values, pattern, None, layer.out_features
            )
        if op == "grad_input":
            return linear_triton.linear_grad_input(
                self.grad, layer.weight_values, pattern, layer.in_features
            )
        return sddmm_triton.sddmm(self.grad, self.x, pattern, layer.blocksize[::-1])


def candidates(case: tiles.Case) -> list[tiles.Tile | None]:
    """What to try; None is the dense product."""
    if case.op == "sddmm":
        return [None, *SDDMM]
    if case.batch == 1 and case.op == "linear":
        return [None, *ONE_ROW, *FEW_ROWS]
    return [None, *FEW_ROWS] if case.batch <= 16 else [None, *MATMUL]


def best(problem: Problem, op: str, table: dict) -> tiles.Tile | None:
    """The candidate with the least median time, through the launcher that users call."""
    case, times = problem.case(op), {}
    for tile in candidates(case):
        table[case.key()] = tile
        tiles.launch.cache_clear()
        try:
            times[tile] = gpu.device_times([lambda: problem.run(op)], graph=case.batch <= 64)
        except Exception as error:  # a tile that this GPU cannot take is no candidate
            print(f"  {tile}: {str(error).splitlines()[0]}")
    return min(times, key=lambda tile: times[tile]["p50_us"])


def pair(text: str) -> tuple[int, int]:
    rows, cols = text.split("x")
    return int(rows), int(cols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=pair, default=(4096, 4096), help="outputs x inputs")
    parser.add_argument("--blocksizes", type=pair, nargs="+", default=[(64, 64), (128, 16)])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 512, 4096])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "tune measures a CUDA device, and there is none\n")
    name = torch.cuda.get_device_name()
    table = tiles.tuned(name)  # what the launchers read, here while it is written
    path = tiles.tuned_path(name)
    for blocksize, dtype, batch, density in itertools.product(
        args.blocksizes, args.dtypes, args.batches, args.densities
    ):
        weight = gpu.weight_of(args.shape, dtype, blocksize, density)
        x, grad = (torch.randn(batch, n).to(weight) for n in args.shape[::-1])
        problem = Problem(gpu.ours(weight, blocksize), x, grad)
        for op in ("linear", "grad_input", "sddmm"):
            key = problem.case(op).key()
            table[key] = best(problem, op, table)
            print(f"{key}: {table[key] or 'dense'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
