"""The native linear layer, its input gradient and chains, against float64."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_lth import bsr, kernels
from sparse_lth.kernels import Chain, ChainLayer, Pattern, linear_native, linear_torch
from tests.bounds import assert_close

if linear_native.WHY_NOT:
    pytest.skip(f"native kernels are {linear_native.WHY_NOT}", allow_module_level=True)

# A sum of n products errs by at most n roundings of the sum of their magnitudes, and by about
# sqrt(n) in fact; the sums here have at most 256 terms.
BLOCKSIZES = [
    (1, 1),
    (16, 16),
    (16, 1),
    (32, 4),
    (8, 8),
    (24, 5),
    (64, 64),
    (1, 20),
    (4, 4),
    (3, 7),
]
BATCHES = [1, 2, 3, 7, 11, 12, 16, 17, 29, 40, 65, 131]


def random_layer(out_features, in_features, blocksize, density):
    """values, pattern, weight; density: of the grid, or "one block" """
    rows, cols = bsr.grid_shape((out_features, in_features), blocksize)
    kept = 1 if density == "one block" else round(density * rows * cols)
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    mask[torch.randperm(rows * cols)[:kept]] = True
    mask = mask.view(rows, cols).repeat_interleave(blocksize[0], 0)
    mask = mask.repeat_interleave(blocksize[1], 1)[:out_features, :in_features]
    weight = torch.randn(out_features, in_features) * mask
    values, crow, col = bsr.from_dense(weight, mask, blocksize)
    return values, Pattern.from_indices(crow, col, (rows, cols)), weight


def check(out, x, weight, bias=None, activation="none"):
    """out: activation(x @ weight.T + bias), to rounding"""
    x, weight = x.double(), weight.double()
    bias = torch.zeros(len(weight), dtype=x.dtype) if bias is None else bias.double()
    ref = linear_torch.ACTIVATIONS[activation](F.linear(x, weight, bias))
    magnitude = x.abs() @ weight.abs().T + bias.abs()
    assert out.shape == ref.shape
    assert_close(out, ref, magnitude)


@pytest.fixture(params=linear_native.INSTRUCTION_SETS)
def instruction_set(request, threads):
    threads(1)  # the products are small
    with kernels.use_backend("native", request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets how many threads torch uses, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("density", [0, "one block", 0.05, 0.5, 1])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_float64(instruction_set, blocksize, density):
    for out_features, in_features in [(1, 1), (13, 256), (65, 39), (112, 80)]:
        values, pattern, weight = random_layer(out_features, in_features, blocksize, density)
        bias = torch.randn(out_features)
        for batch in BATCHES:
            x, grad = torch.randn(batch, in_features), torch.randn(batch, out_features)
            y = kernels.linear(x, values, pattern, bias, out_features, "relu")
            check(y, x, weight, bias, "relu")
            dx = linear_native.linear_grad_input(grad, values, pattern, in_features)
            check(dx, grad, weight.T)


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16), (16, 1), (12, 3), (7, 5), (4, 300)])
def test_long_rows(instruction_set, blocksize):
    """More inputs than stay in the second cache are taken in ranges."""
    values, pattern, weight = random_layer(70, 9001, blocksize, 0.1)
    for batch in (5, 20, 70):
        x = torch.randn(batch, 9001)
        check(kernels.linear(x, values, pattern, None, 70, "relu"), x, weight, None, "relu")


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    blocksize=st.tuples(st.integers(1, 33), st.integers(1, 20)),
    batch=st.integers(0, 70),
    density=st.floats(0, 1),
    name=st.sampled_from(linear_native.INSTRUCTION_SETS),
    seed=st.integers(0, 1000),
)
def test_any_shape(shape, blocksize, batch, density, name, seed):
    torch.manual_seed(seed)
    values, pattern, weight = random_layer(*shape, blocksize, density)
    x = torch.randn(batch, shape[1])
    with kernels.use_backend("native", name):
        check(kernels.linear(x, values, pattern, None, shape[0]), x, weight)


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 4), (8, 8)])
def test_any_layout(instruction_set, blocksize):
    values, pattern, weight = random_layer(37, 50, blocksize, 0.4)
    wide = torch.randn(40, 120)
    bias = torch.randn(74)[::2]
    for x in (wide[:, 1:51], wide[::2, 3:103:2], wide.T[:50].T, wide[:1, :50].expand(9, 50)):
        y = kernels.linear(x, values, pattern, bias, 37)
        check(y, x, weight, bias)
        padded = torch.cat([values.new_zeros(1, *values.shape[1:]), values]).flatten()
        misaligned = padded[-values.numel() - 1 :][1:].view_as(values)
        assert torch.equal(y, kernels.linear(x, misaligned, pattern, bias, 37))


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16), (8, 3), (1, 20), (4, 4)])
def test_nan_and_inf_reach_only_kept_blocks(instruction_set, blocksize, activation):
    values, pattern, weight = random_layer(37, 50, blocksize, 0.3)
    reached = linear_torch.to_dense(torch.ones_like(values), *pattern[:2], weight.shape).T.bool()
    for batch in (1, 5, 50, 70):
        for bad in (float("nan"), float("inf"), float("-inf")):
            clean = torch.randn(batch, 50)
            for k in (0, 17, 49):
                x = clean.clone()
                x[batch // 2, k] = bad
                y = kernels.linear(x, values, pattern, None, 37, "none")
                touched = torch.zeros(batch, 37, dtype=torch.bool)
                touched[batch // 2] = reached[k]
                assert torch.equal(~y.isfinite(), touched)
                if activation == "relu":
                    rectified = kernels.linear(x, values, pattern, None, 37, "relu")
                    assert torch.equal(rectified.isnan(), y.isnan())


def test_nothing_to_do():
    values, pattern, _ = random_layer(20, 30, (4, 4), 0.5)
    assert kernels.linear(torch.empty(0, 30), values, pattern, None, 20).shape == (0, 20)
    grad = torch.empty(0, 20)
    assert linear_native.linear_grad_input(grad, values, pattern, 30).shape == (0, 30)


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16), (8, 4)])
@pytest.mark.parametrize("batch", [1, 5, 70, 1000])
def test_threads_agree_bit_for_bit(threads, blocksize, batch):
    size = 2000 if batch < 100 else 300  # threads split outputs, or the batch
    values, pattern, _ = random_layer(size, size, blocksize, 0.3)
    x = torch.randn(batch, size)
    results = []
    for n in (1, 2, 5):
        threads(n)
        y = kernels.linear(x, values, pattern, None, size)
        results.append((y, linear_native.linear_grad_input(y, values, pattern, size)))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


def test_called_from_several_threads():
    values, pattern, _ = random_layer(300, 300, (1, 1), 0.3)
    inputs = [torch.randn(200, 300) for _ in range(8)]

    def call(x):
        return kernels.linear(x, values, pattern, None, 300)

    expected = [call(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(call, inputs), expected))


FORK = """
import multiprocessing, sys, torch
from torch.utils.data import DataLoader
from sparse_lth import SparseLinear
torch.set_num_threads(4)
layer = SparseLinear(600, 600, blocksize=(1, 1), density=0.5).requires_grad_(False)
x = torch.randn(500, 600)
expected = layer(x).numpy().tobytes()  # OpenMP threads are started here; a child has none

def child(_):
    return layer(x).numpy().tobytes() == expected  # torch's own parallel ops would hang

if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(not child(0)))
    process.start()
    process.join(60)
    assert process.exitcode == 0, process.exitcode
    loader = DataLoader(range(4), collate_fn=child, num_workers=2, multiprocessing_context="fork")
    assert all(loader)
"""


def test_after_fork():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=100)


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 4), (4, 4)])
def test_gradients_are_those_of_torch(blocksize):
    values, pattern, _ = random_layer(40, 50, blocksize, 0.3)
    x, bias, grad = torch.randn(9, 50), torch.randn(40), torch.randn(9, 40)
    found = {}
    for name in ("native", "torch"):
        leaves = [t.clone().requires_grad_() for t in (x, values, bias)]
        with kernels.use_backend(name):
            kernels.linear(leaves[0], leaves[1], pattern, leaves[2], 40, "relu").backward(grad)
        found[name] = [t.grad for t in leaves]
    torch.testing.assert_close(found["native"], found["torch"], atol=2e-5, rtol=0)


def mixed_chain(activations=("relu", "relu", "relu", "none")):
    """Layers of each kind in turn, and the same as (weight, bias, activation)"""
    blocksizes, features = ((1, 1), (16, 16), (8, 3), None), (78, 60, 50, 41, 10)
    layers, reference = [], []
    for j, (blocksize, activation) in enumerate(zip(blocksizes, activations, strict=True)):
        in_features, out_features = features[j : j + 2]
        bias = torch.randn(out_features)
        if blocksize is None:
            values, pattern, weight = torch.randn(out_features, in_features), None, None
            weight = values
        else:
            values, pattern, weight = random_layer(out_features, in_features, blocksize, 0.3)
        layers.append(ChainLayer(values, pattern, bias, in_features, out_features, activation))
        reference.append((weight, bias, activation))
    return layers, reference


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 3), (0,), (3,), (2, 3)])
def test_chain(instruction_set, order):
    layers, reference = mixed_chain()
    layers, reference = [layers[j] for j in order], [reference[j] for j in order]
    chain = Chain(layers)
    for batch in [0, *BATCHES, 300]:
        x = torch.randn(batch, chain.in_features)
        ref = bound = x.double()
        for weight, bias, activation in reference:
            bound = bound.abs() @ weight.double().abs().T + bias.abs()
            ref = linear_torch.ACTIVATIONS[activation](
                F.linear(ref, weight.double(), bias.double())
            )
        assert_close(chain(x), ref, len(layers) * bound)  # each layer's roundings pass through


def test_chain_reads_the_memory_that_its_tensors_had():
    layers, _ = mixed_chain()
    chain, x = Chain(layers), torch.randn(5, 78)
    before = chain(x)
    layers[0].values.mul_(2)  # training in place
    assert torch.equal(chain(x), Chain(layers)(x))
    layers[0].values.div_(2)
    for t in (layers[0].values, layers[0].bias):
        t.data = torch.zeros(1)  # which frees the memory, if nobody else holds it
    assert torch.equal(chain(x), before)


def _taken(dtype):
    """Inputs of 78 numbers that a native call takes as they lie, by what they are."""
    x = torch.randn(4, 80).to(dtype)
    return {"rows": x[:, :78].clone(), "part of rows": x[:, :78], "behind": x[1:, 2:]}


def _left(dtype):
    """Inputs that it leaves to the interpreter, of which some are of no use at all."""
    x = torch.randn(4, 78).to(dtype)
    odd = torch.zeros(1 + 4 * 79, dtype=dtype)
    inputs = {
        "columns": torch.randn(78, 4).to(dtype).T,
        "negated": torch._neg_view(x),
        "zeros": torch._efficientzerotensor((4, 78), dtype=dtype),
        "Parameter": nn.Parameter(x),
        "no row": x[:0],
        "one dimension": x[0],
        "too many": torch.randn(4, 80).to(dtype),
        "float64": x.double(),
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
    }
    if dtype == torch.bfloat16:
        inputs["half a word on"] = odd[1 : 1 + 4 * 78].view(4, 78)
        inputs["an odd stride"] = odd[1:].view(4, 79)[:, :78]
    return inputs


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch is too old for it"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_native_call_takes_rows_as_they_lie(dtype):
    weight = torch.randn(10, 78).to(dtype)
    exact, chain = weight.double().T, Chain([ChainLayer(weight, None, None, 78, 10)])

    def call(x):
        return linear_native._native.call(x, chain._plan, 0, 1)

    for x in _taken(dtype).values():
        assert_close(call(x), x.double() @ exact, x.double().abs() @ exact.abs())
    for name, x in _left(dtype).items():
        assert call(x) is None, name


def test_chain_says_what_it_expected():
    layers, _ = mixed_chain()
    with pytest.raises(ValueError, match="expected in_features 60, got 50"):
        Chain([layers[0], layers[2]])
    with pytest.raises(ValueError, match="gelu"):
        Chain([layers[0]._replace(activation="gelu")])
    with pytest.raises(ValueError, match="expected 1 to"):
        Chain([])
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 78\) inputs, got \(5, 77\)"):
        Chain(layers)(torch.randn(5, 77))


def test_backends():
    said = kernels.backends()["native"]
    assert said.startswith(f"available ({linear_native.INSTRUCTION_SETS[0]}")
    assert ("no machine code" in said) == bool(linear_native.WHY_NO_CODE)
    with (
        pytest.raises(ValueError, match="expected instruction_set"),
        kernels.use_backend("native", "sse9"),
    ):
        pass
