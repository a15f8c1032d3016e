"""Sparsified models of other libraries compute, train, save, load, compile and export as before."""

import copy
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sparse_lth import conversion, load_sparse, save_sparse
from sparse_lth.convert import matrix
from sparse_lth.huggingface import is_conv1d
from tests.bounds import assert_as_exact_as
from tests.models.zoo import BLOCKSIZES, CASES, dense_twin, fresh_model, inputs_of, sparse_model

LIBRARIES = {case.library: name for name, case in CASES.items()}  # the last of each


class Twins(NamedTuple):
    """One pruned model, thrice. Tests that change a model copy it."""

    name: str
    sparse: nn.Module
    dense: nn.Module
    exact: nn.Module  # the dense one in float64
    masks: dict[str, Tensor]  # True where a parameter of the dense ones is kept
    inputs: dict[str, Tensor]

    def call(self, model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        given = {
            name: value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in self.inputs.items()
        }
        return CASES[self.name].output(model(**given))


@pytest.fixture(
    scope="module", params=[(n, how) for n in CASES for how in BLOCKSIZES], ids=" ".join
)
def twins(request):
    name, how = request.param
    sparse = sparse_model(name, how)
    dense, masks = dense_twin(name, how)
    return Twins(name, sparse, dense, copy.deepcopy(dense).double(), masks, inputs_of(name))


def test_every_pruned_layer_is_converted(twins):
    assert len(conversion(twins.sparse).converted) == len(twins.masks) == CASES[twins.name].pruned
    assert all(row.density < 1 for row in conversion(twins.sparse).converted)


def test_logits_are_those_of_the_masked_model(twins):
    with torch.no_grad():
        exact = twins.call(twins.exact)
        assert_as_exact_as(twins.call(twins.sparse), twins.call(twins.dense), exact)
    assert exact.std() > 1e-3
    assert_as_exact_as(twins.call(twins.sparse).detach(), twins.call(twins.dense).detach(), exact)


def test_training_steps_are_those_of_the_masked_model(twins):
    gradients, parameters = [], []
    for twin in (twins.sparse, twins.dense, twins.exact):
        model = copy.deepcopy(twin).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for step in range(2):
            optimizer.zero_grad()
            output = twins.call(model)
            torch.manual_seed(2)
            (output * torch.randn_like(output, dtype=torch.float32)).mean().backward()
            if step == 0:
                gradients.append(_parameters(model, gradients=True))
            optimizer.step()
            if twin is not twins.sparse:
                with torch.no_grad():
                    for name, mask in twins.masks.items():
                        model.get_parameter(name).mul_(mask)
        parameters.append(_parameters(model))
    owners = {name: twins.dense.get_submodule(name.rpartition(".")[0]) for name in twins.masks}
    masks = {name: matrix(owners[name], mask) for name, mask in twins.masks.items()}
    for sparse, dense, exact in (gradients, parameters):
        assert sparse.keys() == exact.keys()
        scale = float(max(t.abs().max() for t in exact.values()))
        for name, tensor in exact.items():
            kept = masks.get(name, True)
            assert_as_exact_as(sparse[name] * kept, dense[name] * kept, tensor * kept, scale)
    for name, mask in masks.items():
        assert not parameters[0][name][~mask].any()


def _parameters(model, gradients=False):
    """Every parameter, or gradient, as an `nn.Linear` has it."""
    found = {}
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(owner, recurse=False):
            tensor = parameter.grad if gradients else parameter.detach()
            if name.endswith("weight_values"):
                name, tensor = f"{owner}.weight", module.shaped_weight(tensor).detach()
            elif is_conv1d(module) and name.endswith("weight"):
                tensor = matrix(module, tensor)
            found[name] = tensor
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_makes_a_dense_model_the_sparse_one(twins, device, tmp_path):
    save_sparse(twins.sparse, tmp_path / "model.safetensors")
    with torch.device(device):
        model = fresh_model(twins.name)
    load_sparse(tmp_path / "model.safetensors", model)
    assert _state(model).keys() == _state(twins.sparse).keys()
    for name, tensor in _state(twins.sparse).items():
        assert torch.equal(_state(model)[name], tensor), name
    assert torch.equal(twins.call(model), twins.call(twins.sparse))


def _state(model):
    return {**model.state_dict(), **dict(model.named_buffers())}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES.values(), ids=LIBRARIES)
def test_a_new_process_computes_the_same_bits(name, tmp_path):
    model = sparse_model(name, "blocks")
    save_sparse(model, tmp_path / "model.safetensors")
    script = (
        "import torch; from sparse_lth import load_sparse; from tests.models.zoo import *\n"
        f"model = load_sparse({str(tmp_path / 'model.safetensors')!r}, fresh_model({name!r}))\n"
        f"output = CASES[{name!r}].output(model(**inputs_of({name!r})))\n"
        f"torch.save(output.detach(), {str(tmp_path / 'output.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    expected = CASES[name].output(model(**inputs_of(name)))
    assert torch.equal(torch.load(tmp_path / "output.pt"), expected)


@pytest.mark.filterwarnings("ignore:While compiling, we found", "ignore:Dynamo detected a call")
@pytest.mark.parametrize("twins", [(n, "blocks") for n in CASES], ids=[*CASES], indirect=True)
def test_compiled_models_compute_the_same(twins):
    torch.compiler.reset()
    with torch.no_grad():
        try:
            dense = twins.call(torch.compile(copy.deepcopy(twins.dense), backend="aot_eager"))
        except Exception as error:
            pytest.skip(f"the dense model does not compile: {error!r:.100}")
        sparse = twins.call(torch.compile(twins.sparse, backend="aot_eager"))
        assert_as_exact_as(sparse, dense, twins.call(twins.exact))


@pytest.mark.filterwarnings("ignore:While compiling, we found", "ignore:Dynamo detected a call")
@pytest.mark.parametrize("twins", [(n, "blocks") for n in CASES], ids=[*CASES], indirect=True)
@pytest.mark.parametrize("strict", [False, True])
def test_exported_models_compute_the_same(twins, strict):
    def export(model):
        return torch.export.export(model, (), twins.inputs, strict=strict).module()

    with torch.no_grad():
        try:
            dense = twins.call(export(twins.dense))
        except Exception as error:
            pytest.skip(f"the dense model does not export: {error!r:.100}")
        sparse = export(twins.sparse)
        assert_as_exact_as(twins.call(sparse), dense, twins.call(twins.exact))
    assert "sparse_lth.linear" in sparse.code
