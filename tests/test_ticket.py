import dataclasses
import json

import pytest
import safetensors.torch
import torch
from torch import nn

from sparse_lth import SparseLinear, Ticket, TicketError, load_sparse
from sparse_lth.files import load_tensors, save_tensors
from sparse_lth.program.config import RunConfig
from sparse_lth.program.lottery import Lottery
from sparse_lth.program.tickets import (
    dense_network,
    load_ticket,
    make_ticket,
    network,
    sparse_network,
)
from sparse_lth.saving import save_sparse
from sparse_lth.weights import weight_layers


def _ticket(data, **settings):
    settings = {"epochs": 1, "prune_pc": 0.9, "prune_rounds": 1, "dataset": "digits"} | settings
    config = RunConfig(**settings)
    *_, state = Lottery(config, data).states()
    return make_ticket(state)


@pytest.fixture(scope="module")
def ticket(tiny):
    return _ticket(tiny, blocksize=(16, 16))


def test_a_ticket_comes_back_as_it_was(ticket, tmp_path):
    ticket.save(tmp_path / "t")
    loaded = load_ticket(tmp_path / "t")
    settings = [loaded.settings[name] for name in ("model", "dataset", "seed")]
    assert settings == ["lenet-300-100", "digits", 0]
    assert loaded.dense == ticket.dense
    assert loaded.rounds == ticket.rounds
    assert len(loaded.rounds) == 2
    assert loaded.density == ticket.density
    assert json.dumps(loaded.settings) == json.dumps(ticket.settings)
    for group in ("init", "masks", "trained"):
        a, b = getattr(ticket, group), getattr(loaded, group)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_networks_of_a_ticket(ticket):
    start = network(ticket, "init")
    for name, layer in weight_layers(start).items():
        init = ticket.init[f"{name}.weight"]
        kept = ticket.masks.get(name, torch.ones(init.shape, dtype=torch.bool))
        assert torch.equal(layer.weight, init * kept)
    dense = dense_network(ticket)
    assert all(torch.equal(p, ticket.trained[name]) for name, p in dense.named_parameters())


@pytest.mark.parametrize("model", ["lenet-300-100", "lenet-5"])
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 4)])
@pytest.mark.parametrize("export", [(1, 1), (16, 4), (16, 16)])
@pytest.mark.filterwarnings("ignore:sparsify_ converted no layer")
def test_export_is_exact_and_loads_to_the_same_bits(tiny, tmp_path, model, blocksize, export):
    ticket = _ticket(tiny, model=model, blocksize=blocksize)
    sparse, dense = sparse_network(ticket, export), dense_network(ticket)
    for name, layer in weight_layers(dense).items():
        converted = sparse.get_submodule(name)
        if isinstance(converted, SparseLinear):
            assert torch.equal(converted.to_dense().weight, layer.weight)
            kept = ticket.masks[name].float().mean()
            assert converted.density >= kept - 1e-6
            if export == blocksize:
                assert converted.density == pytest.approx(float(kept))
        else:
            assert torch.equal(converted.weight, layer.weight)
    save_sparse(sparse, tmp_path / "m", ticket.settings["model"])
    loaded, images = load_sparse(tmp_path / "m"), tiny.test.images
    with torch.inference_mode():
        assert torch.equal(loaded(images), sparse(images))
        torch.testing.assert_close(loaded(images), dense(images), rtol=1e-4, atol=1e-4)


def test_a_loaded_model_trains_on(ticket, tmp_path, tiny):
    save_sparse(sparse_network(ticket, (16, 16)), tmp_path / "m", "lenet-300-100")
    model = load_sparse(tmp_path / "m").train()
    nn.functional.cross_entropy(model(tiny.train.images), tiny.train.labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def _tampered(path, kind, change):
    tensors, about = load_tensors(path, kind)
    change(tensors, about)
    save_tensors(path, kind, tensors, about)


TICKET_CHANGES = {
    "expected settings": lambda t, a: a["settings"].pop("seed"),
    "expected settings by name": lambda t, a: a.update(settings=[1]),
    "expected a record for every round, got 1": lambda t, a: a.update(rounds=1),
    "expected init, masks and trained": lambda t, a: t.update(extra=torch.zeros(1)),
    "expected rounds, dense, settings in the metadata": lambda t, a: a.pop("rounds"),
    "settings in the metadata, got .*'more'": lambda t, a: a.update(more=1),
    "model: expected one of .*, got vgg": lambda t, a: a["settings"].update(model="vgg"),
    "expected a test_accuracy for every round": lambda t, a: a["rounds"][0].pop("test_accuracy"),
    "expected masks tensors to have other names": lambda t, a: t.pop("masks.fc1"),
    "expected masks fc2 of shape": lambda t, a: t.update({"masks.fc2": t["masks.fc2"].T.clone()}),
    r"and torch\.bool, got .* torch\.float32": lambda t, a: t.update(
        {"masks.fc2": t["masks.fc2"].float()}
    ),
    "to be 0 where pruned": lambda t, a: t["trained.fc1.weight"].fill_(1),
    r"finite numbers in init fc1\.bias": lambda t, a: t["init.fc1.bias"].fill_(float("nan")),
}


@pytest.mark.parametrize("message", TICKET_CHANGES)
def test_a_wrong_ticket_is_refused_by_name(ticket, tmp_path, message):
    ticket.save(tmp_path / "t")
    _tampered(tmp_path / "t", "ticket", TICKET_CHANGES[message])
    with pytest.raises(TicketError, match=message):
        load_ticket(tmp_path / "t")


MODEL_CHANGES = {
    "layers and aliases .*'layers': 3": lambda t, a: a.update(layers=3),
    "fc1: expected a bias": lambda t, a: t.pop("fc1.bias"),
    r"expected fc3\.weight in torch\.float32": lambda t, a: t.update(
        {"fc3.weight": t["fc3.weight"].half()}
    ),
    "expected layers and aliases": lambda t, a: a.pop("layers"),
    "fc9: expected crow_indices": lambda t, a: a["layers"].update(fc9={}),
    "fc2: expected activation in": lambda t, a: a["layers"]["fc2"].update(activation=[]),
    "conv: expected a layer with a weight, got no module": lambda t, a: t.update(
        {"conv.crow_indices": t["fc1.crow_indices"].clone()}
    ),
    "fc1: .*col_indices": lambda t, a: t["fc1.col_indices"].fill_(10**6),
    "fc1: .*crow_indices": lambda t, a: t.pop("fc1.crow_indices"),
    "fc1: .*bias of shape": lambda t, a: t.update({"fc1.bias": torch.zeros(7)}),
    "fc2: .*crow_indices for 7 block rows": lambda t, a: t.update(
        {"fc2.crow_indices": t["fc1.crow_indices"].clone()}
    ),
    'Unexpected key.*"extra"': lambda t, a: t.update(extra=torch.zeros(1)),
    r"size mismatch for fc3\.weight": lambda t, a: t.update({"fc3.weight": torch.zeros(1)}),
    r"finite numbers in fc1\.weight_values": lambda t, a: t["fc1.weight_values"].fill_(
        float("inf")
    ),
}


@pytest.mark.parametrize("message", MODEL_CHANGES)
def test_a_wrong_model_is_refused_by_name(ticket, tmp_path, message):
    save_sparse(sparse_network(ticket, (16, 16)), tmp_path / "m", "lenet-300-100")
    _tampered(tmp_path / "m", "model", MODEL_CHANGES[message])
    with pytest.raises(TicketError, match=message):
        load_sparse(tmp_path / "m")


@pytest.mark.parametrize("load", [Ticket.load, load_ticket, load_sparse])
def test_what_is_no_such_file_is_refused(ticket, tmp_path, load):
    with pytest.raises(TicketError, match="absent"):
        load(tmp_path / "absent")
    ticket.save(tmp_path / "cut")
    content = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    with pytest.raises(TicketError, match="cut: expected a sparse_lth"):
        load(tmp_path / "cut")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(TicketError, match="other: expected a sparse_lth"):
        load(tmp_path / "other")
    (tmp_path / "text").write_text("not at all")
    with pytest.raises(TicketError, match="text: expected a sparse_lth"):
        load(tmp_path / "text")


def test_a_ticket_does_not_say_where_its_data_lay(ticket):
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    assert fields - ticket.settings.keys() == {"data_dir"}
