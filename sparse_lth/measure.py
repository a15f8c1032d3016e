"""Dense against pruned on this machine: accuracy, latency, throughput, bytes."""

from pathlib import Path
from statistics import median
from timeit import Timer

import safetensors.torch
import torch
from torch import Tensor, nn

from .data import Split
from .layers import SparseLinear
from .ticket import Ticket, load_sparse
from .training import evaluate


def latencies(models: dict[str, nn.Module], x: Tensor, repeats: int = 7) -> dict[str, float]:
    """Median seconds of one inference of each model on x.

    The models take turns, so that a busy moment of the machine falls on all of them.
    """
    timers = {name: Timer(lambda m=model: _run(m, x)) for name, model in models.items()}
    times = {name: [] for name in models}
    with torch.inference_mode():
        runs = {name: max(3, timer.autorange()[0] // 4) for name, timer in timers.items()}  # 50 ms
        for _ in range(repeats):
            for name, timer in timers.items():
                times[name].append(timer.timeit(runs[name]) / runs[name])
    return {name: median(values) for name, values in times.items()}


def _run(model: nn.Module, x: Tensor) -> None:
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()


def compare(ticket: Ticket, sparse_path: Path, test: Split) -> dict:
    """The exported model, as a user loads it, against the dense network of the same shape.

    -> {"device", "backend", "threads", "density" of the masks and "stored_density" of the file,
    both over all weights, and "rows": {"measure", "unit", "dense", "pruned", "gain"}}; gain is how
    many times better the pruned network is, below 1 where it is worse
    """
    dense = ticket.dense_network().to(test.images.device)
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
        seconds = latencies({"dense": dense, "pruned": sparse}, images)
        if batch == 1:
            row = {"measure": "latency, batch 1", "unit": "µs"}
            row |= {name: 1e6 * s for name, s in seconds.items()}
        else:
            row = {"measure": f"throughput, batch {batch}", "unit": "images/s"}
            row |= {name: batch / s for name, s in seconds.items()}
        rows.append({**row, "gain": seconds["dense"] / seconds["pruned"]})
    sizes = len(safetensors.torch.save(dense.state_dict())), sparse_path.stat().st_size
    row = {"measure": "file size", "unit": "bytes", "dense": sizes[0], "pruned": sizes[1]}
    rows.append({**row, "gain": sizes[0] / sizes[1]})
    return {
        "device": torch.cuda.get_device_name() if test.images.is_cuda else "cpu",
        "backend": "torch",
        "threads": torch.get_num_threads(),
        "density": ticket.density,
        "stored_density": stored_density(sparse, ticket),
        "rows": rows,
    }


def stored_density(sparse: nn.Module, ticket: Ticket) -> float:
    """Weights that the converted model stores / all weights, biases not counted."""
    stored = total = 0
    for name, mask in ticket.masks.items():
        layer = sparse.get_submodule(name)
        stored += mask.numel() * (layer.density if isinstance(layer, SparseLinear) else 1)
        total += mask.numel()
    return stored / total
