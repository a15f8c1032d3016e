"""The block-sparse convolution and its gradients, on each backend, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lth import bsr, kernels
from sparse_lth.kernels import Pattern, Window, conv2d_native, conv2d_torch, linear_native
from tests.bounds import assert_close

OPS = torch.ops.sparse_lth
NATIVE = [f"native {name}" for name in linear_native.INSTRUCTION_SETS]
FORMATS = [torch.contiguous_format, torch.channels_last]
BLOCKSIZES = [(1, 1), (16, 1), (16, 16), (8, 4), (4, 4), (24, 5), (3, 7), (1, 20)]
needs_native = pytest.mark.skipif(
    linear_native.WHY_NOT is not None, reason=f"native kernels are {linear_native.WHY_NOT}"
)


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def windows(draw):
    """A window, and the (height, width) of an image that it fits"""
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    window = Window(draw(pairs(1, 5)), draw(pairs(1, 3)), padding, draw(pairs(1, 3)))
    spans = [d * (k - 1) + 1 for d, k in zip(window.dilation, window.kernel_size, strict=True)]
    least = [max(1, spans[0] - sum(padding[2:])), max(1, spans[1] - sum(padding[:2]))]
    more = draw(st.tuples(st.integers(0, 20), st.integers(0, 40)))
    return window, tuple(a + b for a, b in zip(least, more, strict=True))


def random_weight(out_channels, inputs, blocksize, density):
    """values, pattern, weight: (out_channels, inputs)"""
    grid = bsr.grid_shape((out_channels, inputs), blocksize)
    mask = torch.rand(grid) < density
    for dim in (0, 1):
        mask = mask.repeat_interleave(blocksize[dim], dim)
    mask = mask[:out_channels, :inputs]
    weight = torch.randn(out_channels, inputs) * mask
    values, *indices = bsr.from_dense(weight, mask, blocksize)
    return values, Pattern.from_indices(*indices, grid), weight


def exact(x, weight, bias, window, grad):
    """y, dx, dweight of F.conv2d in float64"""
    x, weight, bias, grad = (t.double() for t in (x, weight, bias, grad))
    x.requires_grad_(), weight.requires_grad_()
    shaped = weight.view(len(weight), x.shape[1], *window.kernel_size)
    padded = F.pad(x, window.padding)
    y = F.conv2d(padded, shaped, bias, window.stride, 0, window.dilation)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


def check(x, values, pattern, weight, bias, window):
    """The forward pass and both gradients of the backend in use."""
    case = kernels.backend(x)
    y = case.conv2d(x, values, pattern, bias, len(weight), window)
    layout = conv2d_torch.memory_format(x)
    grad = torch.randn(y.shape).contiguous(memory_format=layout)
    dx = case.conv2d_grad_input(grad, values, pattern, x.shape, window)
    dvalues = case.conv2d_grad_weight(grad, x, pattern, values.shape[1:], window)
    found = y, dx, conv2d_torch.to_dense(dvalues, *pattern[:2], weight.shape)
    results = exact(x, weight, bias, window, grad)
    magnitudes = exact(x.abs(), weight.abs(), bias.abs(), window, grad.abs())
    reached = conv2d_torch.to_dense(torch.ones_like(values), *pattern[:2], weight.shape) != 0
    assert y.is_contiguous(memory_format=layout)
    for name, actual, result, magnitude in zip("yxw", found, results, magnitudes, strict=True):
        kept = reached if name == "w" else torch.ones((), dtype=torch.bool)
        assert_close(actual, result * kept, magnitude * kept)


@settings(max_examples=80, deadline=None)
@given(
    windows(),
    st.integers(0, 4),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from(BLOCKSIZES),
    st.sampled_from([0, 0.1, 0.5, 1]),
    st.sampled_from(FORMATS),
    st.sampled_from([*NATIVE, "torch"]),
    st.integers(0, 1000),
)
def test_any_convolution(
    window_and_size, batch, channels, out_channels, blocksize, density, layout, backend, seed
):
    torch.manual_seed(seed)
    window, size = window_and_size
    inputs = channels * window.size
    values, pattern, weight = random_weight(out_channels, inputs, blocksize, density)
    x = torch.randn(batch, channels, *size).contiguous(memory_format=layout)
    with kernels.use_backend(*backend.split()):
        check(x, values, pattern, weight, torch.randn(out_channels), window)


@needs_native
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 1)])
@pytest.mark.parametrize(
    ("batch", "channels", "size"),
    [(3, 300, (40, 50)), (1, 64, (14, 14)), (70, 8, (2, 3)), (2, 3, (150, 200))],
)
def test_tiles_agree_bit_for_bit_on_any_threads(batch, channels, size, blocksize):
    """Rows of an image, a few images, outputs, channels: however threads share the work."""
    before = torch.get_num_threads()
    window = Window((3, 3), padding=(1, 1, 1, 1))
    values, pattern, weight = random_weight(48, channels * 9, blocksize, 0.1)
    x, bias = torch.randn(batch, channels, *size), torch.randn(48)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        y = conv2d_native.conv2d(x, values, pattern, bias, 48, window, "relu")
        dx = conv2d_native.conv2d_grad_input(y, values, pattern, x.shape, window)
        dvalues = conv2d_native.conv2d_grad_weight(y, x, pattern, values.shape[1:], window)
        results.append((y, dx, dvalues))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    check(x, values, pattern, weight, bias, window)


@needs_native
@pytest.mark.parametrize("name", linear_native.INSTRUCTION_SETS)
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 1), (4, 4)])
def test_nan_reaches_only_what_a_kept_block_connects(name, blocksize):
    values, pattern, _ = random_weight(20, 4 * 9, blocksize, 0.2)
    window = Window((3, 3), (2, 1), (1, 0, 2, 1))
    ones, clean = torch.ones_like(values), torch.randn(2, 4, 9, 11)
    for place in [(0, 0, 0, 0), (1, 2, 4, 10), (1, 3, 8, 5)]:
        x, at = clean.clone(), torch.zeros_like(clean)
        x[place], at[place] = float("nan"), 1
        with kernels.use_backend("native", name):
            y = kernels.conv2d(x, values, pattern, None, 20, window, "relu")
        reached = conv2d_torch.conv2d(at, ones, pattern, None, 20, window) != 0
        assert torch.equal(y.isnan(), reached)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("layout", FORMATS)
def test_gradients_are_those_of_torch(activation, layout):
    window = Window((3, 2), (2, 1), (1, 0, 2, 1), (1, 2))
    values, pattern, _ = random_weight(20, 5 * 6, (8, 3), 0.4)
    x = torch.randn(3, 5, 8, 9).contiguous(memory_format=layout)
    bias, found = torch.randn(20), []
    for call in (kernels.conv2d, conv2d_torch.conv2d):
        leaves = [t.clone().requires_grad_() for t in (x, values, bias)]
        y = call(leaves[0], leaves[1], pattern, leaves[2], 20, window, activation)
        y.square().sum().backward()
        found.append([t.grad for t in leaves])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-5)


def _problem(dtype=torch.float64):
    window = Window((2, 3), (1, 2), (1, 0, 1, 2), (2, 1))
    values, pattern, _ = random_weight(3, 2 * 6, (2, 5), 0.4)
    x, bias = torch.randn(2, 2, 4, 5, dtype=dtype), torch.randn(3, dtype=dtype)
    return x, values.to(dtype), bias, pattern, window


def test_first_and_second_gradients():
    *leaves, pattern, window = _problem()
    leaves = [t.requires_grad_() for t in leaves]

    def call(x, values, bias):
        return kernels.conv2d(x, values, pattern, bias, 3, window).sin()

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@needs_native
def test_second_gradient_of_native_calls():
    x, values, bias, pattern, window = _problem(torch.float32)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, values, bias)]
        y = kernels.conv2d(leaves[0], leaves[1], pattern, leaves[2], 3, window).sin().sum()
        first = torch.autograd.grad(y, leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append([t.double() for t in torch.autograd.grad(penalty, leaves)])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-4)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck's
@pytest.mark.parametrize("layout", FORMATS)
def test_operators_pass_torchs_own_checks(layout):
    x, values, bias, pattern, window = _problem(torch.float32)
    x = x.contiguous(memory_format=layout)
    indices = pattern[:2]
    grad = torch.randn(2, 3, *window.output_size(4, 5)).contiguous(memory_format=layout)
    leaves = [t.clone().requires_grad_() for t in (x, values, bias)]
    weights = leaves[1], *indices, leaves[2]
    torch.library.opcheck(OPS.conv2d.default, (leaves[0], *weights, 3, *window, "relu"))
    torch.library.opcheck(
        OPS.conv2d_grad_input.default, (grad, values, *indices, list(x.shape), *window)
    )
    torch.library.opcheck(
        OPS.conv2d_grad_weight.default, (grad, x, *indices, *values.shape[1:], *window)
    )


def test_sizes_that_do_not_fit():
    x, values, bias, pattern, window = _problem(torch.float32)
    with pytest.raises(ValueError, match="for a grid of"):
        kernels.conv2d(x[:, :1], values, pattern, bias, 3, window)
    with pytest.raises(ValueError, match="bias of shape"):
        kernels.conv2d(x, values, pattern, bias[:2], 3, window)
    with pytest.raises(ValueError, match=r"expected x in torch.float32"):
        kernels.conv2d(x.double(), values, pattern, bias, 3, window)
    with pytest.raises(ValueError, match=r"padded images of at least \[3, 3\], got \[7, 2\]"):
        kernels.conv2d(x[..., :1], values, pattern, bias, 3, window)
