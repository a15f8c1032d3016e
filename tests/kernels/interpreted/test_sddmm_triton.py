import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lth import SparseLinear
from sparse_lth.kernels import sddmm_torch, sddmm_triton, tiles
from tests.bounds import assert_close

DTYPES = [torch.float32, torch.float16]  # not bfloat16, as in test_linear_triton.py
BLOCKSIZES = [(16, 16), (64, 64), (128, 128), (128, 16), (64, 4), (16, 1), (3, 5), (48, 12)]


def _check(size, blocksize, density, grad, x):
    """grad: (batch, out_features); x: (batch, in_features)"""
    pattern = SparseLinear(size[1], size[0], blocksize=blocksize, density=density).pattern
    block = blocksize[::-1]
    dvalues = sddmm_triton.sddmm(grad, x, pattern, block)
    exact = sddmm_torch.sddmm(grad.double(), x.double(), pattern, block)
    magnitude = sddmm_torch.sddmm(grad.double().abs(), x.double().abs(), pattern, block)
    assert dvalues.dtype == x.dtype
    assert_close(dvalues, exact, magnitude)


@pytest.mark.parametrize("size", [(1, 1), (33, 17), (80, 48), (100, 300)])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("batch", [1, 20])
def test_sizes(size, blocksize, density, batch):
    _check(size, blocksize, density, torch.randn(batch, size[0]), torch.randn(batch, size[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 64, 300])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_parts_of_the_batch(dtype, batch, parts, monkeypatch):
    monkeypatch.setattr(tiles, "splits", lambda *_: parts)
    grad, x = (torch.randn(batch, n, dtype=dtype) for n in (70, 90))
    _check((70, 90), (32, 16), 0.5, grad, x)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 100),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    blocksize=st.tuples(st.sampled_from([5, 16, 32, 64, 128]), st.integers(1, 40)),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_gradient(batch, size, blocksize, density, dtype, seed):
    torch.manual_seed(seed)
    grad, x = (torch.randn(batch, n, dtype=dtype) for n in size)
    _check(size, blocksize, density, grad, x)


def test_strides():
    wide = torch.randn(5, 200)
    for x in [torch.randn(48, 5).T, wide[:, 3:51], wide[:1, :48].expand(5, 48)]:
        for grad in [torch.randn(64, 5).T, wide[:, 1:65], torch.ones(()).expand(5, 64)]:
            _check((64, 48), (16, 16), 0.5, grad, x)


def test_nothing_beside_the_tensors_is_read():
    grad, x = (torch.full((14, 256), torch.nan)[:5, :n] for n in (96, 32))
    grad.normal_()
    x.normal_()
    _check((96, 32), (64, 12), 0.7, grad, x)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy
def test_padding_has_no_gradient():
    layer = SparseLinear(20, 20, density=1.0)
    grad, x = torch.full((5, 20), torch.nan), torch.full((5, 20), torch.inf)
    dvalues = sddmm_triton.sddmm(grad, x, layer.pattern, (16, 16))
    assert (dvalues[~layer._inside()] == 0).all()
    assert dvalues[layer._inside()].isnan().all()
