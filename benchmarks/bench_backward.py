"""Forward and both gradients of the layer against the dense layer; its peers have no backward."""

import functools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu
from sparse_lth.kernels.sddmm_torch import sddmm
from tests.bounds import assert_close


def gpu_cases(full: bool) -> list[gpu.Case]:
    if full:
        return gpu.grid((64, 256, 1024, 4096), dtypes=gpu.DTYPES)
    shapes, blocksizes = ((1024, 1024), (4096, 4096)), ((64, 64), (128, 16), (128, 64))
    return [
        *gpu.grid((256, 4096), shapes, blocksizes=blocksizes, densities=(0.5, 0.1, 0.05)),
        *gpu.grid((4096,), shapes[1:], ("float32",), blocksizes, densities=(0.1,)),
    ]


def _step(layer, weight, x, grad):
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, weight), grad)


def _measure(case: gpu.Case) -> dict:
    weight = gpu.weight_of(case.shape, case.dtype, case.blocksize, case.density)
    touched = case.density * weight.numel() + 2 * case.batch * sum(case.shape)
    calls = []
    for _ in range(gpu.copies(touched * weight.itemsize)):
        x, grad = (
            torch.randn(case.batch, n, device="cuda", dtype=weight.dtype) for n in case.shape[::-1]
        )
        if case.backend == "dense":
            leaf = weight.clone().requires_grad_(True)
            layer = functools.partial(F.linear, weight=leaf)
        else:
            layer = gpu.ours(weight, case.blocksize)[0].requires_grad_(True)
            leaf = layer.weight_values
        calls.append(functools.partial(_step, layer, leaf, x.requires_grad_(True), grad))
    layer, _, x, grad = calls[0].args
    y, dx, dweight = calls[0]()
    x = x.detach()
    gpu.check(y.detach(), x, weight)
    gpu.check(dx, grad, weight.t())
    if case.backend == "dense":
        gpu.check(dweight, grad.t(), x.t())
    else:
        pairs = ((grad.double(), x.double()), (grad.abs().double(), x.abs().double()))
        exact, magnitude = (sddmm(*pair, layer.pattern, dweight.shape[1:]) for pair in pairs)
        assert_close(dweight, exact, magnitude)
    flop = 6 * case.batch * weight.count_nonzero().item()
    return gpu.row(case, gpu.device_times(calls, graph=True), flop, gpu.limit(case))


_measure_dense = functools.cache(_measure)


@pytest.mark.gpu
def test_forward_and_backward(gpu_row, case):
    gpu_row(gpu.compared, case, _measure, _measure_dense, "forward and backward")
