"""The native weight gradient at the kept blocks, against float64."""

import pytest
import torch

from sparse_lth import bsr, kernels
from sparse_lth.kernels import Pattern, linear_native, sddmm_native, sddmm_torch
from tests.bounds import assert_close

if linear_native.WHY_NOT:
    pytest.skip(f"native kernels are {linear_native.WHY_NOT}", allow_module_level=True)

BLOCKSIZES = [(1, 1), (16, 16), (16, 1), (32, 20), (8, 8), (24, 5), (64, 64), (1, 20), (4, 4)]


def random_pattern(shape, blocksize, density):
    rows, cols = bsr.grid_shape(shape, blocksize)
    keep = torch.rand(rows, cols) < density
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    return Pattern.from_indices(crow.int(), keep.nonzero()[:, 1].int(), (rows, cols))


def check(grad, x, pattern, blocksize):
    block = blocksize[::-1]
    dvalues = sddmm_native.sddmm(grad, x, pattern, block)
    grad, x = grad.double(), x.double()
    ref = sddmm_torch.sddmm(grad, x, pattern, block)
    bound = sddmm_torch.sddmm(grad.abs(), x.abs(), pattern, block)  # 0 where there is padding
    assert dvalues.shape == ref.shape
    assert_close(dvalues, ref, bound)


@pytest.fixture
def threads():
    """Sets how many threads torch uses, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("density", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", linear_native.INSTRUCTION_SETS)
def test_float64(threads, name, blocksize, density):
    threads(1)  # the products are small
    with kernels.use_backend("native", name):
        for shape in [(1, 1), (13, 200), (65, 39), (96, 80)]:
            pattern = random_pattern(shape, blocksize, density)
            for batch in (0, 1, 3, 16, 33, 128, 131, 300):
                check(
                    torch.randn(batch, shape[0]), torch.randn(batch, shape[1]), pattern, blocksize
                )


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16)])
def test_any_layout(blocksize):
    pattern = random_pattern((37, 50), blocksize, 0.4)
    wide = torch.randn(40, 120)
    check(wide[:, 1:38], wide[:, 3:103:2], pattern, blocksize)
    check(wide.T[:37].T, wide[:1, :50].expand(40, 50), pattern, blocksize)


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16), (8, 8)])
def test_threads_agree_bit_for_bit(threads, blocksize):
    pattern = random_pattern((400, 300), blocksize, 0.3)
    grad, x = torch.randn(300, 400), torch.randn(300, 300)
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(sddmm_native.sddmm(grad, x, pattern, blocksize[::-1]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
