"""Dense against pruned on this machine: accuracy, latency, throughput, bytes."""

import math
import platform
from importlib import metadata
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ..base import BlockSparse
from ..kernels import backend
from ..quantize import Int8SparseLinear
from ..saving import load_sparse
from ..ticket import Ticket
from ..timing import benchmark
from ..weights import weight_layers
from .data import Split
from .models import MODELS
from .tickets import dense_network
from .training import evaluate

SPARSE = BlockSparse | Int8SparseLinear


def summarise(ticket: Ticket, device: str) -> dict:
    """What was found and where, as JSON: what every figure of a report stands beside.

    -> {"device" by its name, "threads", "python", "torch", "triton" or None: versions,
    "density" of the masks, "layers": {"layer", "shape", "kept": weights} and, where it stays
    dense, "dense": why; "pixels": the first-layer weights that each of the 28 x 28 inputs keeps,
    None behind a convolution}
    """
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    kind = MODELS[ticket.settings["model"]]
    layers, masks = [], []
    for name, layer in weight_layers(kind.empty()).items():
        masks.append(ticket.masks.get(name, torch.ones(layer.weight.shape, dtype=torch.bool)))
        row = {"layer": name, "shape": [*layer.weight.shape], "kept": int(masks[-1].sum())}
        layers.append(row)
        if name in ticket.dense:
            row["dense"] = f"{ticket.dense[name]}; the density of the ticket does not count it"
    flat = masks[0].dim() == 2
    pixels = masks[0].sum(0).view(kind.input_shape[1:]).tolist() if flat else None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "density": ticket.density,
        "layers": layers,
        "pixels": pixels,
    }


def compare(ticket: Ticket, sparse_path: Path, test: Split) -> dict:
    """The exported model, as a user loads it, against the dense network of the same shape.

    -> `summarise`, "backend", "stored" weights in each of its layers, "stored_density" over all,
    and "rows": {"measure", "unit", "dense", "pruned"}; "gain" is how many times better the pruned
    network is, below 1 where it is worse; a row of speed has its "batch", and in "gain_range" the
    20th and 80th percentile of the gain over the turns. Dense is the faster of plain layers and
    all of them in one call, as the pruned network runs.
    """
    dense = dense_network(ticket).to(test.images.device)
    sparse = load_sparse(sparse_path).to(test.images.device)
    rows = [
        {
            "measure": "test accuracy",
            "unit": "%",
            "dense": 100 * ticket.rounds[0]["test_accuracy"],
            "pruned": 100 * evaluate(sparse, test)[1],
        }
    ]
    for batch in (1, 64, 1024):
        images = test.images[:1].expand(batch, -1, -1, -1).contiguous()
        found = benchmark({"dense": dense, "pruned": sparse}, images, rivals=("one call",))
        seconds = {"dense": found.times[found.best_dense].p50, "pruned": found.times["pruned"].p50}
        if batch == 1:
            row = {"measure": "latency, batch 1", "unit": "µs"}
            row |= {name: 1e6 * s for name, s in seconds.items()}
        else:
            row = {"measure": f"throughput, batch {batch}", "unit": "images/s"}
            row |= {name: batch / s for name, s in seconds.items()}
        gains = found.speedup("pruned")
        gain = {"gain": seconds["dense"] / seconds["pruned"], "gain_range": [gains.p20, gains.p80]}
        rows.append({**row, "batch": batch, **gain})
    sizes = len(safetensors.torch.save(dense.state_dict())), sparse_path.stat().st_size
    row = {"measure": "file size", "unit": "bytes", "dense": sizes[0], "pruned": sizes[1]}
    rows.append({**row, "gain": sizes[0] / sizes[1]})
    summary = summarise(ticket, test.images.device.type)
    for layer in summary["layers"]:
        module = sparse.get_submodule(layer["layer"])
        layer["stored"] = _stored(module)
        if not isinstance(module, SPARSE):
            R, C = ticket.settings["export_blocksize"]
            layer.setdefault("dense", f"it has no empty {R}x{C} block")
    stored = sum(layer["stored"] for layer in summary["layers"])
    stored_density = stored / sum(math.prod(layer["shape"]) for layer in summary["layers"])
    return {
        **summary,
        "backend": backend(test.images).name,
        "stored_density": stored_density,
        "rows": rows,
    }


def _stored(layer: nn.Module) -> int:
    """Weights in the file, biases and padding not counted."""
    if isinstance(layer, SPARSE):
        return round(layer.density * layer.in_features * layer.out_features)
    return layer.weight.numel()


def _cpu_name() -> str:
    """What the system calls the processor, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
