"""Which blocks are fastest for a layer of yours, on this machine.

    python -m benchmarks.blocksizes --shape 4096x1024 --batch 1 128

prints, for each batch, how many times as fast as the best dense layer a block-sparse one is, by
blocksize and density. Below 1 it is slower. The blocks are random ones.
"""

import argparse
from itertools import product
from pathlib import Path

import torch
from torch import nn

from sparse_lth import SparseLinear, backends, benchmark
from sparse_lth.timing import Benchmark

BLOCKSIZES = ((1, 1), (16, 1), (16, 4), (16, 16), (64, 64))
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.5)
TURNS = 15


def pair(text: str) -> tuple[int, int]:
    """RxC, as in 16x16"""
    rows, cols = text.split("x")
    return int(rows), int(cols)


def name_of(blocksize: tuple[int, int], density: float) -> str:
    return f"{blocksize[0]}x{blocksize[1]} at {density:g}"


def measure(shape, batch: int, blocksizes, densities, device: str, dtype: torch.dtype) -> Benchmark:
    """shape: (out_features, in_features). The models are named by `name_of`, and "dense"."""
    where = {"device": device, "dtype": dtype}
    models = {"dense": nn.Linear(*shape[::-1], **where)}
    for blocksize, density in product(blocksizes, densities):
        layer = SparseLinear(*shape[::-1], True, blocksize, density, **where)
        models[name_of(blocksize, density)] = layer
    return benchmark(models, torch.randn(batch, shape[1], **where), turns=TURNS)


def table(found: Benchmark, blocksizes, densities) -> str:
    """In Markdown: a row for each blocksize, a column for each density."""
    lines = [f"| blocks | {' | '.join(f'{density:.0%}' for density in densities)} |"]
    lines.append("|" + " --- |" * (len(densities) + 1))
    for blocksize in blocksizes:
        cells = (f"{found.speedup(name_of(blocksize, d)).p50:.2f}" for d in densities)
        lines.append(f"| {blocksize[0]}x{blocksize[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[int, Benchmark], shape, blocksizes, densities, path: Path) -> None:
    """A panel for each batch, a line for each blocksize."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(4 * len(results), 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (batch, found) in zip(panels, results.items(), strict=True):
        for blocksize in blocksizes:
            speedups = [found.speedup(name_of(blocksize, d)).p50 for d in densities]
            axes.plot(densities, speedups, "o-", label=f"{blocksize[0]}x{blocksize[1]}")
        axes.axhline(1, color="0.5", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="density", title=f"batch {batch}")
        axes.xaxis.set_minor_formatter("")
        axes.yaxis.set_minor_formatter("")
        axes.set_xticks(densities, [f"{density:.0%}" for density in densities])
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel(f"speedup over the best dense {shape[0]}x{shape[1]}")
    panels[0].legend(fontsize="small")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", type=pair, default=(1024, 1024), help="outputs x inputs (default: 1024x1024)")
    add("--batch", type=int, nargs="+", default=[1, 128, 1024], help="(default: 1 128 1024)")
    add("--blocksizes", type=pair, nargs="+", default=BLOCKSIZES, metavar="RxC")
    add("--densities", type=float, nargs="+", default=DENSITIES)
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--plot", type=Path, metavar="FILE", help="draw the tables, as .png or .svg")
    args = parser.parse_args(argv)
    results, chosen = {}, (args.blocksizes, args.densities)
    kernels = {name: what for name, what in backends().items() if name != "torch"}
    print(", ".join(f"{name}: {what}" for name, what in kernels.items()))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}")
    for batch in args.batch:
        where = args.device, getattr(torch, args.dtype)
        results[batch] = found = measure(args.shape, batch, *chosen, *where)
        micro = 1e6 * found.times[found.best_dense].p50
        print(f"\nbatch {batch}, over {found.best_dense}, {micro:.3g} us a call:\n")
        print(table(found, *chosen), flush=True)
    if args.plot:
        plot(results, args.shape, *chosen, args.plot)


if __name__ == "__main__":
    main()
