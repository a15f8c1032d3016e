"""Dense against pruned on this machine: accuracy, latency, throughput, bytes."""

import math
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from statistics import median

import safetensors.torch
import torch
from torch import Tensor, nn

from ..base import BlockSparse
from ..int8 import Int8SparseLinear
from ..kernels import backend
from ..saving import load_sparse
from ..ticket import Ticket
from ..timing import Benchmark, Times, benchmark
from ..weights import weight_layers
from .data import Split
from .models import MODELS
from .tickets import dense_network, sparse_network
from .training import confusion, evaluate

DISAGREE = 2  # times as much of a gain in one part as in another
TURNS, PARTS = 101, 9  # on a busy machine, parts of a third as many turns each
SLACK = 0.5  # of a core that other programs may use: a desktop and the rounding of the load
SPARSE = BlockSparse | Int8SparseLinear


def summarise(tickets: Sequence[Ticket], test: Split) -> dict:
    """What was found and where, as JSON: what every figure of a report stands beside.

    tickets: of the dense network first, of the last round last

    -> "device" by its name, "threads", "python", "torch" and "triton", or None: versions, "density"
    of the masks, "trained": the rounds of training that made the pruned network, "images" in the
    test set, "confusion" of the "dense" and the "pruned" network on it, its `mean_image`, "layers":
    {"layer", "shape", "kept": weights} and, where it stays dense, "dense": why; "rows": the one of
    `accuracy`
    """
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    ticket, layers = tickets[-1], []
    for name, layer in weight_layers(MODELS[ticket.settings["model"]].empty()).items():
        mask = ticket.masks.get(name, torch.ones(layer.weight.shape, dtype=torch.bool))
        row = {"layer": name, "shape": [*layer.weight.shape], "kept": int(mask.sum())}
        if name in ticket.dense:
            row["dense"] = f"{ticket.dense[name]}; the density of the ticket does not count it"
        layers.append(row)
    device, images = test.images.device, len(test.labels)
    networks = {"dense": dense_network(tickets[0]), "pruned": dense_network(ticket)}
    fractions = (t.rounds[-1]["test_accuracy"] for t in (tickets[0], ticket))
    return {
        "device": device_name(device.type),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "density": ticket.density,
        "trained": len(ticket.rounds) if ticket.settings["rewind"] == "weights" else 1,
        "images": images,
        "confusion": {name: confusion(model.to(device), test) for name, model in networks.items()},
        "mean_image": mean_image(test.images),
        "layers": layers,
        "rows": [accuracy(*fractions, images)],
    }


def compare(tickets: Sequence[Ticket], sparse_path: Path, test: Split) -> dict:
    """The exported model, as a user loads it, against the dense network of the same shape.

    tickets: of the dense network first, of the last round last

    -> `summarise`, "backend", "stored" weights in each of its layers, "stored_density" over all,
    "latency" of each ticket's network at batch 1 in µs, "left_out": the ways to run the dense
    network that failed, and why, "busy": None or the load of a machine with other work and its
    cores, and three `speed` rows and one of bytes, whose "gain" is how many times smaller it is.
    """
    summary, device = summarise(tickets, test), test.images.device
    dense, sparse = dense_network(tickets[0]).to(device), load_sparse(sparse_path).to(device)
    summary["confusion"]["pruned"] = confusion(sparse, test)  # of int8, too
    fractions = tickets[0].rounds[-1]["test_accuracy"], evaluate(sparse, test)[1]
    sizes = len(safetensors.torch.save(dense.state_dict())), sparse_path.stat().st_size
    size = {"measure": "file size", "unit": "bytes", "dense": sizes[0], "pruned": sizes[1]}

    R, C = tickets[-1].settings["export_blocksize"]
    between = {str(n): sparse_network(t, (R, C)).to(device) for n, t in enumerate(tickets[1:-1])}
    busy, speeds, left_out = load_of_others(), [], {}
    for batch in (1, 64, 1024):
        models = {"dense": dense, "pruned": sparse, **(between if batch == 1 else {})}
        images = test.images[:1].expand(batch, -1, -1, -1).contiguous()
        found = benchmark(models, images, turns=PARTS * (TURNS // 3) if busy else TURNS)
        speeds.append(speed(found, batch, busy is not None))
        left_out |= found.left_out
        if batch == 1:
            times = [found.times[name].p50 for name in (found.best_dense, *between, "pruned")]

    for layer in summary["layers"]:
        module = sparse.get_submodule(layer["layer"])
        layer["stored"] = _stored(module)
        if not isinstance(module, SPARSE):
            layer.setdefault("dense", f"it has no empty {R}x{C} block")
    stored = sum(layer["stored"] for layer in summary["layers"])
    return {
        **summary,
        "backend": backend(test.images).name,
        "stored_density": stored / sum(math.prod(layer["shape"]) for layer in summary["layers"]),
        "latency": [1e6 * seconds for seconds in times],
        "left_out": left_out,
        "busy": busy,
        "rows": [
            accuracy(*fractions, len(test.labels)),
            *speeds,
            {**size, "gain": sizes[0] / sizes[1]},
        ],
    }


def accuracy(dense: float, pruned: float, images: int) -> dict:
    """The row of test accuracy, in percent; "noise" is the `interval` of the dense network."""
    low, high = interval(dense, images)
    row = {"measure": "test accuracy", "unit": "%", "dense": 100 * dense, "pruned": 100 * pruned}
    return {**row, "noise": [100 * low, 100 * high]}


def mean_image(images: Tensor) -> list[list[float]]:
    """images: (n, 1, height, width) -> (height, width), from 0 to 1"""
    mean = images.mean((0, 1))
    mean = (mean - mean.min()) / (mean.max() - mean.min()).clamp(min=1e-9)
    return [[round(grey, 2) for grey in row] for row in mean.tolist()]


def interval(fraction: float, images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy that was found on so many images."""
    z = 1.96
    middle = fraction + z**2 / (2 * images)
    half = z * math.sqrt(fraction * (1 - fraction) / images + (z / (2 * images)) ** 2)
    return (middle - half) / (1 + z**2 / images), (middle + half) / (1 + z**2 / images)


def speed(found: Benchmark, batch: int, busy: bool) -> dict:
    """The row of "pruned" against the best "dense", which was run as its "rival" says.

    "plain" is the dense network in plain torch. "gain_range" has the 20th and 80th percentile of
    the gain over the turns. On a busy machine, where a single turn says little, it is the range of
    PARTS measurements, each the gain of the medians of so many turns, and "disagree" whether one is
    more than DISAGREE times another.
    """
    names = {"plain": "dense", "dense": found.best_dense, "pruned": "pruned"}
    seconds = {name: found.times[model].p50 for name, model in names.items()}
    gains = found.speedup("pruned")
    gain_range = [gains.p20, gains.p80]
    if busy:
        dense, pruned = (_parts(found.times[names[name]]) for name in ("dense", "pruned"))
        parts = [d / p for d, p in zip(dense, pruned, strict=True)]
        gain_range = [min(parts), max(parts)]
    if batch == 1:
        row = {"measure": "latency, batch 1", "unit": "µs"}
        row |= {name: 1e6 * s for name, s in seconds.items()}
    else:
        row = {"measure": f"speed, batch {batch}", "unit": "images/s"}
        row |= {name: batch / s for name, s in seconds.items()}
    return {
        **row,
        "batch": batch,
        "rival": found.best_dense.removeprefix("dense, ").replace("dense", "plain torch"),
        "gain": seconds["dense"] / seconds["pruned"],
        "gain_range": gain_range,
        "disagree": busy and gain_range[1] > DISAGREE * gain_range[0],
    }


def _parts(times: Times) -> list[float]:
    """The medians of PARTS equal parts of the turns, one after the other."""
    size = len(times.turns) // PARTS
    return [median(times.turns[n * size : (n + 1) * size]) for n in range(PARTS)]


def load_of_others() -> list[float] | None:
    """The load of the machine and its cores, where other programs leave too few for this one."""
    if not hasattr(os, "getloadavg"):  # on Windows
        return None
    load, cores, threads = os.getloadavg()[0], os.cpu_count(), torch.get_num_threads()
    own = min(threads, time.process_time() / 60)  # what this program added in the last minute
    return [load, cores] if load - own + threads > cores + SLACK else None


def _stored(layer: nn.Module) -> int:
    """Weights in the file, biases and padding not counted."""
    if isinstance(layer, SPARSE):
        return round(layer.density * layer.in_features * layer.out_features)
    return layer.weight.numel()


def device_name(device: str) -> str:
    """What the system calls the GPU ("cuda") or the processor ("cpu"), or its architecture."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
