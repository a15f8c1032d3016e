"""Sparse layers in torch.distributed's wrappers and in other processes."""

import copy
import importlib

import pytest
import torch
from torch import distributed, multiprocessing, nn

from sparse_lth import SparseLinear

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)


def _network():
    torch.manual_seed(0)
    first = SparseLinear(33, 40, blocksize=(8, 4), density=0.3)
    return nn.Sequential(first, nn.GELU(), SparseLinear(40, 7, blocksize=(4, 4), density=0.5))


def _data(rank, step):
    torch.manual_seed(100 * step + rank)
    return torch.randn(4, 33)


@pytest.fixture
def group(tmp_path):
    """This process as the only one of a group."""
    distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def _train(model, data, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        model(data(step)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def test_ddp_in_one_process_trains_the_same(group):
    expected = _train(_network(), lambda step: _data(0, step))
    model = _train(nn.parallel.DistributedDataParallel(_network()), lambda step: _data(0, step))
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_fsdp_trains_the_same_and_gives_back_the_state(group):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    expected, model = _train(_network(), lambda step: _data(0, step)), _network()
    for module in (model[0], model[2], model):
        fsdp.fully_shard(module, mesh=mesh)
    _train(model, lambda step: _data(0, step))
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor(), b)
    checkpoint = importlib.import_module("torch.distributed.checkpoint.state_dict")
    full = checkpoint.StateDictOptions(full_state_dict=True)
    state = checkpoint.get_model_state_dict(model, options=full)
    fresh = _network()
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh(_data(0, 0)), model(_data(0, 0)))


def _of_two(rank, store, model, out):
    """Two processes of DDP, each on its own data."""
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    model = copy.deepcopy(model)  # what came is in memory that all processes share
    wrapped = nn.parallel.DistributedDataParallel(model)
    _train(wrapped, lambda step: _data(rank, step))
    torch.save(model.state_dict(), f"{out}{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_in_two_processes_trains_on_both_halves(tmp_path):
    model = _network()
    expected = copy.deepcopy(model)
    _train(expected, lambda step: torch.cat([_data(rank, step) for rank in range(2)]))
    args = tmp_path / "store", model, tmp_path / "state"
    multiprocessing.spawn(_of_two, args, nprocs=2)
    states = [torch.load(f"{tmp_path / 'state'}{rank}", weights_only=True) for rank in range(2)]
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(states[0][name], tensor, msg=name)
        assert torch.equal(states[0][name], states[1][name])


def _double(model, queue):
    with torch.no_grad():
        queue.put(model(_data(0, 0)).numpy())
        model[0].weight_values.mul_(2)


@pytest.mark.slow
def test_another_process_shares_the_memory_of_a_model():
    model = _network().share_memory()
    expected = model(_data(0, 0)).detach()
    values = model[0].weight_values.detach().clone()
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_double, args=(model, queue))
    process.start()
    assert torch.equal(torch.from_numpy(queue.get()), expected)
    process.join()
    assert process.exitcode == 0
    assert torch.equal(model[0].weight_values, 2 * values)
