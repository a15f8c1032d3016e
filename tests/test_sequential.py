import copy
import pickle

import pytest
import torch
from torch import nn

from sparse_lth import SparseLinear, SparseSequential
from sparse_lth.kernels import backends, use_backend


def _network(*front, **options):
    torch.manual_seed(0)
    layers = [
        SparseLinear(64, 48, density=0.3, **options),
        nn.ReLU(),
        SparseLinear(48, 32, density=0.3, blocksize=(1, 1)),
        nn.ReLU(),
        nn.Linear(32, 10),
    ]
    return SparseSequential(*front, *layers).eval()


def _plain(network, x):
    """What nn.Sequential makes of the same modules."""
    return nn.Sequential.forward(network, x)


def _assert_same(network, x):
    with torch.inference_mode():
        torch.testing.assert_close(network(x), _plain(network, x))


def _is_one_call(network):
    return len(network._prepared.chains) == 1


@pytest.mark.parametrize("batch", [0, 1, 5, 70])
@pytest.mark.parametrize(
    ("front", "shape"),
    [
        ((), (64,)),
        ((nn.Flatten(),), (1, 8, 8)),
        ((nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Flatten()), (1, 8, 8)),
        ((nn.Linear(64, 64), nn.Tanh()), (64,)),
    ],
)
def test_inference_is_that_of_the_modules(front, shape, batch):
    network, x = _network(*front), torch.randn(batch, *shape)
    _assert_same(network, x)
    if backends()["native"].startswith("available"):
        assert _is_one_call(network)
    with use_backend("torch"):
        _assert_same(network, x)


def test_any_leading_shape_and_wrong_inputs():
    network = _network()
    _assert_same(network, torch.randn(2, 3, 64))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"\(\.\.\., 64\) inputs, got"):
        network(torch.randn(2, 65))


def _hook(network):
    network[0].register_forward_hook(lambda module, inputs, output: output + 1)


def _move_hook(network):
    handle = network[0].register_forward_hook(lambda module, inputs, output: output + 1)
    with torch.inference_mode():
        network(torch.randn(1, 64))
    handle.remove()
    network[4].register_forward_hook(lambda module, inputs, output: output + 1)


def _append(network):
    network.append(nn.ReLU())


def _patch(network):
    network[1].forward = lambda x: x - 1


def _replace(network):
    network[2] = SparseLinear(48, 32, density=0.5)


def _load(network):
    network.load_state_dict(_network(blocksize=(16, 16)).state_dict())


def _other_blocks(network):
    torch.manual_seed(1)
    network[0].load_state_dict(SparseLinear(64, 48, density=0.9).state_dict())


def _step(network):
    for parameter in network.parameters():
        parameter.data.add_(0.1)


def _activation(network):
    network[0].activation = "gelu"


@pytest.mark.parametrize(
    "change",
    [_hook, _move_hook, _append, _patch, _replace, _load, _other_blocks, _step, _activation],
)
def test_a_change_after_the_first_call_is_seen(change):
    network, x = _network(), torch.randn(3, 64)
    _assert_same(network, x)
    change(network)
    _assert_same(network, x)


def test_it_trains_under_autocast_and_in_other_dtypes_as_its_modules_do():
    network, x = _network(), torch.randn(3, 64)
    network(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(x).dtype == torch.bfloat16
    _assert_same(network, x)
    _assert_same(network.double(), x.double())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_work_after_a_call(duplicate):
    network, x = _network(), torch.randn(3, 64)
    _assert_same(network, x)
    other = duplicate(network)
    _step(network)
    with torch.inference_mode():
        assert not torch.allclose(other(x), network(x))
    _assert_same(other, x)


def test_large_dense_layers_and_networks_without_a_layer_are_left_to_torch():
    for layers in ([nn.Tanh()], [SparseLinear(64, 400), nn.Linear(400, 400)]):
        network = SparseSequential(*layers)
        _assert_same(network, torch.randn(3, 64))
        assert "_prepared" not in vars(network) or not _is_one_call(network)


def test_export_and_compile():
    network, x = _network(), torch.randn(3, 64)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), network(x))
        exported = torch.export.export(network, (x,))
        torch.testing.assert_close(exported.module()(x), network(x))
