"""Keeps the rows of a GPU run, as a table and a plot for the README.

    pytest benchmarks --benchmark-only --benchmark-json run.json
    python -m benchmarks.summary run.json

writes benchmarks/results/<gpu>.json, .md and .svg; given such a .json, it draws the others again.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def sizes(pair) -> str:
    return f"{pair[0]}x{pair[1]}"


def line(row: dict) -> str:
    """One row in words: what it is, the median time, and how that compares."""
    shape, blocks = sizes(row["shape"][::-1]), sizes(row["blocksize"])
    if row["backend"] == "dense":
        blocks = "-"
    return (
        f"{row['op']:20} {shape:>10} batch {row['batch']:<5} {row['dtype']:8} "
        f"{blocks:>7} {row['density']:<5g} {row['backend']:15} {row['p50_us']:10.1f} us "
        f"{row['speedup']:6.2f}x {row['share_of_limit']:5.0%} of limit {row['tflops']:6.1f} TFLOP/s"
    )


def load(path: Path) -> dict:
    """{"gpu", "driver", ..., "rows": [...]} of pytest-benchmark's JSON or of what this wrote."""
    found = json.loads(path.read_text())
    if "benchmarks" not in found:
        return found
    rows = [bench["extra_info"] for bench in found["benchmarks"]]
    rows = [row for row in rows if "share_of_limit" in row]  # those of a CPU have none
    if not rows:
        raise ValueError(f"expected rows of a GPU in {path}, got none")
    gpu = found["machine_info"]["gpu"]
    return {"gpu": gpu.pop("name"), **gpu, "date": found["datetime"][:10], "rows": rows}


def of_layer(results: dict, shape, dtype: str) -> list[dict]:
    """The sparse rows of one layer; shape: (out_features, in_features)"""
    found = [r for r in results["rows"] if tuple(r["shape"]) == shape and r["dtype"] == dtype]
    if not found:
        raise ValueError(f"expected rows of {sizes(shape[::-1])} in {dtype}, got none")
    return [row for row in found if row["backend"] != "dense"]


def markdown(results: dict, shape=(4096, 4096), dtype: str = "bfloat16") -> str:
    """Speedups over dense by density, for every batch, blocksize and backend of one layer."""
    cells = {}
    for row in of_layer(results, shape, dtype):
        key = row["op"], row["batch"], sizes(row["blocksize"]), row["backend"]
        cells.setdefault(key, {})[row["density"]] = row["speedup"]
    densities = sorted({density for row in cells.values() for density in row}, reverse=True)
    header = ["", "batch", "blocks", "backend", *(f"{density:.0%}" for density in densities)]
    versions = ", ".join(
        f"{name} {results[name]}" for name in ("driver", "cuda", "torch", "triton")
    )
    lines = [
        f"Speedup over dense cuBLAS by density, {sizes(shape[::-1])} in {dtype}, on one "
        f"{results['gpu']} ({versions}), {results['date']}:",
        "",
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
    ]
    for key, row in cells.items():
        speedups = [f"{row[density]:.2f}" if density in row else "" for density in densities]
        lines.append(f"| {' | '.join([*map(str, key), *speedups])} |")
    return "\n".join(lines) + "\n"


def figure(results: dict, shape=(4096, 4096), dtype: str = "bfloat16", batch: int = 4096) -> Figure:
    """Speedup of the forward pass against density, a line for each blocksize and backend."""
    lines = {}
    for row in of_layer(results, shape, dtype):
        if row["op"] == "linear" and row["batch"] == batch:
            key = row["backend"], sizes(row["blocksize"])
            lines.setdefault(key, []).append((row["density"], row["speedup"]))
    drawing = Figure(figsize=(7, 4.5), layout="constrained")
    axes = drawing.subplots()
    for (backend, blocks), points in lines.items():
        style = "o-" if backend == "sparse_lth" else "s--"
        axes.plot(*zip(*sorted(points), strict=True), style, label=f"{backend} {blocks}")
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel="speedup over dense cuBLAS")
    axes.set_title(f"{results['gpu']}: {sizes(shape[::-1])}, batch {batch}, {dtype}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.legend(fontsize="small")
    return drawing


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="of pytest-benchmark, or kept before")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder, by default %(default)s")
    args = parser.parse_args(argv)
    results = load(args.json)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / results["gpu"].replace(" ", "-")
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(results))
    figure(results).savefig(path.with_suffix(".svg"))
    print(markdown(results))


if __name__ == "__main__":
    main()
