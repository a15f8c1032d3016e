"""Machine code made from patterns: every program against float64, and where it lives."""

import copy
import ctypes
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from sparse_lth import SparseLinear, SparseSequential, kernels
from sparse_lth.kernels import linear_native
from tests.kernels.test_linear_native import check, random_layer

if linear_native.WHY_NO_CODE:
    pytest.skip(f"no machine code: {linear_native.WHY_NO_CODE}", allow_module_level=True)


def anonymous(permissions):
    """How many bytes this process has mapped of no file, with these permissions."""
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps]
    ends = [line[0].split("-") for line in lines if line[1] == permissions and len(line) == 5]
    return sum(int(end, 16) - int(start, 16) for start, end in ends)


def code_bytes():
    return anonymous("r-xp")


SHAPES = [  # out_features, in_features
    (1, 40),
    (28, 129),  # a group, and an input beyond a short displacement
    (29, 1100),  # a second group of one output, pieces of the inputs
    (64, 2500),  # more inputs than LONG
    (300, 784),
]


@pytest.mark.parametrize("density", [0.04, 0.1, 0.5, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64(shape, density):
    values, pattern, weight = random_layer(*shape, (1, 1), density)
    before = code_bytes()
    for batch in (64, 70, 131, 600):
        x, grad, bias = (
            torch.randn(batch, shape[1]),
            torch.randn(batch, shape[0]),
            torch.randn(shape[0]),
        )
        for given, activation in ((bias, "relu"), (None, "none")):
            y = kernels.linear(x, values, pattern, given, shape[0], activation)
            check(y, x, weight, given, activation)
        dx = linear_native.linear_grad_input(grad, values, pattern, shape[1])
        check(dx, grad, weight.T)
    assert code_bytes() > before


@pytest.mark.parametrize("blocksize", [(3, 7), (2, 1), (1, 20), (1, 700), (2, 16)])
def test_blocks(blocksize):
    values, pattern, weight = random_layer(65, 1030, blocksize, 0.3)
    x, grad, before = torch.randn(90, 1030), torch.randn(90, 65), code_bytes()
    check(kernels.linear(x, values, pattern, None, 65), x, weight)
    assert code_bytes() > before
    check(linear_native.linear_grad_input(grad, values, pattern, 1030), grad, weight.T)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_nan_reaches_only_kept_weights(activation):
    values, pattern, weight = random_layer(65, 300, (1, 1), 0.1)
    x = torch.randn(70, 300)
    x[5, 17] = x[69, 299] = float("nan")
    y = kernels.linear(x, values, pattern, None, 65, activation)
    kept, wrong = (weight != 0).double(), x.isnan().double()
    assert torch.equal(y.isnan(), wrong @ kept.T > 0)


def test_much_code(threads):
    """Threads then share a tile."""
    values, pattern, weight = random_layer(600, 3000, (1, 1), 0.05)
    x, results = torch.randn(600, 3000), []
    for n in (1, 2, 3):
        threads(n)
        results.append(kernels.linear(x, values, pattern, None, 600))
        assert torch.equal(results[0], results[-1])
    check(results[0], x, weight)


@pytest.mark.parametrize("batch", [65, 129, 300, 1001])
def test_threads_agree_where_some_layers_have_code(threads, batch):
    """Much code makes tiles that depend on the threads, which no sum may show."""
    layers = (
        SparseLinear(600, 1000, blocksize=(1, 1), density=0.2),
        nn.ReLU(),
        SparseLinear(1000, 70, blocksize=(1, 1), density=0.01),
        nn.ReLU(),
        SparseLinear(70, 40, blocksize=(16, 4), density=0.5),
    )
    network, x, results = SparseSequential(*layers), torch.randn(batch, 600), []
    with torch.inference_mode():
        for n in (1, 2, 3, 5):
            threads(n)
            results.append(network(x))
            assert torch.equal(results[0], results[-1])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_code_goes_with_the_pattern():
    before, writable = code_bytes(), anonymous("rwxp")
    layer, x = SparseLinear(300, 200, blocksize=(1, 1), density=0.2), torch.randn(80, 300)
    other = SparseLinear(300, 200, blocksize=(1, 1), density=0.3)
    with torch.inference_mode():
        layer(x[:1])
        assert code_bytes() == before, "one row does not need it"
        layer(x)
        assert code_bytes() > before
        assert anonymous("rwxp") == writable, "code that could be written to"
        layer.load_state_dict(other.state_dict())
        assert layer(x[:1]).isfinite().all()
        assert code_bytes() == before, "that of the old pattern is gone"
        check(layer(x), x, layer.to_dense().weight, layer.bias)
    del layer
    assert code_bytes() == before


def test_values_are_read_where_they_are():
    layer, x = SparseLinear(300, 200, blocksize=(1, 1), density=0.2), torch.randn(80, 300)
    for change in (lambda t: t.mul_(2), lambda t: t.data.add_(1), lambda t: t.numpy().fill(3)):
        with torch.no_grad():
            check(layer(x), x, layer.to_dense().weight, layer.bias)
            change(layer.weight_values)
            check(layer(x), x, layer.to_dense().weight, layer.bias)


def test_copies():
    layer, x = SparseLinear(300, 200, blocksize=(1, 1), density=0.2), torch.randn(80, 300)
    with torch.inference_mode():
        y = layer(x)
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(again(x), y)
    del layer
    assert torch.equal(again.requires_grad_(False)(x), y)


def test_first_calls_at_once():
    x, waiting = torch.randn(64, 400), threading.Barrier(4)
    for _ in range(10):
        values, pattern, weight = random_layer(400, 400, (1, 1), 0.2)

        def call(_):
            waiting.wait()
            return kernels.linear(x, values, pattern, None, 400)  # noqa: B023

        with ThreadPoolExecutor(4) as pool:
            for y in pool.map(call, range(4)):
                check(y, x, weight)


REFUSE = "assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0"  # PR_SET_MDWE
CALL = """
import ctypes, sys, torch
{before}
from sparse_lth import SparseLinear, SparseSequential, kernels
{after}
layer, x = SparseLinear(300, 200, blocksize=(1, 1), density=0.2), torch.randn(80, 300)
with torch.inference_mode():
    y, dense = layer(x), layer.to_dense()(x)
torch.testing.assert_close(y, dense, atol=1e-5, rtol=0)
with open("/proc/self/maps") as maps:
    assert not [s for s in map(str.split, maps) if "x" in s[1] and len(s) == 5]
print(kernels.backends()["native"])
"""


def run(before="", after="", **environment):
    script = CALL.format(before=before, after=after)
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.check_output(command, text=True, env={**environment}).strip()


def test_switched_off():
    said = run(SPARSE_LTH_JIT="0")
    assert said == "available (avx512; no machine code: SPARSE_LTH_JIT=0)"


def test_where_memory_may_not_be_executed():
    if ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0:
        pytest.skip("this kernel cannot refuse it")
    said = run(before=REFUSE)
    assert "no machine code: this process may not execute memory that it wrote" in said
    assert run(after=REFUSE) == "available (avx512_jit)"  # it was allowed at first
