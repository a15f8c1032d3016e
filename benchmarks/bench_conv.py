"""Block-sparse convolutions against oneDNN's dense ones on a CPU, side by side:
`pytest benchmarks/bench_conv.py --benchmark-only`."""

import pytest
import torch
from torch import nn

from benchmarks import peers
from benchmarks.bench_cpu import compare, deepsparse, name_of, needs_native
from sparse_lth import SparseConv2d, SparseLinear, SparseSequential
from sparse_lth.program.models import MODELS

LAYERS = {  # in_channels, out_channels, options, (height, width)
    "3x3 256->256 at 14x14": (256, 256, {"kernel_size": 3, "padding": 1}, (14, 14)),
    "1x1 512->512 at 28x28": (512, 512, {"kernel_size": 1}, (28, 28)),
    "3x3 128->256 stride 2 at 28x28": (
        *(128, 256),
        {"kernel_size": 3, "padding": 1, "stride": 2},
        (28, 28),
    ),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
BLOCKSIZES = [(1, 1), (16, 1), (16, 4)]
pytestmark = needs_native


def sparse_lenet_5(blocksize, density):
    """LeNet-5 of random kept blocks; its last layer, of 10 outputs, unstructured"""
    modules = []
    for module in MODELS["lenet-5"].build():
        if isinstance(module, nn.Conv2d):
            sizes = module.in_channels, module.out_channels, module.kernel_size
            options = {"padding": module.padding, "blocksize": blocksize, "density": density}
            module = SparseConv2d(*sizes, **options)
        elif isinstance(module, nn.Linear):
            sizes = module.in_features, module.out_features, True
            blocks = blocksize if module.out_features > 10 else (1, 1)
            module = SparseLinear(*sizes, blocks, density)
        modules.append(module)
    return SparseSequential(*modules)


@pytest.mark.parametrize("batch", [1, 16, 128, 1024], ids="batch:{}".format)
@pytest.mark.parametrize("blocksize", [(1, 1), (8, 1), (16, 1)], ids=name_of)
def test_lenet_5(benchmark, tabulate, blocksize, batch):
    dense, sparse = MODELS["lenet-5"].build(), sparse_lenet_5(blocksize, 0.1)
    x = torch.rand(batch, 1, 28, 28)
    with torch.inference_mode():
        speedup = compare(
            benchmark,
            lambda: sparse(x),
            lambda: dense(x),
            backend="native",
            shape=[batch, "lenet-5"],
            density=0.1,
            blocksize=blocksize,
        )
    title = "LeNet-5 at 10%: speedup over dense float32 torch"
    tabulate(title, name_of(blocksize), speedup, batch=batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=name_of)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch", [1, 16], ids="batch:{}".format)
def test_layer(benchmark, tabulate, batch, layer, blocksize, layout):
    dense, sparse, x = layers(layer, blocksize, batch, layout)
    with torch.inference_mode():
        speedup = compare(
            benchmark,
            lambda: sparse(x),
            lambda: dense(x),
            backend="native",
            shape=[batch, layer, layout],
            density=0.1,
            blocksize=blocksize,
        )
    title = "a convolution at 10%: speedup over dense float32 torch"
    row = f"{layer}, {layout}, {name_of(blocksize)}"
    tabulate(title, row, speedup, batch=batch)


@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=name_of)
@pytest.mark.parametrize("layer", LAYERS)
def test_training_step(benchmark, tabulate, layer, blocksize):
    dense, sparse, x = layers(layer, blocksize, 16, "NCHW")
    x.requires_grad_()
    grad = torch.randn_like(dense(x))
    speedup = compare(
        benchmark,
        lambda: sparse(x).backward(grad),
        lambda: dense(x).backward(grad),
        backend="native",
        shape=[16, layer],
        density=0.1,
        blocksize=blocksize,
    )
    title = "forward and backward of a convolution at 10%, batch 16: speedup over dense torch"
    tabulate(title, layer, speedup, blocks=name_of(blocksize))


@peers.needs_deepsparse
@pytest.mark.parametrize("batch", [1, 128, 1024], ids="batch:{}".format)
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 1)], ids=name_of)
def test_lenet_5_in_deepsparse(benchmark, tabulate, tmp_path, blocksize, batch):
    sparse = sparse_lenet_5(blocksize, 0.1)
    pruned = [m.to_dense() if isinstance(m, SparseConv2d | SparseLinear) else m for m in sparse]
    x = torch.rand(batch, 1, 28, 28)
    speedup = deepsparse(benchmark, nn.Sequential(*pruned), x, tmp_path)
    title = "LeNet-5 at 10%: speedup over dense float32 torch"
    tabulate(title, f"DeepSparse, {name_of(blocksize)}", speedup, batch=batch)


@peers.needs_deepsparse
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 1)], ids=name_of)
@pytest.mark.parametrize("layer", [*LAYERS][:2])
def test_layer_in_deepsparse(benchmark, tabulate, tmp_path, layer, blocksize):
    _, sparse, x = layers(layer, blocksize, 16, "NCHW")
    speedup = deepsparse(benchmark, sparse.to_dense(), x, tmp_path)
    title = "a convolution at 10%: speedup over dense float32 torch"
    tabulate(title, f"{layer}, DeepSparse, {name_of(blocksize)}", speedup, batch=16)


def layers(layer, blocksize, batch, layout):
    """The dense layer, the sparse one, and a batch"""
    *channels, options, size = LAYERS[layer]
    x = torch.randn(batch, channels[0], *size).contiguous(memory_format=LAYOUTS[layout])
    sparse = SparseConv2d(*channels, **options, blocksize=blocksize, density=0.1)
    return nn.Conv2d(*channels, **options), sparse, x
