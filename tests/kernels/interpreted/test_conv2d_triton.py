import pytest
import torch

from sparse_lth import bsr
from sparse_lth.kernels import Pattern, Window, conv2d_torch, conv2d_triton
from tests.bounds import assert_close


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("unfolded", [1, 4000, 1 << 25])
@pytest.mark.parametrize(
    "window", [Window((1, 1)), Window((3, 2), (2, 1), (1, 0, 2, 1), (1, 2)), Window((1, 1), (2, 2))]
)
def test_parts_of_the_batch(window, unfolded, layout, monkeypatch):
    monkeypatch.setattr(conv2d_triton, "UNFOLDED", unfolded)
    shape, blocksize = (20, 6 * window.size), (16, 4)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:16, :4] = mask[16:, -3:] = True
    values, *indices = bsr.from_dense(torch.randn(shape), mask, blocksize)
    pattern = Pattern.from_indices(*indices, bsr.grid_shape(shape, blocksize))
    x = torch.randn(3, 6, 7, 9).contiguous(memory_format=layout)
    bias, grad = torch.randn(20), torch.randn(3, 20, *window.output_size(7, 9))
    block = values.shape[1:]

    def run(ops, x, values, bias, grad):
        y = ops.conv2d(x, values, pattern, bias, 20, window)
        assert y.stride() == strides_of(y, layout)
        dx = ops.conv2d_grad_input(grad, values, pattern, x.shape, window)
        return y, dx, ops.conv2d_grad_weight(grad, x, pattern, block, window)

    given = x, values, bias, grad
    found = run(conv2d_triton, *given)
    exact = run(conv2d_torch, *(t.double() for t in given))
    magnitudes = run(conv2d_torch, *(t.double().abs() for t in given))
    for triple in zip(found, exact, magnitudes, strict=True):
        assert_close(*triple)


def strides_of(y, layout):
    return torch.empty(y.shape, memory_format=layout).stride()
