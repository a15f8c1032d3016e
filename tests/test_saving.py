"""Loading takes other blocks without losing what trains them; files carry any model."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from sparse_lth import (
    SparseLinear,
    Ticket,
    TicketError,
    find_ticket,
    load_sparse,
    save_sparse,
    sparsify_,
)

BLOCKS = ("weight_values", "crow_indices", "col_indices")


def a_layer(seed=0, density=0.4, **options):
    torch.manual_seed(seed)
    return SparseLinear(64, 48, blocksize=(8, 4), density=density, **options)


# load_state_dict


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("frozen", [True, False])
def test_other_blocks_come_into_the_same_parameter(density, frozen):
    layer, other, x = a_layer(), a_layer(1, density), torch.randn(3, 64)
    values = layer.weight_values.requires_grad_(not frozen)
    layer.bias.requires_grad_(not frozen)
    layer.load_state_dict(other.state_dict())
    assert layer.weight_values is values
    assert values.requires_grad == layer.bias.requires_grad == (not frozen)
    assert torch.equal(layer(x), other(x))


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
}


def step(layer, optimizer, x):
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_an_optimizer_goes_on_with_a_state_of_the_new_blocks(kind, density):
    layer, other, x = a_layer(), a_layer(1, density), torch.randn(3, 64)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    for _ in range(2):
        step(layer, optimizer, x)
    with pytest.warns(UserWarning, match="starts anew for a weight") as warned:
        layer.load_state_dict(other.state_dict())
    assert len(warned) == 1
    assert layer.weight_values.grad is None
    fresh = OPTIMIZERS[kind]([other.weight_values])
    for _ in range(3):  # the bias has its old state, and moves on its own
        with torch.no_grad():
            layer.bias.copy_(other.bias)
        step(layer, optimizer, x)
        step(other, fresh, x)
    torch.testing.assert_close(layer.weight_values, other.weight_values)


def test_the_same_blocks_keep_the_state_of_an_optimizer():
    layer, x = a_layer(), torch.randn(3, 64)
    optimizer = torch.optim.Adam(layer.parameters())
    step(layer, optimizer, x)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert "exp_avg" in optimizer.state[layer.weight_values]


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("stepped", [True, False])
def test_a_run_goes_on_from_its_checkpoint(model_first, stepped):
    """The state of the optimizer is that of the checkpoint, or starts anew with a warning."""
    source, x = a_layer(1, 0.3), torch.randn(3, 64)
    trained = torch.optim.Adam(source.parameters(), lr=0.1)
    step(source, trained, x)
    states = copy.deepcopy((source.state_dict(), trained.state_dict()))
    step(source, trained, x)

    layer = a_layer(0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    if stepped:
        step(layer, optimizer, x)
    if not model_first:
        optimizer.load_state_dict(states[1])
    if stepped:
        with pytest.warns(UserWarning, match="starts anew"):
            layer.load_state_dict(states[0])
    else:
        layer.load_state_dict(states[0])
    if model_first or stepped:
        optimizer.load_state_dict(states[1])
    step(layer, optimizer, x)
    assert torch.equal(layer.weight_values, source.weight_values)


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_a_loaded_state_of_other_blocks_is_never_applied(density):
    """An optimizer takes the state of one run, then the model the blocks of another."""
    run, other, x = a_layer(1, 0.5), a_layer(2, density), torch.randn(3, 64)
    trained = torch.optim.Adam(run.parameters(), lr=0.1)
    step(run, trained, x)
    layer = a_layer(1, 0.5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    optimizer.load_state_dict(copy.deepcopy(trained.state_dict()))
    layer.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match="starts anew for a weight"):
        step(layer, optimizer, x)
    assert optimizer.state[layer.weight_values]["exp_avg"].shape == layer.weight_values.shape
    assert optimizer.state[layer.weight_values]["step"] == 1


BAD = {
    "col_indices out of range": ("col_indices", lambda t: t + 16),
    "negative col_indices": ("col_indices", lambda t: t - 16),
    "col_indices of int64": ("col_indices", lambda t: t.long()),
    "few col_indices": ("col_indices", lambda t: t[1:]),
    "col_indices that fall": ("col_indices", lambda t: t.flip(0)),
    "crow_indices that fall": ("crow_indices", lambda t: t.flip(0)),
    "few crow_indices": ("crow_indices", lambda t: t[:-1]),
    "two-dimensional crow_indices": ("crow_indices", lambda t: t[None]),
    "few values": ("weight_values", lambda t: t[1:]),
    "flat values": ("weight_values", lambda t: t.flatten()),
    "values of int32": ("weight_values", lambda t: t.int()),
    "sparse values": ("weight_values", lambda t: t.to_sparse()),
    "values without numbers": ("weight_values", lambda t: t.to("meta")),
    "indices without numbers": ("crow_indices", lambda t: t.to("meta")),
    "no tensor": ("weight_values", lambda t: 3),
    "a list of indices": ("col_indices", lambda t: t.tolist()),
    "other blocks": ("weight_values", lambda t: t.mT.contiguous()),
    "a short bias": ("bias", lambda t: t[1:]),
    "a bias that is no tensor": ("bias", lambda t: "bias"),
    "a wrong weight_kept": ("weight_kept", lambda t: torch.ones(3, dtype=torch.bool)),
    "weight_kept of float32": ("weight_kept", lambda t: torch.ones(48, 4, 8)),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_bad_blocks_join_the_errors_of_torch_and_change_nothing(what, strict, assign):
    name, change = BAD[what]
    model = nn.ModuleDict({"a": a_layer(), "b": nn.Linear(2, 2)})
    state = nn.ModuleDict({"a": a_layer(1, 0.5), "b": nn.Linear(3, 3)}).state_dict()
    state[f"a.{name}"] = change(state.get(f"a.{name}"))
    layer, x = model["a"], torch.randn(3, 64)
    expected, tensors = layer(x), {**layer.state_dict()}
    numbers = copy.deepcopy(tensors)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state, strict=strict, assign=assign)
    assert "blocks of 'a': expected" in str(error.value)
    assert "size mismatch for b.weight" in str(error.value)
    assert all(t.data_ptr() == tensors[key].data_ptr() for key, t in layer.state_dict().items())
    assert all(torch.equal(t, numbers[key]) for key, t in layer.state_dict().items())
    assert torch.equal(layer(x), expected)


def test_strict_is_honoured():
    layer, state = a_layer(), a_layer(1).state_dict()
    del state["bias"]
    state["other"] = torch.ones(1)
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict(state)
    assert 'Missing key(s) in state_dict: "bias"' in str(error.value)
    assert 'Unexpected key(s) in state_dict: "other"' in str(error.value)
    left = layer.load_state_dict(state, strict=False)
    assert (left.missing_keys, left.unexpected_keys) == (["bias"], ["other"])
    assert torch.equal(layer.weight_values, state["weight_values"])
    assert layer.load_state_dict({}, strict=False).missing_keys == [
        *("weight_values", "bias", "crow_indices", "col_indices")
    ]


def test_a_pruned_layer_takes_values_and_refuses_other_blocks():
    layer = a_layer()
    prune.random_unstructured(layer, "weight_values", 0.5)
    state = layer.state_dict()
    layer.load_state_dict(state)
    other = a_layer(1, 0.4).state_dict()
    state["crow_indices"], state["col_indices"] = other["crow_indices"], other["col_indices"]
    with pytest.raises(RuntimeError, match="are pruned or parametrized; remove that first"):
        layer.load_state_dict(state)


def test_states_of_the_old_name_load():
    layer, other = nn.Sequential(a_layer()), nn.Sequential(a_layer(1, 0.2))
    state = other.state_dict()
    state["0.values"] = state.pop("0.weight_values")
    names = [*state]
    layer.load_state_dict(state)
    assert [*state] == names
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), other(x))


# files


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.linear = nn.Linear(64, 64)
        self.register_buffer("passing", torch.rand(3), persistent=False)
        self.register_buffer("count", torch.tensor(3))


class Model(nn.Module):
    """Nested, with ties, buffers and several dtypes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.blocks = nn.ModuleList(Inner() for _ in range(2))
        self.twin = nn.Linear(64, 64)
        self.twin.weight = self.blocks[0].linear.weight
        self.twin.bias = self.blocks[1].linear.bias
        self.small = nn.Linear(64, 8, dtype=torch.bfloat16)
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block.linear(block.norm(x)).relu() + block.passing.sum()
        return self.head(self.twin(x)), self.small(x.bfloat16())


def a_pruned_model():
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.blocks[0].linear.weight[:, 32:] = 0
        model.small.weight[:, 16:] = 0
    prune.random_structured(model.blocks[1].linear, "weight", 0.5, dim=1)
    model.train()
    model(torch.arange(16))  # which moves the statistics of its norms
    return sparsify_(model, (8, 1), max_density=1.0)


IDS = torch.arange(7)


def results(model):
    model.eval()
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_fresh_dense_model_becomes_the_saved_one(device, tmp_path):
    source = a_pruned_model()
    save_sparse(source, tmp_path / "model")
    with torch.device(device):
        fresh = Model()
    fresh.blocks[0].linear.weight.requires_grad_(False)
    fresh.blocks[1].eval()
    model = load_sparse(tmp_path / "model", fresh)
    assert model is fresh
    assert model.training
    assert not model.blocks[1].training
    assert not model.blocks[0].linear.weight_values.requires_grad
    assert model.blocks[1].linear.weight_values.requires_grad
    assert model.twin.weight_values is model.blocks[0].linear.weight_values
    assert model.twin.bias is model.blocks[1].linear.bias
    assert model.head.weight is model.embed.weight
    assert model.small.weight_values.dtype == torch.bfloat16
    assert torch.equal(model.blocks[0].passing, source.blocks[0].passing)
    assert model.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(t, source.state_dict()[key]) for key, t in model.state_dict().items())
    assert all(map(torch.equal, results(model), results(source)))


def test_ties_of_the_file_are_ties_of_the_model(tmp_path):
    source = a_pruned_model()
    save_sparse(source, tmp_path / "model")
    fresh = Model()
    fresh.twin = nn.Linear(64, 64)
    model = load_sparse(tmp_path / "model", fresh)
    assert model.twin.weight_values is model.blocks[0].linear.weight_values
    assert len([*model.parameters()]) == len([*source.parameters()])


def test_ties_of_the_model_hold_where_a_file_has_the_numbers_twice(tmp_path):
    source = nn.Sequential(a_layer(), a_layer())
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    tied = nn.Sequential(nn.Linear(64, 48), nn.Linear(64, 48))
    tied[1].weight, tied[1].bias = tied[0].weight, tied[0].bias
    load_sparse(tmp_path, tied)
    assert tied[0].weight_values is tied[1].weight_values
    assert tied[0].bias is tied[1].bias


def test_a_tied_model_refuses_a_file_of_two_weights(tmp_path):
    source = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    save_sparse(source, tmp_path / "model")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(TicketError, match=r"same numbers for 0\.weight and 1\.weight"):
        load_sparse(tmp_path / "model", tied)
    assert tied[1].weight is tied[0].weight


def test_the_model_itself_may_be_the_layer(tmp_path):
    layer = a_layer(activation="relu")
    save_sparse(layer, tmp_path / "model")
    loaded = load_sparse(tmp_path / "model", a_layer(1, 0.9))
    x = torch.randn(3, 64)
    assert torch.equal(loaded.weight_values, layer.weight_values)
    container = nn.Sequential(layer)
    save_sparse(container, tmp_path / "model")
    loaded = load_sparse(tmp_path / "model", nn.Sequential(nn.Linear(64, 48)))
    assert torch.equal(loaded(x), layer(x))


def test_a_lone_dense_layer_becomes_the_saved_one(tmp_path):
    layer = a_layer(activation="relu")
    save_sparse(layer, tmp_path / "model")
    x = torch.randn(3, 64)
    assert torch.equal(load_sparse(tmp_path / "model", nn.Linear(64, 48))(x), layer(x))


def test_a_new_process_computes_the_same(tmp_path):
    source = a_pruned_model()
    save_sparse(source, tmp_path / "model")
    code = (
        "import sys, torch; from sparse_lth import load_sparse; from tests import test_saving as t;"
        "model = load_sparse(sys.argv[1], t.Model());"
        "torch.save(t.results(model), sys.argv[2])"
    )
    paths = tmp_path / "model", tmp_path / "results"
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    assert all(map(torch.equal, torch.load(paths[1]), results(source)))


def test_a_folder_of_save_pretrained_loads(tmp_path):
    source = nn.Sequential(a_layer(), nn.ReLU(), nn.Linear(48, 4))
    x = torch.randn(3, 64)
    state = source.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    assert torch.equal(load_sparse(tmp_path, fresh)(x), source(x))

    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    where = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    fresh = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    assert torch.equal(load_sparse(tmp_path, fresh)(x), source(x))


DAMAGE = {
    "another shape": lambda t: t | {"0.bias": torch.ones(3)},
    "a bad column": lambda t: t | {"0.col_indices": t["0.col_indices"] + 99},
    "a bad later layer": lambda t: t | {"2.weight": torch.ones(1, 1)},
    "no bias": lambda t: {name: tensor for name, tensor in t.items() if name != "0.bias"},
    "no values": lambda t: {n: tensor for n, tensor in t.items() if n != "0.weight_values"},
    "no later weight": lambda t: {n: tensor for n, tensor in t.items() if n != "2.weight"},
    "one tensor more": lambda t: t | {"3.weight": torch.ones(1)},
    "integers for a weight": lambda t: t | {"2.bias": torch.ones(4, dtype=torch.int64)},
    "a sparse ReLU": lambda t: t | {"1.crow_indices": torch.ones(1, dtype=torch.int32)},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_load_that_fails_leaves_the_model_as_it_was(what, tmp_path):
    source = nn.Sequential(a_layer(), nn.ReLU(), nn.Linear(48, 4))
    save_file(DAMAGE[what](source.state_dict()), tmp_path / "model.safetensors")
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4)), torch.randn(3, 64)
    prune.random_unstructured(model[0], "weight", 0.5)
    seen = []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    before, expected = [(m, {**vars(m)}) for m in model.modules()], model(x)
    with pytest.raises(TicketError, match=r"expected|Error\(s\)"):
        load_sparse(tmp_path, model)
    seen.clear()
    assert [m for m, _ in before] == [*model.modules()]
    for module, then in before:
        then.pop("weight", None)  # which each call of a pruned layer makes
        assert all(vars(module)[name] is value for name, value in then.items())
    assert torch.equal(model(x), expected)
    model.load_state_dict(model.state_dict())
    assert seen == [model[0]]


def test_what_a_file_cannot_carry_is_refused_before_it_is_written(tmp_path):
    path = tmp_path / "model"
    model = nn.Sequential(nn.Linear(8, 8))
    prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="expected no masks of torch's prune, got one on 0"):
        save_sparse(model, path)
    with pytest.raises(ValueError, match=r"expected numbers to save, got 0\.weight on the meta"):
        save_sparse(nn.Sequential(nn.Linear(8, 8, device="meta")), path)
    assert not path.exists()


@pytest.mark.parametrize("saved_compiled", [True, False])
@pytest.mark.parametrize("loaded_compiled", [True, False])
def test_compiled_models_have_the_names_of_plain_ones(saved_compiled, loaded_compiled, tmp_path):
    def network(compiled):
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
        return model, torch.compile(model) if compiled else model

    plain, model = network(saved_compiled)
    prune.l1_unstructured(plain[0], "weight", 0.9)
    sparsify_(model, 1)
    save_sparse(model, tmp_path / "m.safetensors")
    other, given = network(loaded_compiled)
    assert load_sparse(tmp_path / "m.safetensors", given) is given
    x = torch.randn(4, 32)
    assert isinstance(other[0], SparseLinear)
    assert torch.equal(other(x), plain(x))


def test_a_file_of_another_kind_names_what_reads_it(tmp_path):
    model = nn.Sequential(a_layer())
    save_sparse(model, tmp_path / "model.safetensors")
    with pytest.raises(TicketError, match="got a model, which load_sparse reads"):
        Ticket.load(tmp_path / "model.safetensors")
    ticket = find_ticket(nn.Sequential(nn.Linear(8, 8)), lambda model: None, density=0.5, rounds=1)
    ticket.save(tmp_path / "ticket.safetensors")
    with pytest.raises(TicketError, match=r"got a ticket, which Ticket\.load reads"):
        load_sparse(tmp_path / "ticket.safetensors", model)
