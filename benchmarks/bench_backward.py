"""Forward and both gradients of the layer against the dense layer; its peers have no backward."""

import pytest
import torch

from benchmarks import gpu
from sparse_lth.kernels.sddmm_torch import sddmm
from tests.bounds import assert_close


def _step(layer, x, grad):
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, *layer.parameters()), grad)


@gpu.needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "sparse_lth"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocksize", [(32, 32), (64, 64), (128, 16), (128, 64)])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.05])
@pytest.mark.parametrize("batch", [256, 4096])
@pytest.mark.parametrize("shape", [(300, 784), (1024, 1024), (4096, 4096)])
def test_forward_and_backward(benchmark, shape, batch, density, blocksize, dtype, name):
    weight = gpu.sparse_weight(*shape, density, blocksize, dtype)
    sparse = gpu.ours(weight, blocksize)
    dense = sparse.to_dense()
    sizes = [(batch, shape[1]), (batch, shape[0])]
    count = gpu.copies(sum(m * n for m, n in sizes) * weight.itemsize)
    inputs = [
        [torch.randn(size, device="cuda", dtype=dtype) for size in sizes] for _ in range(count)
    ]
    for x, _ in inputs:
        x.requires_grad_(True)
    times = {}
    for contender, layer in {"dense": dense, "sparse_lth": sparse}.items():
        calls = [lambda layer=layer, pair=pair: _step(layer, *pair) for pair in inputs]
        times[contender] = gpu.device_times(calls, graph=batch <= 256)
        if contender == name:
            benchmark.pedantic(calls[0])

    x, grad = inputs[0]
    y, dx, dvalues = _step(sparse, x, grad)
    gpu.check(y.detach(), x.detach(), weight)
    gpu.check(dx, grad, weight.t())
    x, grad = x.detach().double(), grad.double()
    exact, magnitude = (
        sddmm(g, v, sparse.pattern, blocksize[::-1]) for g, v in ((grad, x), (grad.abs(), x.abs()))
    )
    assert_close(dvalues, exact, magnitude)
    gpu.record(
        benchmark,
        times[name],
        times["dense"],
        flop=6 * batch * weight.count_nonzero().item(),
        op="forward and backward",
        backend=name,
        dtype=str(dtype),
        shape=shape,
        batch=batch,
        density=density,
        blocksize=blocksize,
        limit=gpu.limit(*shape, density, blocksize),
    )
