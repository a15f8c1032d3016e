"""What only a real GPU can show; `pytest -m gpu` there."""

import pytest
import torch
import torch.nn.functional as F

from sparse_lth import SparseConv2d, SparseLinear, kernels
from sparse_lth.kernels import linear_torch, sddmm_torch, tiles
from tests.bounds import assert_close

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [(10, 7), (300, 784), (512, 1024), (1000, 300)]  # out_features, in_features
BLOCKSIZES = [(16, 16), (64, 64), (128, 16), (128, 1), (1, 1), (48, 5)]
BATCHES = [1, 5, 16, 64, 200, 1030]


def _layer(size, blocksize, density=0.2, dtype=torch.float16, **options):
    torch.manual_seed(0)
    return SparseLinear(
        size[1], size[0], True, blocksize, density, dtype=dtype, device="cuda", **options
    )


def _step(layer, x, grad):
    """y, and the gradients of x, values and bias"""
    x = x.detach().requires_grad_(True)
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight_values, layer.bias), grad)


@pytest.fixture(params=[0.0, 1.0], ids=["dense product", "sparse kernels"])
def choice(request, monkeypatch):
    """Always the one, always the other."""
    monkeypatch.setattr(tiles, "crossover", lambda *case: request.param)
    tiles.launch.cache_clear()
    yield
    tiles.launch.cache_clear()


def test_the_kernels_are_used():
    assert kernels.backend(torch.empty(1, device="cuda")).name == "triton"
    assert kernels.backend(torch.empty(1, device="cuda", dtype=torch.float64)).name == "torch"


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_layer_against_float64(size, blocksize, dtype, batch):
    layer = _layer(size, blocksize, dtype=dtype)
    x, grad = (torch.randn(batch, n, device="cuda", dtype=dtype) for n in size[::-1])
    y, dx, dvalues, dbias = _step(layer, x, grad)
    weight = layer.to_dense().weight.double()
    x, grad, bias = x.double(), grad.double(), layer.bias.detach().double()
    assert_close(y, F.linear(x, weight, bias), F.linear(x.abs(), weight.abs(), bias.abs()))
    assert_close(dx, grad @ weight, grad.abs() @ weight.abs())
    exact, magnitude = (
        sddmm_torch.sddmm(g, v, layer.pattern, blocksize[::-1])
        for g, v in ((grad, x), (grad.abs(), x.abs()))
    )
    assert_close(dvalues, exact, magnitude)
    assert_close(dbias, grad.sum(0), grad.abs().sum(0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"stride": (2, 1), "dilation": (1, 2), "padding": (1, 3)}])
@pytest.mark.parametrize("blocksize", [(16, 16), (64, 16), (16, 1), (1, 1), (48, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_convolution_against_float64(batch, dtype, blocksize, options, layout):
    torch.manual_seed(0)
    sizes = {"blocksize": blocksize, "density": 0.3, "dtype": dtype, "device": "cuda"}
    layer = SparseConv2d(20, 50, (3, 2), **options, **sizes)
    x = torch.randn(batch, 20, 15, 18, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=layout).requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y)
    dx, dvalues, dbias = torch.autograd.grad(y, (x, layer.weight_values, layer.bias), grad)

    exact, magnitude = (
        SparseConv2d.from_dense(layer.to_dense(), blocksize=blocksize).double() for _ in range(2)
    )
    ends = [(exact, x.detach().double(), grad.double())]
    with torch.no_grad():
        for p in magnitude.parameters():
            p.abs_()
    ends.append((magnitude, x.detach().double().abs(), grad.double().abs()))
    results = []
    for reference, inputs, grads in ends:
        inputs.requires_grad_()
        outputs = reference(inputs)
        leaves = inputs, reference.weight_values, reference.bias
        results.append((outputs, *torch.autograd.grad(outputs, leaves, grads)))
    for actual, *expected in zip((y, dx, dvalues, dbias), *results, strict=True):
        assert_close(actual, *expected)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("batch", [1, 16, 1030])
def test_activation(activation, batch):
    layer = _layer((512, 1024), (64, 16), activation=activation).requires_grad_(False)
    x = torch.randn(batch, 1024, device="cuda", dtype=torch.float16)
    weight, bias = layer.to_dense().weight.double(), layer.bias.double()
    exact = linear_torch.ACTIVATIONS[activation](F.linear(x.double(), weight, bias))
    assert_close(layer(x), exact, F.linear(x.double().abs(), weight.abs(), bias.abs()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 16, 1030])
def test_two_runs_agree_bit_for_bit(dtype, batch):
    layer = _layer((300, 4096), (128, 16), dtype=dtype)
    x, grad = (torch.randn(batch, n, device="cuda", dtype=dtype) for n in (4096, 300))
    for first, second in zip(_step(layer, x, grad), _step(layer, x, grad), strict=True):
        assert torch.equal(first, second)


def test_more_rows_than_32_bits_can_address():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    layer = _layer((16, 16), (16, 16), density=1.0).requires_grad_(False)
    x = torch.zeros((1 << 27) + 64, 16, device="cuda", dtype=torch.float16)
    x[-64:] = torch.randn(64, 16)
    assert torch.equal(layer(x)[-64:], layer(x[-64 - 1024 :])[-64:])


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_cuda_graph_of_a_forward(batch):
    layer = _layer((300, 784), (16, 16)).requires_grad_(False)
    x = torch.randn(batch, 784, device="cuda", dtype=torch.float16)
    layer(x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.normal_()
    graph.replay()
    assert torch.equal(y, layer(x))


def test_cuda_graph_of_a_training_step():
    layers = [_layer((300, 784), (16, 16)), _layer((300, 784), (16, 16))]
    x = torch.randn(128, 784, device="cuda", dtype=torch.float16)
    target = torch.randn(128, 300, device="cuda", dtype=torch.float16)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1e-2) for layer in layers]

    def step(layer, optimizer):
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(layer(x), target).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            for _ in range(3):
                step(layer, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layers[0], optimizers[0])
    for _ in range(3):
        graph.replay()
        step(layers[1], optimizers[1])
    assert torch.equal(layers[0].weight_values, layers[1].weight_values)
    assert torch.equal(layers[0].bias, layers[1].bias)


def test_compile_fullgraph_with_a_dynamic_batch():
    layer = _layer((300, 784), (16, 16), activation="relu", dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (4, 33):
        x, grad = (torch.randn(batch, n, device="cuda") for n in (784, 300))
        # not dbias, which torch sums in an order of its own
        for actual, exact in zip(
            _step(compiled, x, grad)[:3], _step(layer, x, grad)[:3], strict=True
        ):
            assert torch.equal(actual, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    layer = _layer((300, 784), (16, 16), dtype=torch.float32)
    x = torch.randn(64, 784, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert {t.grad.dtype for t in (x, layer.weight_values, layer.bias)} == {torch.float32}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_opcheck():
    layer = _layer((80, 48), (16, 16))
    x = torch.randn(8, 48, device="cuda", dtype=torch.float16, requires_grad=True)
    args = x, layer.weight_values, *layer.pattern[:2], layer.bias, 80, "relu"
    torch.library.opcheck(torch.ops.sparse_lth.linear.default, args)
