"""quantize_: int8 layers against the sparse ones, and their way through files and compilers."""

import copy

import pytest
import torch
from torch import nn

from sparse_lth import (
    Int8SparseLinear,
    SparseLinear,
    SparseSequential,
    TicketError,
    load_sparse,
    quantize_,
    save_sparse,
)
from sparse_lth.files import load_tensors, save_tensors


def network(blocksize=(16, 4)):
    torch.manual_seed(0)
    options = {"blocksize": blocksize, "density": 0.3}
    return SparseSequential(
        SparseLinear(70, 45, activation="relu", **options),
        SparseLinear(45, 20, bias=False, **options),
        nn.Linear(20, 3),
    ).eval()


def quantized_network(blocksize=(16, 4)):
    model = network(blocksize)
    quantize_(model)
    return model


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 4), (3, 5)])
def test_a_layer_is_near_the_one_it_was_made_of(blocksize):
    """An input is off by at most a step of its row, a weight by half a step of its output."""
    layer = SparseLinear(70, 45, blocksize=blocksize, density=0.3)
    model, x = nn.Sequential(layer), torch.randn(9, 70)
    exact, weight = layer.to_dense().double()(x.double()), layer.to_dense().weight.double()
    quantize_(model)
    assert isinstance(model[0], Int8SparseLinear)
    steps = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)).double() / 255
    by_inputs = steps[:, None] * weight.abs().sum(1)
    by_weights = (x.double().abs() + steps[:, None]).sum(1)[:, None] * weight.abs().amax(1) / 254
    error = (model(x).double() - exact).abs()
    assert (error <= by_inputs + 1.01 * by_weights).all()
    assert error.max() > 0


def test_in_place_and_by_name():
    model = network()
    assert quantize_(model, filter_fn=lambda module, name: name == "1") is None
    assert [type(m) for m in model] == [SparseLinear, Int8SparseLinear, nn.Linear]
    assert "int8" in repr(model)
    assert not [*model[1].parameters()]


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="expected config 'int8', got 'int4'"):
        quantize_(network(), "int4")
    with pytest.raises(ValueError, match="expected a SparseLinear to quantise in Linear, got none"):
        quantize_(nn.Linear(3, 3))


def test_hooks_stay():
    model, seen = network(), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    quantize_(model)
    model(torch.randn(2, 70))
    assert seen == [1]


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 4)])
def test_the_same_numbers_after_copy_state_dict_and_file(blocksize, tmp_path):
    model, x = quantized_network(blocksize), torch.randn(5, 70)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    other = quantized_network(blocksize)
    other[0].weight_values.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)
    save_sparse(model, tmp_path / "model")
    dense = nn.Sequential(nn.Linear(70, 45), nn.Linear(45, 20, bias=False), nn.Linear(20, 3))
    assert torch.equal(load_sparse(tmp_path / "model", dense)(x), y)


@pytest.mark.parametrize(
    "damage", [lambda bits: bits[1:], lambda bits: bits ^ 1, lambda bits: bits.to(torch.int16)]
)
def test_a_file_with_bits_of_other_blocks_is_refused(damage, tmp_path):
    model, path = quantized_network(), tmp_path / "model"
    save_sparse(model, path)
    tensors, about = load_tensors(path, "model")
    tensors["0.block_bits"] = damage(tensors["0.block_bits"])
    save_tensors(path, "model", tensors, about)
    dense = nn.Sequential(nn.Linear(70, 45), nn.Linear(45, 20, bias=False), nn.Linear(20, 3))
    with pytest.raises(TicketError, match="expected an int8 layer 0"):
        load_sparse(path, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_and_exports(dtype):
    layer, x = quantized_network()[0], torch.randn(5, 70, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), y)


def test_its_op_passes_torchs_own_checks():
    layer = quantized_network()[0]
    tensors = layer._weight(), (layer.crow_indices, layer.col_indices, layer.bias)
    args = torch.randn(5, 70), *tensors[0], *tensors[1], 45, "relu"
    torch.library.opcheck(torch.ops.sparse_lth.int8_linear.default, args)


def test_has_no_gradient():
    y = quantized_network()(torch.randn(2, 70, requires_grad=True))
    with pytest.raises((NotImplementedError, RuntimeError)):
        y.sum().backward()
