import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from sparse_lth import SparseLinear, bsr, sparsify_
from tests.bounds import assert_close

SIZES = [(1, 1), (17, 33), (48, 80), (100, 10)]
BLOCKSIZES = [(1, 1), (16, 16), (16, 4), (3, 5), (64, 64)]
DENSITIES = [0.0, 0.1, 0.5, 1.0]


def _layer(out_features, in_features, **options):
    torch.manual_seed(0)
    return SparseLinear(in_features, out_features, **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_backward_are_those_of_the_dense_layer(size, blocksize, density, dtype):
    layer = _layer(*size, blocksize=blocksize, density=density, dtype=dtype)
    x = torch.randn(2, 3, size[1], dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 3, size[0], dtype=dtype)
    y = layer(x)
    y.backward(grad)

    weight, x64, grad64 = layer.to_dense().weight.double(), x.detach().double(), grad.double()
    flat_x, flat_grad = x64.flatten(0, 1), grad64.flatten(0, 1)
    bias = layer.bias.double()
    assert_close(y, F.linear(x64, weight, bias), F.linear(x64.abs(), weight.abs(), bias.abs()))
    assert_close(x.grad, grad64 @ weight, grad64.abs() @ weight.abs())
    dense, bound = flat_grad.T @ flat_x, flat_grad.abs().T @ flat_x.abs()
    rows, cols = layer.pattern.row_indices, layer.col_indices
    dense, bound = (bsr.blocks_of(t, blocksize)[rows, cols] for t in (dense, bound))
    assert_close(layer.weight_values.grad, dense, bound)
    assert_close(layer.bias.grad, flat_grad.sum(0), flat_grad.abs().sum(0))


@pytest.mark.parametrize("blocksize", [(1, 1), (4, 4), (8, 3)])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(blocksize, activation, bias):
    layer = _layer(
        20, 30, bias=bias, blocksize=blocksize, density=0.3, activation=activation
    ).double()
    x = torch.randn(3, 30, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(parameters, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activation_is_that_of_torch(activation):
    layer = _layer(32, 32, activation=activation)
    x = torch.randn(5, 32)
    expected = getattr(F, activation)(F.linear(x, layer.to_dense().weight, layer.bias))
    torch.testing.assert_close(layer(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)


def test_infinite_inputs_reach_the_outputs_that_a_kept_block_connects_and_no_others():
    for blocksize, density in (((16, 16), 0.2), ((8, 7), 0.2), ((9, 1), 0.1)):
        layer = _layer(50, 60, blocksize=blocksize, density=density)
        for bad in (float("inf"), float("nan")):
            for column in (0, 31, 59):
                x = torch.zeros(2, 60)
                x[1, column] = bad
                reached = ~layer(x).isfinite()
                connected = bsr.blocks_of(torch.ones(50, 60), blocksize)  # (rows, cols, C, R)
                connected = torch.zeros_like(connected)
                connected[layer.pattern.row_indices, layer.col_indices] = 1
                connected = connected.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)[:50, column] > 0
                assert not reached[0].any()
                assert torch.equal(reached[1], connected), (blocksize, column)


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (2, 3, 4, 40)])
def test_any_leading_shape(shape):
    layer = _layer(24, 40)
    assert layer(torch.randn(shape)).shape == (*shape[:-1], 24)


def test_inputs_need_not_be_contiguous():
    layer = _layer(24, 40)
    x = torch.randn(40, 6).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    torch.testing.assert_close(layer(x[::2]), layer(x)[::2])


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 40\) inputs, got \(2, 41\)"):
        _layer(24, 40)(torch.randn(2, 41))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "positive features"),
        ({"blocksize": (0, 16)}, r"blocksize \(R, C\) of positive ints, or n, got \(0, 16\)"),
        ({"density": 1.5}, "density from 0 to 1, got 1.5"),
        ({"activation": "tanh"}, "activation in .*, got 'tanh'"),
    ],
)
def test_impossible_layers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear(**{"in_features": 8, "out_features": 8, **options})


def test_from_dense_takes_the_mask_of_prune_or_the_nonzero_weights():
    dense = nn.Linear(48, 32)
    prune.random_unstructured(dense, "weight", 0.95)
    x = torch.randn(4, 48)
    expected = dense(x)
    torch.testing.assert_close(SparseLinear.from_dense(dense, blocksize=(4, 4))(x), expected)
    with torch.no_grad():  # an optimizer's step: `dense.weight` is now out of date
        dense.weight_orig += 1
    torch.testing.assert_close(SparseLinear.from_dense(dense)(x), dense(x))
    prune.remove(dense, "weight")
    layer = SparseLinear.from_dense(dense, blocksize=(1, 1))
    assert len(layer.weight_values) == int((dense.weight != 0).sum())
    torch.testing.assert_close(layer(x), dense(x))
    with pytest.raises(ValueError, match=r"mask of shape \(32, 48\), got \(48, 32\)"):
        SparseLinear.from_dense(dense, torch.ones(48, 32))


def test_from_dense_under_a_mask_drops_what_it_prunes():
    dense, mask = nn.Linear(32, 32, bias=False), torch.zeros(32, 32)
    mask[:3, :5] = 1
    layer = SparseLinear.from_dense(dense, mask)
    assert layer.bias is None
    assert layer.density == 0.25
    assert torch.equal(layer.to_dense().weight, dense.weight * mask)


def test_density_does_not_count_padding():
    assert SparseLinear(20, 20, density=1.0).density == 1
    layer = SparseLinear.from_dense(nn.Linear(20, 20), torch.eye(20), (16, 16))
    assert layer.density == (16 * 16 + 4 * 4) / 400


def test_padding_neither_starts_nor_trains():
    layer = _layer(20, 20, density=1.0)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(4, 20)).square().sum().backward()
    optimizer.step()
    assert not layer.weight_values[~layer._inside()].any()


def test_repr_says_what_it_is():
    text = repr(_layer(64, 64, density=0.25))
    assert text == (
        "SparseLinear(in_features=64, out_features=64, bias=True, blocksize=(16, 16), "
        "density=0.2500)"
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_work(duplicate):
    layer, x = _layer(40, 50), torch.randn(3, 50)
    assert torch.equal(duplicate(layer)(x), layer(x))


def test_state_dict_carries_the_blocks_and_what_is_derived_from_them():
    layer, other, x = _layer(40, 50, density=0.3), SparseLinear(50, 40, density=0.5), torch.ones(50)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))
    patterns = (p.pattern[:-1] for p in (other, layer))  # without what is made of them
    assert all(torch.equal(a, b) for a, b in zip(*patterns, strict=True))


def test_state_dict_with_bad_blocks_is_refused():
    layer = _layer(40, 50, density=0.5)
    state = layer.state_dict()
    state["col_indices"] = state["col_indices"] + 1
    with pytest.raises(RuntimeError, match="col_indices from 0 to 3"):
        SparseLinear(50, 40).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"blocks of \(16, 8\), got \(16, 16\)"):
        SparseLinear(50, 40, blocksize=(16, 8)).load_state_dict(layer.state_dict())


def test_layers_build_on_the_meta_device():
    with torch.device("meta"):
        layer = SparseLinear(50, 40)
    assert layer.weight_values.is_meta
    source = _layer(40, 50)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 50)
    assert torch.equal(layer(x), source(x))


def test_autocast_computes_in_its_dtype():
    layer = _layer(40, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(3, 50))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight_values.grad.dtype == torch.float32


def test_training_learns():
    layer, target = _layer(16, 32, density=0.5), nn.Linear(32, 16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.randn(64, 32)
    losses = []
    for _ in range(50):
        loss = F.mse_loss(layer(x), target(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def _opcheck_inputs():
    layer = _layer(20, 33, density=0.3, blocksize=(8, 4))
    x = torch.randn(5, 33, requires_grad=True)
    return x, layer.weight_values, layer.crow_indices, layer.col_indices, layer.bias, 20


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_the_op_passes_torchs_own_checks(activation):
    torch.library.opcheck(torch.ops.sparse_lth.linear.default, (*_opcheck_inputs(), activation))


def test_compile_and_export_with_a_dynamic_batch():
    layer = _layer(20, 33, blocksize=(8, 4))
    x = torch.randn(5, 33)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x[:2]), layer(x[:2]))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:3]), layer(x[:3]))


class _Someones(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.tied = self.body[0]
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.body(self.tied(x)))


def test_sparsify_replaces_what_has_an_empty_block_and_what_the_filter_lets_through():
    model, x = _Someones(), torch.randn(3, 64)
    with torch.no_grad():
        for layer in (model.body[0], model.head):
            layer.weight[:, 32:] = 0
    expected = model(x)
    same = sparsify_(model, (16, 16), lambda module, name: name != "head")
    assert same is model
    assert isinstance(model.body[0], SparseLinear)
    assert model.tied is model.body[0]
    assert type(model.body[2]) is nn.Linear  # no empty block
    assert type(model.head) is nn.Linear  # filtered
    torch.testing.assert_close(model(x), expected)


def test_sparsify_of_a_lone_layer_returns_the_new_one():
    layer = nn.Linear(64, 64)
    nn.init.zeros_(layer.weight[:, 32:])
    assert isinstance(sparsify_(layer), SparseLinear)


def test_loading_a_part_of_a_state_dict_is_checked_too():
    layer = _layer(64, 64, density=0.5)
    bad = {"col_indices": torch.full_like(layer.col_indices, 1000)}
    with pytest.raises(RuntimeError, match="col_indices from 0 to 3"):
        layer.load_state_dict(bad, strict=False)


def test_strided_indices_are_refused():
    layer = _layer(64, 64, density=0.5)
    state = layer.state_dict()
    state["col_indices"] = state["col_indices"].repeat_interleave(2)[::2]
    with pytest.raises(RuntimeError, match="contiguous vector of int32"):
        layer.load_state_dict(state, assign=True)


def test_another_dtype_of_bias_or_input_is_refused():
    layer = _layer(64, 64)
    tensors = layer.weight_values.detach(), layer.crow_indices, layer.col_indices
    with pytest.raises(ValueError, match=r"shape \(64,\) and torch\.float32"):
        SparseLinear.empty(64, 64, (16, 16))._hold(*tensors, layer.bias.detach().double())
    layer.bias = nn.Parameter(layer.bias.half())
    with pytest.raises(ValueError, match=r"expected bias in torch\.float32"):
        layer(torch.randn(2, 64))
    with pytest.raises(ValueError, match=r"expected x in torch\.float32"):
        layer(torch.randn(2, 64).double())


def test_from_dense_keeps_what_is_frozen_and_a_pruned_bias():
    dense = nn.Linear(64, 64)
    dense.weight.requires_grad_(False)
    layer = SparseLinear.from_dense(dense)
    assert not layer.weight_values.requires_grad
    assert layer.bias.requires_grad
    prune.random_unstructured(dense, "bias", 0.5)
    with torch.no_grad():
        dense.bias_orig += 1
    x = torch.randn(2, 64)
    torch.testing.assert_close(SparseLinear.from_dense(dense)(x), dense(x))


def test_conversion_draws_no_random_numbers():
    before = torch.get_rng_state()
    SparseLinear.from_dense(nn.Linear(8, 8, device="meta").to_empty(device="cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_repr_of_a_layer_without_data():
    assert "density=unknown" in repr(SparseLinear(64, 64, device="meta"))
