"""The native linear layer in bf16 and int8 on every instruction set, against float64."""

import pytest
import torch

from sparse_lth import kernels
from sparse_lth.kernels import linear_bf16, linear_int8, linear_native, linear_torch, sddmm_torch
from tests.kernels.test_linear_native import random_layer

if linear_native.WHY_NOT:
    pytest.skip(f"native kernels are {linear_native.WHY_NOT}", allow_module_level=True)

BLOCKSIZES = [(1, 1), (16, 16), (16, 1), (32, 4), (8, 8), (24, 5), (1, 20), (4, 4), (3, 7)]
SHAPES = [(1, 1), (13, 256), (65, 39)]
BATCHES = [0, 1, 7, 33, 65, 131]
SUM = 2.0**-20  # of the magnitudes: some sixteen roundings of float32 in a sum


@pytest.fixture(autouse=True)
def one_thread():
    """The products are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_rounded(actual, exact, magnitude):
    """A sum in float32, and its one rounding to bf16, by half a unit in the last of 8 bits."""
    assert actual.dtype == torch.bfloat16
    assert actual.shape == exact.shape
    allowed = exact.abs() * 2.0**-8 + magnitude * SUM + 2.0**-120
    assert ((actual.double() - exact).abs() <= allowed).all()


def check_bf16(values, pattern, weight, batch):
    (out_features, in_features), block = weight.shape, values.shape[1:]
    x, grad = torch.randn(batch, in_features), torch.randn(batch, out_features)
    values, bias, x, grad = (t.bfloat16() for t in (values, torch.randn(out_features), x, grad))
    w, xd, gd = weight.bfloat16().double(), x.double(), grad.double()
    y = kernels.linear(x, values, pattern, bias, out_features, "relu")
    magnitude = xd.abs() @ w.abs().T + bias.double().abs()
    assert_rounded(y, (xd @ w.T + bias.double()).relu(), magnitude)
    dx = linear_bf16.linear_grad_input(grad, values, pattern, in_features)
    assert_rounded(dx, gd @ w, gd.abs() @ w.abs())
    dvalues = linear_bf16.sddmm(grad, x, pattern, block)
    exact = sddmm_torch.sddmm(gd, xd, pattern, block)
    assert_rounded(dvalues, exact, sddmm_torch.sddmm(gd.abs(), xd.abs(), pattern, block))


@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", linear_bf16.INSTRUCTION_SETS)
def test_bf16(name, blocksize, density):
    with kernels.use_backend("native", name):
        for shape in SHAPES:
            layer = random_layer(*shape, blocksize, density)
            for batch in BATCHES:
                check_bf16(*layer, batch)


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 2), (4, 1)])
@pytest.mark.parametrize("name", linear_bf16.INSTRUCTION_SETS)
def test_bf16_rounds_halves_to_even(name, blocksize):
    """1 + 1/256 and 1 + 3/256 are halfway between two numbers of bfloat16."""
    values, pattern, _ = random_layer(20, 2, blocksize, 1)
    ones, grad = torch.ones_like(values).bfloat16(), torch.ones(2, 20).bfloat16()
    halves = torch.tensor([[1, 1 / 256], [1 + 2 / 256, 1 / 256], [-1, -1 / 256]]).bfloat16()
    with kernels.use_backend("native", name):
        for x in (halves, halves.repeat(30, 1)):
            y, even = kernels.linear(x, ones, pattern, None, 20), x.float().sum(1).bfloat16()
            assert torch.equal(y, even[:, None].expand(len(x), 20))
        x = halves[:2].T
        dvalues = linear_bf16.sddmm(grad, x, pattern, blocksize[::-1])
    dense = linear_torch.to_dense(dvalues, *pattern[:2], (20, 2))
    assert torch.equal(dense, x.float().sum(0).bfloat16().expand(20, 2))


def check_int8(weight, pattern, dense, batch):
    """Numbers whose steps are whole are exact; others are off by at most a step of their row."""
    out_features, in_features = dense.shape
    bias, x = torch.randn(out_features), torch.randn(batch, in_features)
    y = linear_int8.linear(x, weight, pattern, bias, out_features, "relu").double()
    step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)).double()[:, None] / 255
    exact = (x.double() @ dense.T + bias.double()).relu()
    magnitude = x.double().abs() @ dense.abs().T + bias.double().abs()
    assert ((y - exact).abs() <= step * dense.abs().sum(1) + magnitude * SUM).all()
    if in_features > 1:
        x = torch.randint(-100, 156, (batch, in_features)).float()
        x[:, 0], x[:, -1] = -100, 155  # so that a step is 1
        y = linear_int8.linear(x, weight, pattern, None, out_features).double()
        magnitude = x.double().abs() @ dense.abs().T
        assert ((y - x.double() @ dense.T).abs() <= 8 * SUM * magnitude).all()


@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", linear_int8.INSTRUCTION_SETS)
def test_int8(name, blocksize, density):
    with kernels.use_backend("native", name):
        for shape in SHAPES:
            values, pattern, weight = random_layer(*shape, blocksize, density)
            weight = linear_int8.quantized(values, pattern, shape)
            dense = linear_torch.to_dense(weight.values.double(), *pattern[:2], shape)
            dense = dense * weight.scales.double()[:, None]
            for batch in BATCHES[1:]:
                check_int8(weight, pattern, dense, batch)


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16), (8, 3)])
def test_int8_weights_are_off_by_half_a_step(blocksize):
    """A step is rounded to bfloat16, so it may be longer by 1/256."""
    values, pattern, weight = random_layer(37, 50, blocksize, 0.5)
    numbers, scales = linear_int8.quantized(values, pattern, (37, 50))
    dense = linear_torch.to_dense(numbers.double(), *pattern[:2], (37, 50))
    error = (dense * scales.double()[:, None] - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 2.0**-8)).all()


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16), (8, 3)])
@pytest.mark.parametrize("name", linear_int8.INSTRUCTION_SETS)
def test_int8_inputs_are_off_by_half_a_step(name, blocksize):
    """The weight is the identity. An input in steps is off by a few roundings of 255 in float32."""
    pattern = random_layer(40, 40, blocksize, 1)[1]
    numbers = torch.zeros(len(pattern.col_indices), *blocksize[::-1], dtype=torch.int8)
    rows, cols = (torch.arange(size) for size in blocksize)
    first_row, first_col = (
        t[:, None, None] * size
        for t, size in zip((pattern.row_indices, pattern.col_indices), blocksize, strict=True)
    )
    numbers[first_row + rows == first_col + cols[:, None]] = 1
    weight = linear_int8.Int8Weight(numbers, torch.ones(40))
    with kernels.use_backend("native", name):
        for batch in (3, 70):
            x = torch.randn(batch, 40)
            y = linear_int8.linear(x, weight, pattern, None, 40)
            step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 255
            assert ((y - x).abs() <= step * (0.5 + 2.0**-12)).all()


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16), (8, 3)])
@pytest.mark.parametrize("name", linear_bf16.INSTRUCTION_SETS)
def test_nan_and_inf_reach_only_kept_blocks(name, blocksize):
    values, pattern, weight = random_layer(37, 50, blocksize, 0.3)
    reached = linear_torch.to_dense(torch.ones_like(values), *pattern[:2], weight.shape).T.bool()
    with kernels.use_backend("native", name):
        for batch in (1, 5, 70):
            for bad in (float("nan"), float("inf")):
                for k in (0, 17, 49):
                    x = torch.randn(batch, 50).bfloat16()
                    x[batch // 2, k] = bad
                    y = kernels.linear(x, values.bfloat16(), pattern, None, 37)
                    touched = torch.zeros(batch, 37, dtype=torch.bool)
                    touched[batch // 2] = reached[k]
                    assert torch.equal(~y.isfinite(), touched)


@pytest.mark.parametrize("name", linear_bf16.INSTRUCTION_SETS)
def test_what_lay_in_memory_before_reaches_no_layer(name):
    """An odd number of features leaves half a word between two layers."""
    layers = []
    for shape, blocksize in (((65, 40), (32, 3)), ((30, 65), (3, 4))):
        values, pattern, _ = random_layer(*shape, blocksize, 0.8)
        layers.append(kernels.ChainLayer(values.bfloat16(), pattern, None, *shape[::-1]))
    chain, x = kernels.Chain(layers), torch.randn(9, 40).bfloat16()
    with kernels.use_backend("native", name):
        for size in (1 << n for _ in range(5) for n in range(20, 8, -1)):
            torch.full((size,), float("nan"))  # and freed
            assert chain(x).isfinite().all()


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16), (4, 4)])
def test_any_layout(blocksize):
    values, pattern, weight = random_layer(37, 50, blocksize, 0.4)
    wide = torch.randn(40, 121).bfloat16()
    for x in (wide[:, 1:51], wide[::2, 3:103:2], wide.T[:50].T, wide[:1, :50].expand(9, 50)):
        y = kernels.linear(x, values.bfloat16(), pattern, None, 37)
        w = weight.bfloat16().double()
        assert_rounded(y, x.double() @ w.T, x.double().abs() @ w.abs().T)


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16)])
@pytest.mark.parametrize("batch", [5, 700])
def test_threads_agree_bit_for_bit(blocksize, batch):
    values, pattern, _ = random_layer(600, 600, blocksize, 0.3)
    weight = linear_int8.quantized(values, pattern, (600, 600))
    x, results = torch.randn(batch, 600), []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        args = x.bfloat16(), values.bfloat16(), pattern
        y = kernels.linear(*args, None, 600)
        dx = linear_bf16.linear_grad_input(*args, 600)
        dvalues = linear_bf16.sddmm(y, x.bfloat16(), pattern, blocksize[::-1])
        results.append((y, dx, dvalues, linear_int8.linear(x, weight, pattern, None, 600)))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_a_row_that_is_not_finite_is_nan_in_int8():
    values, pattern, _ = random_layer(37, 50, (16, 4), 0.3)
    weight, x = linear_int8.quantized(values, pattern, (37, 50)), torch.randn(3, 50)
    x[1, 7] = float("inf")
    y = linear_int8.linear(x, weight, pattern, None, 37)
    assert torch.equal(y.isnan().all(1), torch.tensor([False, True, False]))
    assert y[[0, 2]].isfinite().all()
