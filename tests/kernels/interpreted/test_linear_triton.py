import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lth import SparseLinear, kernels
from sparse_lth.kernels import dispatch, linear_torch, linear_triton, tiles
from tests.bounds import assert_close

# bfloat16 is left out: `tl.dot` on it is silently wrong in the interpreter
DTYPES = [torch.float32, torch.float16]
SIZES = [(1, 1), (33, 17), (80, 48), (128, 64)]  # out_features, in_features
BLOCKSIZES = [(16, 16), (32, 32), (64, 64), (128, 128), (128, 16), (64, 4), (16, 1), (32, 2)]
OTHER_BLOCKSIZES = [(1, 1), (3, 5), (8, 8), (48, 12), (16, 60), (200, 8)]
DENSITIES = [0.0, 0.05, 0.5, 1.0]
ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}


def _layer(size, blocksize, density, dtype=torch.float32, **options):
    out_features, in_features = size
    layer = SparseLinear(
        in_features, out_features, blocksize=blocksize, density=density, dtype=dtype, **options
    )
    return layer.requires_grad_(False)


def _check(layer, x, grad):
    """All of the layer's kernels on one batch; x: (batch, in); grad: (batch, out)"""
    pattern, values, bias = layer.pattern, layer.weight_values, layer.bias
    y = linear_triton.linear(x, values, pattern, bias, layer.out_features, layer.activation)
    dx = linear_triton.linear_grad_input(grad, values, pattern, layer.in_features)
    weight = linear_torch.to_dense(values, *pattern[:2], (layer.out_features, layer.in_features))
    weight, x, grad = weight.double(), x.double(), grad.double()
    bias = torch.zeros(()) if bias is None else bias.double()
    magnitude = x.abs() @ weight.abs().T + bias.abs()
    exact = ACTIVATIONS[layer.activation](x @ weight.T + bias)
    assert y.dtype == values.dtype
    assert_close(y, exact, magnitude)
    assert_close(dx, grad @ weight, grad.abs() @ weight.abs())


def _batch(layer, batch):
    dtype = layer.weight_values.dtype
    sizes = layer.in_features, layer.out_features
    return [torch.randn(batch, size, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("batch", [1, 5])
def test_sizes(size, blocksize, density, batch):
    layer = _layer(size, blocksize, density)
    _check(layer, *_batch(layer, batch))


@pytest.mark.parametrize("size", [(100, 300), (300, 100), (256, 128)])
@pytest.mark.parametrize("blocksize", [(16, 16), (128, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_sizes(size, blocksize, dtype):
    layer = _layer(size, blocksize, 0.1, dtype)
    _check(layer, *_batch(layer, 20))


@pytest.mark.parametrize("size", [(33, 17), (20, 60)])
@pytest.mark.parametrize("blocksize", OTHER_BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_any_size(size, blocksize, dtype):
    layer = _layer(size, blocksize, 0.3, dtype)
    _check(layer, *_batch(layer, 3))


@pytest.mark.parametrize("batch", [0, 1, 2, 16, 17, 65, 600])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [(16, 16), (128, 8)])
@pytest.mark.parametrize("processors", [1, 1000])  # to be filled by tiles: large or small ones
def test_every_batch_has_a_tile(batch, dtype, blocksize, processors, monkeypatch):
    device = tiles.Device("GPU", 90, processors, 232448)
    monkeypatch.setattr(tiles, "device_of", lambda _: device)
    layer = _layer((130, 70), blocksize, 0.5, dtype)
    _check(layer, *_batch(layer, batch))


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parts", [1, 4])
def test_bias_and_activation(batch, dtype, activation, bias, parts, monkeypatch):
    monkeypatch.setattr(tiles, "splits", lambda *_: parts)
    layer = _layer((50, 300), (32, 16), 0.5, dtype, activation=activation, bias=bias)
    _check(layer, *_batch(layer, batch))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_relu_keeps_nan(parts, batch, monkeypatch):
    monkeypatch.setattr(tiles, "splits", lambda *_: parts)
    layer = _layer((16, 16), (16, 16), 1.0, activation="relu")
    x = torch.full((batch, 16), torch.nan)
    y = linear_triton.linear(x, layer.weight_values, layer.pattern, layer.bias, 16, "relu")
    assert y.isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 40),
    size=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    blocksize=st.tuples(st.sampled_from([1, 5, 16, 32, 64, 128]), st.integers(1, 40)),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    options=st.fixed_dictionaries(
        {"bias": st.booleans(), "activation": st.sampled_from(list(ACTIVATIONS))}
    ),
    seed=st.integers(0, 1000),
)
def test_any_layer(batch, size, blocksize, density, dtype, options, seed):
    torch.manual_seed(seed)
    layer = _layer(size, blocksize, density, dtype, **options)
    _check(layer, *_batch(layer, batch))


def test_strides():
    layer = _layer((64, 48), (16, 16), 0.5)
    wide = torch.randn(5, 200)
    for x in [torch.randn(48, 5).T, wide[:, 3:51], wide[:, :192:4], wide[:1, :48].expand(5, 48)]:
        for grad in [torch.randn(64, 5).T, wide[:, 1:65], torch.ones(()).expand(5, 64)]:
            _check(layer, x, grad)


@pytest.mark.parametrize("batch", [1, 5, 20])
@pytest.mark.parametrize("blocksize", [(16, 16), (32, 5), (128, 128)])
def test_nothing_beside_the_tensors_is_read(batch, blocksize):
    layer = _layer((96, 32), blocksize, 0.7)
    x, grad = (torch.full((batch + 9, 256), torch.nan)[:batch, :n] for n in (32, 96))
    x.normal_()
    grad.normal_()
    _check(layer, x, grad)


@pytest.mark.parametrize("padding", [1e4, torch.nan])
def test_padding_never_reaches_a_result(padding):
    layer = _layer((20, 20), (16, 16), 1.0)
    x, grad = _batch(layer, 5)
    args = layer.pattern, layer.bias, 20
    y = linear_triton.linear(x, layer.weight_values, *args)
    dx = linear_triton.linear_grad_input(grad, layer.weight_values, layer.pattern, 20)
    values = layer.weight_values.masked_fill(~layer._inside(), padding)
    assert torch.equal(linear_triton.linear(x, values, *args), y)
    assert torch.equal(linear_triton.linear_grad_input(grad, values, layer.pattern, 20), dx)


@pytest.mark.parametrize("size", [(48, 80), (17, 33), (64, 64)])
@pytest.mark.parametrize("blocksize", [(16, 16), (64, 16), (32, 1)])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_training_step_is_that_of_the_dense_layer(size, blocksize, shape, layout, monkeypatch):
    monkeypatch.setattr(kernels, "backend", lambda x: dispatch._triton())
    layer = _layer(size, blocksize, 0.5, activation="relu").requires_grad_(True)
    dense = layer.to_dense().double()
    x = torch.randn(*shape, size[1])
    if layout == "columns" and shape:
        x = x.mT.contiguous().mT
    x, exact_x = x.requires_grad_(True), x.detach().double().requires_grad_(True)
    grad = torch.randn(*shape, size[0])

    y, exact = layer(x), F.relu(dense(exact_x))
    y.backward(grad)
    exact.backward(grad.double())
    reach = F.linear(exact_x.abs(), dense.weight.abs(), dense.bias.abs())
    assert_close(y, exact, reach)
    grad = torch.where(exact > 0, grad.double(), 0)
    assert_close(x.grad, exact_x.grad, grad.abs() @ dense.weight.abs())
    flat, x = grad.reshape(-1, size[0]).abs(), exact_x.reshape(-1, size[1]).abs()
    actual = linear_torch.to_dense(layer.weight_values.grad, *layer.pattern[:2], size)
    kept = linear_torch.to_dense(torch.ones_like(layer.weight_values), *layer.pattern[:2], size)
    assert_close(actual, dense.weight.grad * kept, flat.T @ x)
    assert_close(layer.bias.grad, dense.bias.grad, flat.sum(0))


def test_rows_further_apart_than_a_tile_can_address():
    far = torch.zeros((1 << 24) + 48).as_strided((2, 48), (1 << 24, 1)).normal_()
    assert linear_triton.row_major(far).stride() == (48, 1)
    _check(_layer((64, 48), (16, 16), 0.5), far, torch.randn(2, 64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16), (48, 5)])
@pytest.mark.parametrize("density", DENSITIES)
def test_the_dense_product_over_the_unpacked_weight(size, blocksize, density, monkeypatch):
    monkeypatch.setattr(tiles, "crossover", lambda *case: 0.0)
    layer = _layer(size, blocksize, density)
    _check(layer, *_batch(layer, 5))
