"""SparseConv2d against nn.Conv2d."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from sparse_lth import (
    SparseConv2d,
    SparseSequential,
    block_l1_unstructured,
    conversion,
    load_sparse,
    save_sparse,
    sparsify_,
)

OPTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 5, "padding": "valid", "bias": False},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
]


def pruned_conv(**options):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 20, **options)
    prune.random_unstructured(conv, "weight", 0.8)
    return conv


def inputs(layout=torch.contiguous_format):
    return torch.randn(3, 5, 9, 11).contiguous(memory_format=layout)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("blocksize", [(1, 1), (16, 1), (8, 4)])
@pytest.mark.parametrize("options", OPTIONS)
def test_same_function_as_the_dense_layer(options, blocksize, layout):
    conv, x = pruned_conv(**options), inputs(layout)
    sparse = SparseConv2d.from_dense(conv, blocksize=blocksize)
    expected = conv(x)
    torch.testing.assert_close(sparse(x), expected)
    assert sparse(x).stride() == expected.stride()
    torch.testing.assert_close(sparse(x[0]), expected[0])
    torch.testing.assert_close(sparse.to_dense()(x), expected)
    assert torch.equal(sparse.weight, conv.weight)
    assert repr(sparse.to_dense()) == repr(conv)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 2), (3, 9), (31, 40)])
@pytest.mark.parametrize("relu", [False, True])
def test_pooled_in_one_call(layout, size, relu):
    layer = SparseConv2d(5, 20, 3, padding=1, density=0.3)
    x = torch.randn(3, 5, *size).contiguous(memory_format=layout)
    x[1, 2, 0, 1] = float("nan")
    y = layer(x).relu() if relu else layer(x)
    expected, pooled = F.max_pool2d(y, 2), layer.max_pooled(x, relu)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0, equal_nan=True)
    assert pooled.stride() == expected.stride()


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(2, 1), nn.MaxPool2d(3)])
@pytest.mark.parametrize("between", [[], [nn.ReLU()], [nn.Tanh()]])
def test_in_a_sparse_sequential(between, pool):
    first, second = SparseConv2d(5, 20, 3), SparseConv2d(20, 4, 2, activation="gelu")
    modules = [first, *between, pool, second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    x = torch.randn(2, 5, 14, 15)
    expected = nn.Sequential(*modules)(x)
    network = SparseSequential(*modules)
    with torch.no_grad():
        assert torch.equal(network(x), expected)
        called = []
        first.register_forward_hook(lambda *_: called.append(1))
        assert torch.equal(network(x), expected)
    assert called == [1]


def test_trains_as_the_masked_layer_does():
    conv, x = pruned_conv(kernel_size=3, padding=1, stride=2), inputs()
    sparse = SparseConv2d.from_dense(conv, blocksize=(8, 2))
    for layer in (conv, sparse):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    conv(x)
    torch.testing.assert_close(sparse.weight.dense(), conv.weight)
    assert torch.equal(sparse.weight.dense() != 0, conv.weight_mask != 0)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_compile_and_export(activation):
    layer, x = SparseConv2d(5, 20, 3, padding=1, density=0.3, activation=activation), inputs()
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    batch = torch.export.Dim("batch", min=2, max=100)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}})
    torch.testing.assert_close(program.module()(x[:2]), expected[:2])


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_fx_pads_as_the_layer_does(mode):
    layer, x = SparseConv2d(5, 20, 3, padding=1, padding_mode=mode, density=0.3), inputs()
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))


def test_the_weight_is_read_as_that_of_a_dense_layer():
    layer, x = SparseConv2d(5, 20, (3, 2), density=0.3), inputs()
    assert layer.weight.shape == (20, 5, 3, 2)
    y = F.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(
        *(torch.autograd.grad(z.square().sum(), layer.weight_values)[0] for z in (y, layer(x)))
    )
    with pytest.raises(RuntimeError, match="there to be read"):
        layer.weight.zero_()


def test_other_dtypes_and_emptied_memory():
    layer, x = SparseConv2d(5, 20, 3, density=0.3), inputs()
    expected = layer(x)
    layer.type(torch.float64)
    assert layer(x.double()).dtype == torch.float64
    layer.type(torch.float32)
    torch.testing.assert_close(layer(x), expected)
    layer.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def network():
    """Of two convolutions that share their weight, with a norm, and of kinds that stay dense."""
    torch.manual_seed(0)
    first, twin = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)
    twin.weight = first.weight
    return nn.Sequential(
        *(nn.Conv2d(5, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), first, nn.ReLU(), twin),
        *(nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 2), nn.Flatten(2)),
        *(nn.Conv1d(6, 6, 3), nn.Unflatten(2, (1, 2, -1)), nn.Conv3d(6, 4, 1)),
    )


CONVERTED, LEFT = (0, 3, 5), {6: "2 groups", 7: "ConvTranspose2d", 9: "Conv1d", 11: "Conv3d"}


def prune_(model):
    """Masks that prune whole blocks of 4x2 and, in what is kept, single weights."""
    for i in (0, 3):
        block_l1_unstructured(model[i], "weight", 0.5, (4, 2))
        prune.random_unstructured(model[i], "weight", 0.3)
    prune.custom_from_mask(model[5], "weight", model[3].weight_mask)
    model[5].weight_orig = model[3].weight_orig
    return model


def test_a_network_is_converted_with_all_that_its_layers_carry():
    model, x, called = prune_(network()), inputs(), []
    model[0].note = "mine"
    model[0].bias.requires_grad_(False)
    model[3].register_forward_hook(lambda *_: called.append(1))
    model.eval()
    expected = model(x)
    called.clear()
    sparsify_(model, (4, 2), max_density=1.0)
    assert [i for i, layer in enumerate(model) if type(layer) is SparseConv2d] == [*CONVERTED]
    reasons = {int(row.name): row.reason for row in conversion(model).left}
    assert reasons.keys() == LEFT.keys()
    assert all(why in reasons[i] for i, why in LEFT.items())
    torch.testing.assert_close(model(x), expected)
    assert called == [1]
    assert model[0].note == "mine"
    assert not model[0].bias.requires_grad
    assert not model[0].training
    assert model[3].weight_values is model[5].weight_values


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    ],
)
def test_a_converted_network_trains_as_the_masked_one_does(optimizer):
    models = prune_(network()).double(), sparsify_(prune_(network()).double(), (4, 2), None, 1.0)
    masked, sparse = models
    x = inputs().double()
    for model in models:
        steps = optimizer(model.parameters())
        for _ in range(5):
            steps.zero_grad()
            model(x).square().mean().backward()
            steps.step()
        model(x)  # torch's prune computes the weight anew
    for i in CONVERTED:
        weight = sparse[i].weight.dense()
        torch.testing.assert_close(weight, masked[i].weight)
        assert not weight[masked[i].weight_mask == 0].any()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_converted_network_is_saved_and_loaded(device, tmp_path):
    model = sparsify_(prune_(network()), (4, 2), max_density=1.0).eval()
    x = inputs()
    save_sparse(model, tmp_path / "model")
    with torch.device(device):
        fresh = network().eval()
    loaded = load_sparse(tmp_path / "model", fresh)
    assert torch.equal(loaded(x), model(x))
    assert loaded[3].weight_values is loaded[5].weight_values
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))


def test_blocks_of_a_convolution_are_pruned():
    conv = nn.Conv2d(5, 20, 3)
    block_l1_unstructured(conv, "weight", 0.75, (4, 3))
    layer = SparseConv2d.from_dense(conv, blocksize=(4, 3))
    assert len(layer.weight_values) == round(0.25 * 5 * 15)
    assert layer.weight_kept is None or layer.weight_kept.all()


def test_copies_and_state_dict():
    layer, x = SparseConv2d(5, 20, 3, density=0.3), inputs()
    other = SparseConv2d(5, 20, 3, density=0.2)
    other.load_state_dict(layer.state_dict())
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))


def test_autocast_computes_in_bfloat16():
    layer = SparseConv2d(5, 20, 3, density=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4, 3), {}, "positive channels, got 0 -> 4"),
        ((4, 4, (3, 3, 3)), {}, "kernel_size of two ints of at least 1"),
        ((4, 4, 3), {"stride": 0}, "stride of two ints of at least 1, got 0"),
        ((4, 4, 3), {"padding": -1}, "padding of two ints of at least 0, got -1"),
        ((4, 4, 3), {"padding": "full"}, "or ints, got 'full'"),
        ((4, 4, 3), {"padding": "same", "stride": 2}, "stride 1 for padding='same'"),
        ((4, 4, 3), {"padding_mode": "wrap"}, "padding_mode in"),
    ],
)
def test_says_what_it_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        SparseConv2d(*arguments, **options)


def test_says_what_it_cannot_convert_or_take():
    with pytest.raises(ValueError, match="one group, got groups=2"):
        SparseConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2))
    layer = SparseConv2d(5, 20, 3, density=0.3)
    with pytest.raises(ValueError, match=r"\(batch, 5, height, width\) inputs, got \(3, 4, 9, 9\)"):
        layer(torch.randn(3, 4, 9, 9))
    for call in (layer, layer.max_pooled):
        with pytest.raises(ValueError, match=r"expected x in torch.float32"):
            call(inputs().double())
    with pytest.raises((ValueError, RuntimeError), match=r"at least 2 x 2 to pool|too small"):
        layer.max_pooled(torch.randn(3, 5, 3, 9))
    with pytest.raises(ValueError, match="padded images of at least"):
        layer(torch.randn(3, 5, 2, 9))
