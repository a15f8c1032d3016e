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
    sparsify_,
)
from sparse_lth.files import load_tensors, save_tensors
from sparse_lth.kernels import linear_int8, linear_native, use_backend

needs_native = pytest.mark.skipif(
    linear_native.WHY_NOT is not None, reason=f"native kernels are {linear_native.WHY_NOT}"
)


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


def test_a_conv1d_of_hugging_face_comes_back_from_a_file(tmp_path):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, x = nn.Sequential(conv1d(45, 70)), torch.randn(5, 70)
    model[0].weight.data[:, :30] = 0
    sparsify_(model, (5, 7), max_density=1.0)
    quantize_(model)
    save_sparse(model, tmp_path / "model")
    again = load_sparse(tmp_path / "model", nn.Sequential(conv1d(45, 70)))
    assert torch.equal(again(x), model(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_of_torch_runs_its_int8_layers(monkeypatch):
    """In evaluation it reads the weights of its layers, to see whether a fused form will do."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    layer.linear1.weight.data[:32] = layer.linear2.weight.data[:16] = 0
    model = sparsify_(nn.TransformerEncoder(layer, 2), (8, 4), max_density=1.0).eval()
    x, calls = torch.randn(2, 6, 32), []
    quantize_(model)
    forward = Int8SparseLinear.forward
    monkeypatch.setattr(
        Int8SparseLinear, "forward", lambda layer, x: calls.append(1) or forward(layer, x)
    )
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_its_weight_is_there_to_read(dtype, bias):
    model = nn.Sequential(SparseLinear(70, 45, bias, blocksize=(16, 4), density=0.3).to(dtype))
    exact = model[0].to_dense().weight
    quantize_(model)
    weight = model[0].weight
    assert weight.shape == (45, 70)
    assert weight.dtype == (dtype if bias else torch.float32)
    assert weight.detach().dtype == weight.dtype
    assert not weight.requires_grad
    steps = exact.float().abs().amax(1, keepdim=True) / 127
    assert ((weight + 0).float() - exact.float()).abs().le(steps * 0.51 + 2**-8 * exact.abs()).all()


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
    weight = layer.weight_values, layer.weight_scales
    args = torch.randn(5, 70), *weight, layer.crow_indices, layer.col_indices, layer.bias
    torch.library.opcheck(torch.ops.sparse_lth.int8_linear.default, (*args, 45, "relu"))


def test_has_no_gradient():
    y = quantized_network()(torch.randn(2, 70, requires_grad=True))
    with pytest.raises((NotImplementedError, RuntimeError)):
        y.sum().backward()


CHAINS = {  # blocksizes that meet in a network: planes, words and rows of the batch
    "single weights": [(1, 1), (1, 1), (1, 1)],
    "all kinds": [(1, 1), (16, 16), (8, 4), (3, 5), (4, 4), (1, 20)],
}


def stack(blocks):
    """Flatten and int8 layers with ReLUs of each kind between them, of sizes no block divides."""
    torch.manual_seed(0)
    layers = [nn.Flatten()]
    for i, blocksize in enumerate(blocks):
        activation = "relu" if i % 2 else "none"
        layers.append(SparseLinear(75, 75, True, blocksize, 0.3, activation))
        if i == 0:
            layers.append(nn.ReLU())
    model = SparseSequential(*layers)
    quantize_(model)
    return model


@pytest.mark.parametrize("batch", [1, 5, 17, 130])
@pytest.mark.parametrize("name", linear_int8.INSTRUCTION_SETS)
@pytest.mark.parametrize("blocks", CHAINS.values(), ids=CHAINS)
def test_a_chain_is_one_call_with_the_results_of_its_layers(blocks, name, batch):
    """To rounding; a number halfway between two steps may fall on the other one."""
    model, x = stack(blocks), torch.randn(batch, 3, 25)
    with use_backend("native", name), torch.inference_mode():
        y, one_by_one = model(x), nn.Sequential.forward(model, x)
        assert len(model._prepared.chains) == 1
    assert len(model._prepared.chains[0].layers) == len(blocks)
    torch.testing.assert_close(y, one_by_one, rtol=0, atol=float(y.abs().max()) * 2.0**-18)


@needs_native
def test_threads_agree_bit_for_bit():
    model, results = stack(CHAINS["all kinds"]), []
    x, before = torch.randn(300, 75), torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            results.append(model(x))
    torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("row", [0, 5, 41, 69])  # rows of a tile share words
@pytest.mark.parametrize("name", linear_int8.INSTRUCTION_SETS)
@pytest.mark.parametrize("blocks", CHAINS.values(), ids=CHAINS)
def test_a_row_that_is_not_finite_stays_so_through_a_chain_and_alone(blocks, name, row):
    model, x = stack(blocks), torch.randn(70, 75)
    with use_backend("native", name), torch.inference_mode():
        fine = model(x)
        for bad in (float("nan"), float("inf"), -float("inf")):
            x[row, 7] = bad
            y = model(x)
            assert y[row].isnan().all()
            others = torch.arange(70) != row
            assert torch.equal(y[others], fine[others])


CHANGES = {
    "a weight": lambda layer: layer.weight_values.neg_(),
    "the scales": lambda layer: layer.weight_scales.mul_(2),
    "the bias": lambda layer: layer.bias.add_(1),
    "a buffer": lambda layer: setattr(layer, "weight_values", -layer.weight_values),
    "other blocks": lambda layer: layer.col_indices.copy_(15 - layer.col_indices.flip(0)),
    "the activation": lambda layer: setattr(layer, "activation", "gelu"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_after_the_first_call_is_seen(change):
    """By the network and by the layer alone."""
    options = {"blocksize": (16, 1), "density": 0.5}
    layers = SparseLinear(20, 16, **options), nn.ReLU(), SparseLinear(16, 16, **options)
    model, x = SparseSequential(*layers), torch.randn(20, 20)  # enough that weights are packed
    quantize_(model)
    with torch.inference_mode():
        before = model(x), model[2](x[:, :16])
    change(model[2])
    with torch.inference_mode():
        after, expected = model(x), nn.Sequential.forward(copy.deepcopy(model), x)
        torch.testing.assert_close(after, expected)
        assert not torch.equal(after, before[0])
        assert not torch.equal(model[2](x[:, :16]), before[1])


WRONG = {
    "values of another type": lambda m: setattr(m, "weight_values", m.weight_values.float()),
    "no scales": lambda m: setattr(m, "weight_scales", None),
    "a bias of another device": lambda m: setattr(m, "bias", m.bias.to("meta")),
    "a short bias": lambda m: setattr(m, "bias", m.bias[:-1]),
    "few scales": lambda m: setattr(m, "weight_scales", m.weight_scales[:-1]),
}


@needs_native
@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("warm", [False, True])
def test_tensors_that_do_not_fit_are_refused(what, warm):
    model, x = quantized_network(), torch.randn(5, 70)
    with torch.no_grad():
        if warm:
            model(x), model[0](x)
        WRONG[what](model[0])
        for call in (model, model[0]):
            with pytest.raises(ValueError, match="expected"):
                call(x)


def test_int8_next_to_float32_and_in_bfloat16():
    model, x = network((1, 1)), torch.randn(5, 70)
    quantize_(model)
    with torch.inference_mode():
        y, one_by_one = model(x), nn.Sequential.forward(model, x)
        torch.testing.assert_close(y, one_by_one)
        low = model.bfloat16()(x.bfloat16())
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), y, rtol=0.1, atol=0.1 * float(y.abs().max()))


def test_made_in_inference_mode_it_sees_what_is_written_later():
    with torch.inference_mode():
        model = quantized_network()
    x = torch.randn(2, 70)
    with torch.inference_mode():
        before = model(x)
    model[1].weight_values.neg_()
    with torch.inference_mode():
        assert not torch.equal(model(x), before)
