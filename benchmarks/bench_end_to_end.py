"""Whole transformers of random weights, their encoders' linear layers pruned to 10 %, on a CPU:

    pytest benchmarks/bench_end_to_end.py --benchmark-only

Every row is timed in turn with dense float32 torch, and its output is compared with that of the
same weights in torch. DeepSparse is timed by itself.
"""

import copy

import pytest
import torch
from torch import nn

from benchmarks import peers
from benchmarks.bench_cpu import name_of, needs_native
from sparse_lth import quantize_, sparsify_
from sparse_lth.masks import expand, keep_highest
from sparse_lth.timing import in_turn

transformers = pytest.importorskip("transformers")

BATCHES = [1, 8]
BLOCKSIZES = [(1, 1), (16, 4), (16, 16)]
TURNS = 5
# by the dtype of the arithmetic: the most that an output, of unit variance, may be off
ERRORS = {"float32": 1e-3, "bfloat16": 0.3, "int8": 1.0}


class Bert(nn.Module):
    """x: (batch, 128, 768) embedded tokens -> (batch, 128, 768)"""

    shape = (128, 768)

    def __init__(self, attention: str):
        super().__init__()
        config = transformers.BertConfig(attn_implementation=attention)
        self.model = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, x):
        return self.model(inputs_embeds=x).last_hidden_state


class Vit(nn.Module):
    """x: (batch, 3, 224, 224) -> (batch, 197, 768)"""

    shape = (3, 224, 224)

    def __init__(self, attention: str):
        super().__init__()
        config = transformers.ViTConfig(attn_implementation=attention)
        self.model = transformers.ViTModel(config, add_pooling_layer=False)

    def forward(self, x):
        return self.model(x).last_hidden_state


NETWORKS = {"BERT-base, 128 tokens": Bert, "ViT-B/16": Vit}


def pruned(network: str, blocksize, attention: str = "sdpa") -> nn.Module:
    """The network in eval mode with random blocks of its encoder's weights zero; "eager" attention
    is what exporters understand."""
    torch.manual_seed(0)
    model = NETWORKS[network](attention).eval()
    for name, module in model.named_modules():
        if is_pruned(module, name):
            rows, cols = (-(-n // b) for n, b in zip(module.weight.shape, blocksize, strict=True))
            kept = keep_highest(torch.rand(rows, cols), round(0.1 * rows * cols))
            module.weight.data *= expand(kept, blocksize, module.weight.shape)
    return model.requires_grad_(False)


def is_pruned(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def input_of(network: str, batch: int) -> torch.Tensor:
    return torch.randn(batch, *NETWORKS[network].shape, generator=torch.Generator().manual_seed(1))


def report(benchmark, tabulate, network, batch, row, dtype, seconds, dense_seconds, error):
    """A row of pytest-benchmark's file and cells of the closing tables."""
    assert error <= ERRORS[dtype], f"the outputs of {row} are {error} off"
    benchmark.extra_info.update(
        device=f"cpu, {torch.get_num_threads()} threads",
        shape=[batch, network],
        dtype=dtype,
        backend=row,
        milliseconds=1e3 * seconds,
        speedup=dense_seconds / seconds,
        error=error,
    )
    title = f"{network}: milliseconds, speedup over dense float32 torch, largest error"
    for column, value in (
        ("ms", 1e3 * seconds),
        ("speedup", dense_seconds / seconds),
        ("error", error),
    ):
        tabulate(title, row, value, batch=batch, column=column)


def compare(benchmark, tabulate, network, batch, row, dtype, call, dense, expected):
    with torch.inference_mode():
        error = float((call().float() - expected).abs().max())
        times = in_turn({"row": call, "dense": dense}, TURNS)
        benchmark.pedantic(call)
    seconds = times["row"].p50, times["dense"].p50
    report(benchmark, tabulate, network, batch, row, dtype, *seconds, error)


@pytest.mark.parametrize("peer", peers.DENSE)
@pytest.mark.parametrize("batch", BATCHES, ids="batch:{}".format)
@pytest.mark.parametrize("network", NETWORKS)
def test_dense(benchmark, tabulate, tmp_path, network, batch, peer):
    make, dtype = peers.DENSE[peer]
    exported = peer.startswith(("ONNX", "OpenVINO"))
    model, x = pruned(network, (1, 1)), input_of(network, batch)
    with torch.inference_mode():
        expected = model(x)
    rival = pruned(network, (1, 1), "eager") if exported else model
    call = make(rival, x, tmp_path)
    compare(*(benchmark, tabulate, network, batch, peer, dtype), call, lambda: model(x), expected)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=name_of)
@pytest.mark.parametrize("batch", BATCHES, ids="batch:{}".format)
@pytest.mark.parametrize("network", NETWORKS)
def test_sparse(benchmark, tabulate, network, batch, blocksize, dtype):
    model, x = pruned(network, blocksize), input_of(network, batch)
    sparse, inputs = sparsify_(copy.deepcopy(model), blocksize, is_pruned), x
    if dtype == "bfloat16":
        sparse, inputs = sparse.to(torch.bfloat16), x.to(torch.bfloat16)
    elif dtype == "int8":
        quantize_(sparse)
    with torch.inference_mode():
        expected = model(x)
    row = f"sparse_lth {name_of(blocksize)} {dtype}"
    compare(
        *(benchmark, tabulate, network, batch, row, dtype),
        lambda: sparse(inputs),
        lambda: model(x),
        expected,
    )


@peers.needs_deepsparse
@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=name_of)
@pytest.mark.parametrize("batch", BATCHES, ids="batch:{}".format)
@pytest.mark.parametrize("network", NETWORKS)
def test_deepsparse(benchmark, tabulate, tmp_path, network, batch, blocksize):
    model, x = pruned(network, blocksize, "eager"), input_of(network, batch)
    seconds, y = peers.deepsparse(model, x, tmp_path)
    with torch.inference_mode():
        error = float((y - model(x)).abs().max())
        dense = in_turn({"dense": lambda: model(x)}, TURNS)["dense"].p50
    benchmark.pedantic(lambda: None)
    row = f"DeepSparse {name_of(blocksize)}"
    report(benchmark, tabulate, network, batch, row, "float32", seconds, dense, error)
