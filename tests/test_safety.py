"""No sequence of calls lets a kernel read what was not checked, or memory that is not its own."""

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_lth import SparseLinear, SparseSequential
from tests.bounds import assert_close

ROOT = Path(__file__).parent.parent
MODES = (torch.no_grad, torch.enable_grad, torch.inference_mode)


def a_layer(seed=0, density=0.4, **options):
    torch.manual_seed(seed)
    return SparseLinear(64, 48, blocksize=(8, 4), density=density, **options)


def a_chain(layer):
    return SparseSequential(layer, nn.ReLU(), nn.Linear(48, 48))


def check(layer, x):
    """The layer computes its own dense weight, in each mode."""
    weight, bias = layer.to_dense().weight.double(), layer.bias.double()
    exact = F.linear(x.double(), weight, bias)
    magnitude = F.linear(x.double().abs(), weight.abs(), bias.abs())
    for mode in MODES:
        with mode():
            assert_close(layer(x), exact, magnitude)


def check_chain(model, x):
    """The one call of a chain agrees with its modules."""
    with torch.no_grad():
        expected, magnitude = x.double(), x.double().abs()
        for module in model:
            dense = module.to_dense() if isinstance(module, SparseLinear) else module
            if isinstance(dense, nn.Linear):
                weight, bias = dense.weight.double(), dense.bias.double()
                expected = F.linear(expected, weight, bias)
                magnitude = F.linear(magnitude, weight.abs(), bias.abs())
            else:
                expected = expected.relu()
        assert_close(model(x), expected, 2 * magnitude)


# indices that were never written, or written past the checks


def test_a_layer_from_the_meta_device_runs_once_it_has_numbers():
    with torch.device("meta"):
        layer = SparseLinear(1024, 1024)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    check(layer, torch.randn(2, 1024))


@pytest.mark.parametrize("poison", [-1, 1 << 30])
def test_memory_without_numbers_is_refused_until_there_are_some(poison):
    layer = nn.utils.skip_init(SparseLinear, 1024, 1024)
    layer.crow_indices.fill_(poison)
    layer.col_indices.fill_(poison)
    for mode in MODES:
        with mode(), pytest.raises(ValueError, match=r"load a state_dict, or call reset_param"):
            layer(torch.randn(1, 1024))
    source = SparseLinear(1024, 1024)
    layer.load_state_dict(source.state_dict())
    check(layer, torch.randn(2, 1024))


def test_tensors_of_a_state_dict_are_written_in_place():
    for seed in range(5):
        a, b, x = a_layer(seed), a_layer(seed + 9), torch.randn(3, 64, requires_grad=True)
        a(x).sum().backward()  # it has called its kernels before
        x.grad = None
        with torch.no_grad():
            a(x)
        for name, tensor in a.state_dict().items():
            tensor.copy_(b.state_dict()[name])
        check(a, x.detach())
        a(x).sum().backward()
        weight = b.to_dense().weight.double()
        assert_close(x.grad, weight.sum(0).expand(3, 64), weight.abs().sum(0).expand(3, 64))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["crow_indices", "col_indices"]),
    st.sampled_from(["numpy", "data", "in place"]),
    st.lists(st.tuples(st.integers(0, 100), st.integers(-(2**31), 2**31 - 1)), min_size=1),
    st.booleans(),
)
def test_writes_to_the_indices_reach_no_kernel_unchecked(name, how, writes, warm):
    layer, x = a_layer(), torch.randn(3, 64)
    model, tensor = a_chain(layer), getattr(layer, name)
    if warm:
        with torch.no_grad():
            layer(x), model(x)
    target = {"numpy": tensor.numpy(), "data": tensor.data, "in place": tensor}[how]
    for place, number in writes:
        target[place % len(tensor)] = number
    for call in (lambda: layer(x), lambda: layer(x).sum().backward(), lambda: model(x)):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), suppress(ValueError, RuntimeError):
                call()
    if how == "in place":  # which torch knows of, so that it is seen
        with suppress(ValueError):
            check(layer, x)


def test_a_layer_without_numbers_computes_none():
    layer, x = a_layer(device="meta"), torch.randn(3, 64)
    assert layer(x.to("meta")).is_meta
    for mode in MODES:
        with mode(), pytest.raises(ValueError, match="expected x on the meta device"):
            layer(x)


# tensors of another dtype, length or layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32])
def test_type_leaves_the_indices_what_they_are(dtype):
    layer, x = a_layer(), torch.randn(3, 64)
    indices = layer.crow_indices.clone(), layer.col_indices.clone()
    if dtype.is_floating_point:
        layer.type(dtype)
        layer(x.to(dtype))
        layer.type(torch.float64)
        check(layer, x.double())
    assert layer.crow_indices.dtype == layer.col_indices.dtype == torch.int32
    assert torch.equal(layer.crow_indices, indices[0])
    assert torch.equal(layer.col_indices, indices[1])


WRONG = {
    "a short bias": lambda m: setattr(m, "bias", nn.Parameter(torch.ones(3))),
    "a bias of two dimensions": lambda m: setattr(m, "bias", nn.Parameter(torch.ones(48, 1))),
    "a bias of another dtype": lambda m: setattr(m, "bias", nn.Parameter(m.bias.double())),
    "a bias of another device": lambda m: setattr(m, "bias", nn.Parameter(m.bias.to("meta"))),
    "a shorter .data of the bias": lambda m: setattr(m.bias, "data", m.bias.data[:-1].clone()),
    "few values": lambda m: setattr(m, "weight_values", nn.Parameter(m.weight_values[:-1])),
    "no values": lambda m: setattr(m, "weight_values", None),
    "a shorter .data of values": lambda m: setattr(
        m.weight_values, "data", m.weight_values.data[:-1]
    ),
    "flat values": lambda m: setattr(
        m.weight_values, "data", m.weight_values.data.flatten(1).clone()
    ),
    "transposed values": lambda m: setattr(
        m, "weight_values", nn.Parameter(m.weight_values.detach().mT)
    ),
    "no crow_indices": lambda m: setattr(m, "crow_indices", None),
    "no col_indices": lambda m: setattr(m, "col_indices", None),
    "crow_indices of int64": lambda m: setattr(m, "crow_indices", m.crow_indices.long()),
    "col_indices of int64": lambda m: setattr(m, "col_indices", m.col_indices.long()),
    "col_indices of float32": lambda m: setattr(m, "col_indices", m.col_indices.float()),
    "few col_indices": lambda m: setattr(m, "col_indices", m.col_indices[:-1]),
    "other .data of col_indices": lambda m: setattr(m.col_indices, "data", m.col_indices.data + 99),
    "resized col_indices": lambda m: m.col_indices.resize_(1000),
    "few crow_indices": lambda m: setattr(m, "crow_indices", m.crow_indices[:-1]),
    "weight_kept of another shape": lambda m: setattr(
        m, "weight_kept", torch.ones(1, 4, 8, dtype=torch.bool)
    ),
    "weight_kept of float32": lambda m: setattr(
        m, "weight_kept", torch.ones(m.weight_values.shape)
    ),
    "an unknown activation": lambda m: setattr(m, "activation", "tanh"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("warm", [False, True])
def test_tensors_that_do_not_fit_are_one_clear_error(what, warm):
    layer, x = a_layer(), torch.randn(3, 64)
    model = a_chain(layer)
    if warm:
        for mode in MODES:
            with mode():
                layer(x), model(x)
    with torch.no_grad():
        WRONG[what](layer)
    for call in (layer, model):
        for mode in MODES:
            with mode(), pytest.raises(ValueError, match="expected"):
                call(x)


SWAPS = {
    "other memory": lambda t: torch.randn_like(t),
    "the same memory": lambda t: t.view_as(t),
    "other strides": lambda t: torch.randn_like(t).repeat_interleave(2, -1)[..., ::2],
    "no strides": lambda t: t.flatten()[0].expand(t.shape),
    "backwards": lambda t: t.flip(0),
    "transposed memory": lambda t: torch.randn_like(t.mT).mT if t.dim() > 1 else t.clone(),
    "the negative": lambda t: torch.complex(t, t).conj().imag,
}


@pytest.mark.parametrize("how", SWAPS)
@pytest.mark.parametrize("name", ["weight_values", "bias"])
def test_a_layer_sees_data_that_was_swapped(how, name):
    layer, x = a_layer(), torch.randn(3, 64)
    check(layer, x)
    parameter = getattr(layer, name)
    parameter.data = SWAPS[how](parameter.data)
    check(layer, x)


@pytest.mark.parametrize("how", [*SWAPS, "the transpose"])
@pytest.mark.parametrize("name", ["0.weight_values", "0.bias", "2.weight", "2.bias"])
def test_a_chain_sees_data_that_was_swapped(how, name):
    model, x = a_chain(a_layer()), torch.randn(3, 64)
    check_chain(model, x)
    parameter = model.get_parameter(name)
    if how != "the transpose":
        parameter.data = SWAPS[how](parameter.data)
    elif name == "2.weight":  # square: the same memory and shape
        parameter.data = parameter.data.t()
    check_chain(model, x)


@pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
def test_a_layer_sees_indices_that_were_swapped(name):
    layer, x = a_layer(density=2 / 96), torch.randn(3, 64)
    layer.crow_indices.copy_(torch.tensor([0, 1, 1, 1, 1, 1, 2]))
    layer.col_indices.copy_(torch.tensor([3, 7]))
    model = a_chain(layer)
    check(layer, x)
    check_chain(model, x)
    others = {"crow_indices": [0, 0, 1, 1, 1, 2, 2], "col_indices": [15, 0]}
    getattr(layer, name).data = torch.tensor(others[name], dtype=torch.int32)
    check(layer, x)
    check_chain(model, x)


def test_a_layer_sees_another_activation():
    layer, x = a_layer(), torch.randn(3, 64)
    for activation in ("none", "relu", "gelu", "none"):
        layer.activation = activation
        act = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}[activation]
        for mode in MODES:
            with mode():
                expected = act(F.linear(x, layer.to_dense().weight, layer.bias))
                torch.testing.assert_close(layer(x), expected)


def test_a_chain_sees_a_changed_flatten_and_hooks_on_all_modules():
    model = SparseSequential(nn.Flatten(), a_layer())
    seen, x = [], torch.randn(2, 4, 16)
    with torch.no_grad():
        assert model(x).shape == (2, 48)
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(type(module))
        )
        model(x)
        hook.remove()
        assert seen == [nn.Flatten, SparseLinear, SparseSequential]
        model[0].start_dim = 0
        with pytest.raises(ValueError, match="expected"):
            model(x)


def test_weights_that_are_no_parameters_get_their_gradient():
    layer = a_layer(bias=False)
    source = layer.weight_values.detach().clone().requires_grad_()
    del layer.weight_values
    layer.weight_values = 2 * source
    layer(torch.randn(3, 64)).sum().backward()
    assert source.grad is not None


# inputs and gradients


def zeros_without_memory(*shape):
    return torch._efficientzerotensor(*shape)


INPUTS = {
    "negative": lambda *s: torch.randn(*s, dtype=torch.complex64).conj().imag,
    "negative and transposed": lambda *s: torch.randn(*s[::-1], dtype=torch.cfloat).conj().imag.t(),
    "transposed": lambda *s: torch.randn(s[::-1]).t(),
    "one row": lambda *s: torch.randn(1, s[1]).expand(s),
    "one column": lambda *s: torch.randn(s[0], 1).expand(s),
    "one number": lambda *s: torch.randn(1, 1).expand(s),
    "strided": lambda *s: torch.randn(2 * s[0], 3 * s[1])[::2, ::3],
    "rows of a wider one": lambda *s: torch.randn(s[0], s[1] + 5)[:, 2:-3],
    "overlapping": lambda *s: torch.randn(s[0] + s[1]).as_strided(s, (1, 1)),
    "zeros without memory": zeros_without_memory,
    "empty": lambda *s: torch.randn(0, s[1]),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("batch", [1, 2, 17])
def test_inputs_and_gradients_of_any_memory(kind, batch):
    layer, x = a_layer(), INPUTS[kind](batch, 64)
    check(layer, x)
    check_chain(a_chain(layer), x)
    plain = torch.zeros(x.shape) + x.clone()
    grad = INPUTS[kind](batch, 48)
    if kind == "empty":
        grad = torch.randn(0, 48)
    leaves = [plain.clone().requires_grad_(), x.detach().requires_grad_()]
    results = []
    for leaf, upstream in zip(leaves, (torch.zeros(grad.shape) + grad.clone(), grad), strict=True):
        y = layer(leaf)
        results.append(torch.autograd.grad(y, (leaf, layer.weight_values, layer.bias), upstream))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_layer_made_in_inference_mode():
    with torch.inference_mode():
        layer, x = a_layer(), torch.randn(3, 64)
        layer(x)
        assert layer._snapshot() is layer._snapshot()  # its indices are not checked in every call
        for name, tensor in a_layer(5).state_dict().items():
            getattr(layer, name).copy_(tensor)
        dense = layer.to_dense()
        torch.testing.assert_close(layer(x), F.linear(x, dense.weight, dense.bias))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, dense.weight, dense.bias))


# threads


def run_against(change, calls, seconds=1.0):
    """Runs `change` in one thread and each of the calls in another; the exceptions of all."""
    errors, stop = [], threading.Event()

    def repeat(function):
        try:
            while not stop.is_set():
                function()
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=repeat, args=(f,)) for f in (change, *calls)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        stop.wait(seconds)
        stop.set()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return errors


def one_of(call, results):
    def check():
        y = call()
        assert any(torch.equal(y, expected) for expected in results), "of no consistent state"

    return check


def under(mode, function):
    def call():
        with mode():
            return function().detach()

    return call


@pytest.mark.parametrize("what", ["data", "state_dict", "both"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("chained", [False, True])
def test_threads_get_the_result_of_one_state(what, mode, chained):
    layer, x = a_layer(), torch.randn(2, 64)
    states, results = [], []
    model = SparseSequential(layer, nn.ReLU()) if chained else layer
    for seed, density in ((1, 0.05), (2, 1.0), (3, 0.4), (4, 0.4)):
        state = (layer if what == "data" else a_layer(seed, density)).state_dict()
        states.append({name: t.clone() for name, t in state.items()})
        nn.init.normal_(states[-1]["weight_values"])
        layer.load_state_dict(states[-1])
        results.append(under(mode, lambda: model(x))())
    turn = iter(range(10**9))

    def change():
        state = states[next(turn) % 4]
        if what == "data":
            layer.weight_values.data = state["weight_values"].clone()
            layer.bias.data = state["bias"].clone()  # the same in all of them
        else:
            layer.load_state_dict(state)
        if what == "both":
            layer.weight_values.data = layer.weight_values.data.clone()
            layer.bias.data = layer.bias.data.clone()

    call = one_of(under(mode, lambda: model(x)), results)
    assert not run_against(change, [call, call], seconds=0.5)


def test_threads_call_a_chain_while_its_dense_layer_is_swapped():
    model, x = a_chain(a_layer()), torch.randn(2, 64)
    weights = [torch.randn(48, 48) for _ in range(3)]
    results = []
    for weight in weights:
        model[2].weight.data = weight
        results.append(under(torch.no_grad, lambda: model(x))())
    turn = iter(range(10**9))

    def change():
        model[2].weight.data = weights[next(turn) % 3].clone()

    call = one_of(under(torch.no_grad, lambda: model(x)), results)
    assert not run_against(change, [call, call], seconds=1)


# what runs last


LAST = """
import atexit, gc
atexit.register(lambda: print(called(network)))  # first, so that it runs last

import torch
from torch import nn
from sparse_lth import SparseLinear, SparseSequential, quantize_

def a_network():
    torch.manual_seed(0)
    layers = [SparseLinear(256, 256, blocksize=1, density=0.3) for _ in range(4)]
    model = nn.Sequential(SparseSequential(*layers[:2]), SparseSequential(*layers[2:]))
    quantize_(model, filter_fn=lambda module, name: name[0] == "1")
    return model

@torch.no_grad()
def called(model):
    return "same" if torch.equal(model(X), Y) else "another"

class Server:
    def __init__(self):
        self.model = a_network()
        self.model[0][0].server = self.model[1][0].server = [self]
        called(self.model)

    def __del__(self):
        print(called(self.model))

X = torch.randn(100, 256)
with torch.no_grad():
    network = a_network()
    Y = network(X)
Server()
gc.collect()
"""


def test_a_network_runs_while_it_is_collected_and_at_exit():
    run = subprocess.run([sys.executable, "-c", LAST], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "same\nsame\n"), run.stderr
