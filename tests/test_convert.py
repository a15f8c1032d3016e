"""Conversion keeps what a layer is, and says what became of each."""

import copy
import functools
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparse_lth import (
    Search,
    SparseConv2d,
    SparseLinear,
    SparseSequential,
    conversion,
    convert,
    sparsify_,
)
from sparse_lth.kernels import linear_native
from tests.bounds import assert_as_exact_as, assert_close

convert_all = functools.partial(sparsify_, max_density=1.0)  # also where no kernel is faster


def halved(layer):
    """Its right half is zero."""
    with torch.no_grad():
        layer.weight[:, layer.weight.shape[1] // 2 :] = 0
    return layer


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(halved(nn.Linear(64, 64)), nn.ReLU(), halved(nn.Linear(64, 64)))


def reasons(model, **options):
    """What is left and why; a call that converts nothing warns with one of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sparsify_ converted no layer")
        model = sparsify_(model, **{"max_density": 1.0, **options})
    return {row.name: row.reason for row in conversion(model).rows}


# what a layer carries

HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(lambda *a: f()),
    "forward with kwargs": lambda m, f: m.register_forward_hook(lambda *a: f(), with_kwargs=True),
    "forward always": lambda m, f: m.register_forward_hook(lambda *a: f(), always_call=True),
    "forward pre": lambda m, f: m.register_forward_pre_hook(lambda *a: f()),
    "forward pre with kwargs": lambda m, f: m.register_forward_pre_hook(
        lambda *a: f(), with_kwargs=True
    ),
    "backward": lambda m, f: m.register_full_backward_hook(lambda *a: f()),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(lambda *a: f()),
    "state_dict": lambda m, f: m.register_state_dict_post_hook(lambda *a: f()),
    "state_dict pre": lambda m, f: m.register_state_dict_pre_hook(lambda *a: f()),
    "load": lambda m, f: m.register_load_state_dict_post_hook(lambda *a: f()),
    "load pre": lambda m, f: m.register_load_state_dict_pre_hook(lambda *a: f()),
}


def use(model):
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called_as_before_and_their_handles_remove_them(kind):
    model, calls = a_model(), []
    handle = HOOKS[kind](model[0], lambda: calls.append(1))
    use(model)
    before = len(calls)
    assert before > 0
    convert_all(model)
    assert isinstance(model[0], SparseLinear)
    use(model)
    assert len(calls) == 2 * before
    handle.remove()
    use(model)
    assert len(calls) == 2 * before


def test_a_load_hook_gets_the_new_layer():
    model, seen = a_model(), []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    convert_all(model)
    model.load_state_dict(model.state_dict())
    assert seen == [model[0]]


def test_flags_and_what_somebody_put_on_a_layer_are_kept():
    model = a_model()
    layer = model[0].eval()
    layer.weight.requires_grad_(False)
    layer.weight.tag = "a tag"
    layer.note = ["a list"]
    layer.scale = nn.Parameter(torch.ones(3))
    layer.register_buffer("calls", torch.zeros(1))
    layer.register_buffer("passing", torch.zeros(2), persistent=False)
    layer.adapter = nn.Linear(2, 2)
    bias, kept = layer.bias, (layer.note, layer.scale, layer.calls, layer.passing, layer.adapter)
    convert_all(model)
    new = model[0]
    assert isinstance(new, SparseLinear)
    assert not new.training
    assert model[2].training
    assert not new.weight_values.requires_grad
    assert new.weight_values.tag == "a tag"
    assert new.bias is bias
    now = new.note, new.scale, new.calls, new.passing, new.adapter
    assert all(a is b for a, b in zip(kept, now, strict=True))
    assert {"0.scale", "0.calls", "0.adapter.weight"} <= model.state_dict().keys()
    assert "0.passing" not in model.state_dict()


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def with_own_forward():
    layer = halved(nn.Linear(64, 64))
    layer.forward = lambda x: 5 * F.linear(x, layer.weight, layer.bias)
    return layer


def with_clash():
    layer = halved(nn.Linear(64, 64))
    layer.density = 0.5
    return layer


def with_hooked_weight():
    layer = halved(nn.Linear(64, 64))
    layer.weight.register_hook(lambda grad: grad)
    return layer


def old_style(kind):
    def make():
        layer = halved(nn.Linear(64, 64))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            getattr(nn.utils, kind)(layer)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(2)  # its weight is out of date
        return layer

    return make


def with_zeros(shape):
    layer = nn.Linear(64, 64)
    nn.init.zeros_(layer.weight)
    return layer


def with_pruned_bias():
    layer = halved(nn.Linear(64, 64))
    prune.l1_unstructured(layer, "bias", 0.5)
    return layer


LEFT = {
    "a subclass": (lambda: halved(Scaled(64, 64)), "Scaled is neither"),
    "a forward of its own": (with_own_forward, "its forward was replaced"),
    "a parametrization": (
        lambda: parametrizations.orthogonal(nn.Linear(64, 64)),
        "remove_parametrizations",
    ),
    "a new weight_norm": (
        lambda: parametrizations.weight_norm(halved(nn.Linear(64, 64))),
        "remove_parametrizations",
    ),
    "an old weight_norm": (old_style("weight_norm"), "a hook computes its weight"),
    "an old spectral_norm": (old_style("spectral_norm"), "a hook computes its weight"),
    "a pruned bias": (with_pruned_bias, "a hook computes its weight or bias"),
    "an attribute of ours": (with_clash, "mean something else on a sparse layer: density"),
    "a hook on the weight": (with_hooked_weight, "a hook is registered on its weight"),
    "all zero": (lambda: with_zeros((64, 64)), "all zero without a mask"),
    "nothing pruned": (lambda: nn.Linear(64, 64), "it has no empty 16x16 block"),
    "no numbers": (lambda: nn.Linear(64, 64, device="meta"), "no numbers"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_cannot_be_converted_is_left_as_it_is_with_the_reason(what):
    make, reason = LEFT[what]
    torch.manual_seed(0)
    model = nn.Sequential(make(), halved(nn.Linear(64, 64)))
    layer, before = model[0], dict(vars(model[0]))
    assert reason in reasons(model)["0"]
    assert model[0] is layer
    assert vars(layer).keys() == before.keys()
    assert isinstance(model[1], SparseLinear)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
def test_layers_of_no_size_are_left(shape):
    assert reasons(nn.Sequential(nn.Linear(*shape)))["0"] == "its weight is empty"


def test_the_out_proj_of_attention_is_left_since_nobody_calls_it():
    attention = nn.MultiheadAttention(64, 4)
    halved(attention.out_proj)
    assert "never calls the layer" in reasons(attention)["out_proj"]


# tied weights


def test_linear_layers_on_one_parameter_give_one_parameter():
    model = nn.Sequential(halved(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    x = torch.randn(2, 64)
    dense = copy.deepcopy(model)
    convert_all(model)
    assert model[0].weight_values is model[2].weight_values
    assert model[0].bias is model[2].bias
    assert len([*model.parameters()]) == 2
    assert len(copy.deepcopy(model)[0].weight_values) == 8
    for m in (dense, model):
        m(x).square().sum().backward()
        torch.optim.SGD(m.parameters(), lr=1e-3).step()
    where = model[0].to_dense().weight != 0
    torch.testing.assert_close(model[0].to_dense().weight[where], dense[0].weight[where])


def test_a_layer_tied_to_what_needs_it_dense_is_left():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
    model[1].weight = halved(model[0]).weight
    assert reasons(model) == {"1": "its weight is tied to Embedding, which needs it dense"}
    assert model[1].weight is model[0].weight

    model = nn.Sequential(halved(nn.Linear(64, 64)), Scaled(64, 64))
    model[1].weight = model[0].weight
    assert "tied to a layer that is left: Scaled" in reasons(model)["0"]

    shared = nn.Parameter(torch.randn(64, 64))
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(2)))
    for layer, columns in zip(model, (slice(0, 32), slice(32, 64)), strict=True):
        layer.weight = shared
        mask = torch.zeros(64, 64)
        mask[:, columns] = 1
        prune.custom_from_mask(layer, "weight", mask)
    assert set(reasons(model).values()) == {"its weight is tied to a layer of another mask"}


def test_one_layer_in_two_places_stays_one():
    layer = halved(nn.Linear(64, 64))
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": layer})
    convert_all(model)
    assert model["a"][0] is model["b"]
    assert isinstance(model["b"], SparseLinear)
    assert [row.name for row in conversion(model).converted] == ["a.0", "b"]


# a mask is a promise


def orthogonal_step(parameters):
    """As Muon: the step mixes all numbers of a matrix, so that none of its gradients is 0."""

    class Orthogonal(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                u, _, vh = torch.linalg.svd(p.grad.flatten(1), full_matrices=False)
                p -= 0.1 * (u @ vh).view(p.shape) + 0.1

    return Orthogonal([p for p in parameters if p.dim() > 1], {})


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "an orthogonal one": orthogonal_step,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("blocksize", [(16, 16), (8, 1), (3, 5), (1, 1)])
def test_what_is_masked_stays_zero_and_what_is_not_may_train(optimizer, blocksize):
    torch.manual_seed(0)
    dense = nn.Linear(60, 40)
    mask = torch.rand(40, 60) < 0.25
    mask[:, :20] = False
    prune.custom_from_mask(dense, "weight", mask)
    layer = convert_all(dense, blocksize)
    steps = OPTIMIZERS[optimizer](layer.parameters())
    for _ in range(3):
        layer(torch.randn(8, 60)).square().sum().backward()
        steps.step()
    assert not layer.to_dense().weight[~mask].any()
    assert not layer.weight.detach().dense()[~mask].any()
    assert not copy.deepcopy(layer).to_dense().weight[~mask].any()
    x = torch.randn(4, 60)
    weight, bias = layer.to_dense().weight.double(), layer.bias.double()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            magnitude = F.linear(x.double().abs(), weight.abs(), bias.abs())
            assert_close(layer(x), F.linear(x.double(), weight, bias), magnitude)


def test_without_a_mask_zeros_inside_a_kept_block_train():
    dense = nn.Linear(32, 32)
    with torch.no_grad():
        dense.weight[:, 16:] = 0
        dense.weight[0, :8] = 0
    layer = convert_all(dense)
    assert layer.weight_kept is None
    layer(torch.randn(8, 32)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert layer.to_dense().weight[0, :8].all()


def test_pruning_again_and_removing_leaves_a_plain_layer():
    dense = nn.Linear(64, 64)
    prune.l1_unstructured(dense, "weight", 0.5)
    prune.ln_structured(dense, "weight", 0.5, n=2, dim=1)
    handle = dense.register_forward_pre_hook(lambda *a: None)
    x = torch.randn(2, 64)
    expected = dense(x)
    layer = convert_all(dense, (64, 1))
    torch.testing.assert_close(layer(x), expected)
    assert list(layer._forward_pre_hooks) == [handle.id]
    assert layer.state_dict().keys() == {
        *("weight_values", "bias", "crow_indices", "col_indices", "weight_kept")
    }


# the call


def test_a_blocksize_of_one_number_is_a_square():
    assert convert_all(a_model(), blocksize=8)[0].blocksize == (8, 8)


@pytest.mark.parametrize("blocksize", [0, -1, (16,), (16, 0), "16", 1.5, (1, 2, 3), None])
def test_other_blocksizes_are_refused_and_the_model_is_untouched(blocksize):
    model = a_model()
    layers = [*model]
    with pytest.raises(ValueError, match="expected a blocksize"):
        convert_all(model, blocksize)
    assert [*model] == layers


def test_max_density_says_which_layers_are_converted():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[:, 16:] = 0  # 0.25 of the blocks
        model[1].weight[:, 48:] = 0  # 0.75
    assert [bool(r) for r in reasons(copy.deepcopy(model), max_density=0.2).values()] == [True] * 2
    some = reasons(copy.deepcopy(model), max_density=0.5)
    assert some["0"] == ""
    assert "0.75 of its 16x16 blocks are not empty, above max_density" in some["1"]
    assert [*reasons(copy.deepcopy(model), max_density=1.0).values()] == ["", ""]


def test_what_became_of_each_layer_is_one_table():
    model = nn.Sequential(halved(nn.Linear(64, 32)), nn.Linear(64, 64))
    report = conversion(convert_all(model))
    assert report.rows[0] == ("0", "Linear", (32, 64), 0.5, "")
    assert report.left[0].density is None
    assert str(report).splitlines()[:2] == [
        "1 of 2 layers are block-sparse",
        "0  Linear 32x64  density 0.5000",
    ]
    with pytest.raises(KeyError):
        conversion(nn.Linear(1, 1))


def test_a_dtype_without_a_fast_kernel_is_left_unless_asked_for():
    model = a_model().half()
    with pytest.warns(UserWarning, match="no kernel for torch.float16 .* max_density=1.0"):
        sparsify_(model)
    assert isinstance(convert_all(model)[0], SparseLinear)


@pytest.mark.skipif(linear_native.WHY_NOT is not None, reason="native kernels are not built")
def test_a_call_that_converts_nothing_says_why_and_which_blocksize_would():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(2)))
    for layer in model:
        prune.random_unstructured(layer, "weight", 0.9)
    with pytest.warns(UserWarning, match=r"no empty 16x16 block; blocksize=\((\d+), (\d+)\)") as w:
        sparsify_(model)
    assert len(w) == 1
    assert w[0].filename == __file__
    advised = re.search(r"blocksize=\((\d+), (\d+)\)", str(w[0].message))
    sparsify_(model, tuple(map(int, advised.groups())))
    assert len(conversion(model).converted) == 2
    with pytest.warns(UserWarning, match="it has no linear layer or convolution"):
        sparsify_(nn.ReLU())


@pytest.mark.parametrize("where", ["_convert", "_carry"])
def test_all_or_nothing(monkeypatch, where):
    model, x = a_model(), torch.randn(2, 64)
    prune.l1_unstructured(model[0], "weight", 0.5)
    seen = []
    model[0].register_forward_hook(lambda *a: None)
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    expected, layers, states = model(x), [*model], [dict(vars(m)) for m in model]
    real, calls = getattr(convert, where), []

    def fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory for the second")
        return real(*args)

    monkeypatch.setattr(convert, where, fails)
    with pytest.raises(MemoryError):
        convert_all(model)
    assert [*model] == layers
    assert [vars(m) for m in model] == states
    assert torch.equal(model(x), expected)
    model.load_state_dict(model.state_dict())
    assert seen == [model[0]]


def test_filter_fn_sees_each_layer_and_its_name():
    seen = []
    model = a_model()
    convert_all(model, filter_fn=lambda module, name: seen.append((module, name)) or name == "2")
    assert [name for _, name in seen] == ["0", "2"]
    assert isinstance(model[2], SparseLinear)
    assert conversion(model).left[0].reason == "filter_fn says no"


def test_conversion_leaves_the_generator_and_the_dtypes_alone():
    model = a_model().double()
    before = torch.get_rng_state()
    convert_all(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model[0].weight_values.dtype == model[0].bias.dtype == torch.float64


def test_a_convolution_carries_the_same():
    torch.manual_seed(0)
    layer, calls = nn.Conv2d(64, 32, 3), []
    with torch.no_grad():
        layer.weight[:, 16:] = 0
    layer.weight.requires_grad_(False)
    layer.note = "a note"
    handle = layer.register_forward_hook(lambda *a: calls.append(1))
    x = torch.randn(1, 64, 6, 6)
    expected = layer(x)
    new = convert_all(layer.eval())
    assert isinstance(new, SparseConv2d)
    torch.testing.assert_close(new(x), expected)
    assert len(calls) == 2
    handle.remove()
    new(x)
    assert (len(calls), new.note, new.training) == (2, "a note", False)
    assert not new.weight_values.requires_grad


class Pipeline(nn.Sequential):
    """Somebody's own."""


@pytest.mark.skipif(linear_native.WHY_NOT is not None, reason="no native kernels")
def test_layers_in_a_sequential_run_in_one_call():
    model = nn.ModuleDict({"body": a_model(), "own": Pipeline(*a_model()), "rest": nn.Sequential()})
    body, x = model["body"], torch.randn(40, 64)
    with torch.no_grad():
        dense, exact = body(x), copy.deepcopy(body).double()(x.double())
        convert_all(model)
        assert model["body"] is body
        assert_as_exact_as(body(x), dense, exact)
    assert [len(chain.layers) for chain in body._prepared.chains] == [2]
    assert [type(m) for m in model.values()] == [SparseSequential, Pipeline, nn.Sequential]


@pytest.mark.parametrize("call", [sparsify_, lambda model: Search(model, 0.1)])
def test_what_is_no_model_and_what_has_no_weights_yet_are_refused(call):
    with pytest.raises(TypeError, match=r"expected a model, an nn\.Module, got int"):
        call(3)
    with pytest.raises(ValueError, match="call it on a batch first"):
        call(nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyBatchNorm1d()))
