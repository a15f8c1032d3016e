"""A step of LeNet-300-100 at the paper's batch of 60: eager, and on a GPU as one graph replay."""

import pytest
import torch

from sparse_lth.program.config import RunConfig
from sparse_lth.program.data import Dataset, Split, batches
from sparse_lth.program.lottery import Lottery, search_from
from sparse_lth.program.models import MODELS
from sparse_lth.program.training import make_step

STEPS = 100
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("device", "graphed"),
    [
        ("cpu", False),
        pytest.param("cuda", False, marks=[cuda, pytest.mark.gpu]),
        pytest.param("cuda", True, marks=[cuda, pytest.mark.gpu]),
    ],
)
def test_step(benchmark, device, graphed):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60 * STEPS, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (60 * STEPS,), generator=generator)
    split = Split(images.to(device), labels.to(device))
    model = MODELS["lenet-300-100"].new(generator).to(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True, capturable=device == "cuda")
    step = make_step(model, optimizer, split)
    if device == "cuda" and not graphed:
        step = step.step
    order = batches(split, 60, generator)

    def run():
        for chosen in order:
            step(chosen)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=1)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["iterations_per_second"] = round(STEPS / benchmark.stats["median"])


@pytest.mark.parametrize("train_sparse", ["off", "on"])
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16)])
@pytest.mark.parametrize("density", [1.0, 0.4, 0.1])
def test_epoch(benchmark, tabulate, density, blocksize, train_sparse):
    """An epoch of the search at MNIST's size and its default batch, evaluation included."""
    generator = torch.Generator().manual_seed(0)
    splits = (
        Split(torch.randn(n, 1, 28, 28, generator=generator), torch.arange(n) % 10)
        for n in (55_000, 5_000, 10_000)
    )
    data = Dataset("made up", *splits)
    prune_pc = 0.9 if density == 1 else 1 - density
    config = RunConfig(
        epochs=4, prune_pc=prune_pc, prune_rounds=1, blocksize=blocksize, train_sparse=train_sparse
    )
    lottery = Lottery(config, data)
    state = lottery.start()
    if density < 1:
        search = search_from(config, state, trained=True)
        next(iter(search))
        state = lottery.begin_round(state, search)
    epochs = lottery.train(state.model(), state)
    benchmark.pedantic(lambda: next(epochs), rounds=3, warmup_rounds=1)
    benchmark.extra_info |= {
        "device": f"cpu, {torch.get_num_threads()} threads",
        "density": density,
        "blocksize": blocksize,
        "train_sparse": train_sparse,
        "seconds": benchmark.stats["median"],
    }
    row = f"density {density}, {blocksize[0]}x{blocksize[1]}"
    tabulate("seconds of an epoch", row, benchmark.stats["median"], train_sparse=train_sparse)
