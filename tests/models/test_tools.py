"""torch's tools on sparse layers give the numbers that they give on dense ones."""

import copy
import io
import pickle
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from sparse_lth import SparseLinear, block_l1_unstructured, sparsify_
from sparse_lth.kernels.linear_torch import ACTIVATIONS
from tests.bounds import assert_as_exact_as

B, IN, OUT = 5, 33, 40


def _layer(seed=0, **options):
    torch.manual_seed(seed)
    return SparseLinear(IN, OUT, **{"blocksize": (8, 4), "density": 0.3, **options})


def _x(*shape):
    torch.manual_seed(7)
    return torch.randn(*(shape or (B, IN)))


def _network():
    torch.manual_seed(0)
    return nn.Sequential(_layer(), nn.GELU(), SparseLinear(OUT, 7, blocksize=(4, 4), density=0.5))


def _dense(model):
    """A copy with dense layers."""
    model = copy.deepcopy(model)
    if isinstance(model, SparseLinear):
        return model.to_dense()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SparseLinear):
                setattr(parent, name, child.to_dense())
    return model


def _assert_same(actual, model, *inputs):
    """`actual` is what the model's dense twin computes, to rounding."""
    with torch.no_grad():
        dense = _dense(model)
        exact = copy.deepcopy(dense).double()(*(x.double() for x in inputs))
        assert_as_exact_as(actual.detach(), dense(*inputs), exact)


def test_fx_traces_a_layer_and_a_network():
    for model in (_layer(), _network()):
        traced = torch.fx.symbolic_trace(model)
        for x in (_x(), _x(2, 3, IN)):
            _assert_same(traced(x), model, x)
        targets = [str(node.target) for node in traced.graph.nodes]
        assert any("sparse_lth.linear" in target for target in targets)


def test_feature_extraction_finds_the_layer():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = _network()
    extract = extraction.create_feature_extractor(model, {"0": "hidden", "2": "out"})
    found = extract(_x())
    torch.testing.assert_close(found["hidden"], model[0](_x()))
    torch.testing.assert_close(found["out"], model(_x()))


def test_vmap_over_stacked_states_runs_each_of_them():
    models = [_layer(seed) for seed in range(3)]  # of other values and other blocks
    parameters, buffers = torch.func.stack_module_state(models)

    def call(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    outputs = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, _x())
    for model, y in zip(models, outputs, strict=True):
        _assert_same(y, model, _x())

    def loss(parameters, buffers, x):
        return call(parameters, buffers, x).square().sum()

    grads = torch.vmap(torch.func.grad(loss), in_dims=(0, 0, None))(parameters, buffers, _x())
    for i, model in enumerate(models):
        model(_x()).square().sum().backward()
        torch.testing.assert_close(grads["weight_values"][i], model.weight_values.grad)


def test_functional_call_takes_other_numbers():
    layer, other = _layer(), _layer()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    y = torch.func.functional_call(layer, dict(other.named_parameters()), (_x(),))
    torch.testing.assert_close(y, other(_x()))


@pytest.mark.parametrize("blocksize", [(1, 1), (8, 4), (16, 16)])
def test_flops_are_those_of_the_kept_weights(blocksize):
    layer = _layer(blocksize=blocksize)
    kept = round(layer.density * IN * OUT)  # padding is not counted
    x = _x(2, 3, IN).requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    assert forward.get_total_flops() == 2 * 6 * kept
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * 2 * 6 * kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("model", [_layer(), _layer(activation="relu"), _network()])
def test_onnx_runtime_computes_the_same(model, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    torch.onnx.export(model.eval(), (_x(),), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: _x().numpy()})
    with torch.no_grad():
        _assert_same(torch.from_numpy(y), model, _x()) if isinstance(model, nn.Sequential) else (
            torch.testing.assert_close(torch.from_numpy(y), model(_x()))
        )


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_double_backward_is_that_of_the_dense_layer(activation, exported):
    layer = _layer(activation=activation).double()
    called, dense = layer, _dense(layer)
    if exported:  # without gradients, which leaves the op as one
        with torch.no_grad():
            called = torch.export.export(layer, (_x().double(),)).module()
    after, second = ACTIVATIONS[activation], []
    for call, module, weight in (
        (called, called, called.weight_values),
        (lambda x: after(dense(x)), dense, dense.weight),
    ):
        x = _x().double().requires_grad_()
        (dx,) = torch.autograd.grad(call(x).tanh().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), (x, weight, module.bias)))
    (x, values, bias), (dense_x, weight, dense_bias) = second
    torch.testing.assert_close(x, dense_x)
    torch.testing.assert_close(bias, dense_bias)
    kept = layer.shaped_weight(torch.ones_like(layer.weight_values)) != 0
    torch.testing.assert_close(layer.shaped_weight(values)[kept], weight[kept])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_with_a_way_out(layout):
    x = torch.nested.nested_tensor([_x(2, IN), _x(3, IN)], layout=layout)
    with pytest.raises(ValueError, match=r"got a nested one: give its x\.values\(\)"):
        _layer()(x)
    assert _layer()(x.to_padded_tensor(0.0)).shape == (2, 3, OUT)


@pytest.mark.filterwarnings("ignore:Sparse (BSR|CSR) tensor support is in beta")
def test_bsr_and_scipy_take_and_give_the_same_weight():
    layer = SparseLinear(32, 64, blocksize=(8, 4), density=0.3)
    assert torch.equal(layer.to_bsr().to_dense(), layer.to_dense().weight)
    back = SparseLinear.from_bsr(layer.to_bsr(), layer.bias)
    assert torch.equal(back(_x(B, 32)), layer(_x(B, 32)))
    pytest.importorskip("scipy")
    assert torch.equal(torch.from_numpy(layer.to_scipy().toarray()), layer.to_dense().weight)
    for scipy in (layer.to_scipy(), layer.to_scipy().tocsr()):
        back = SparseLinear.from_bsr(scipy)
        assert torch.equal(back.to_dense().weight, layer.to_dense().weight)


def _encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    for each in model.layers:
        block_l1_unstructured(each.linear1, "weight", 0.7, (8, 4))
        block_l1_unstructured(each.linear2, "weight", 0.7, (8, 4))
    return model


def _sparse_encoder():
    return sparsify_(_encoder(), (8, 4), max_density=1.0).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode", "autocast"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_transformer_encoder_runs_the_sparse_kernels(mode, masked, monkeypatch):
    model, x = _sparse_encoder(), _x(2, 6, 32)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = masked
    with torch.no_grad():
        expected = _dense(model)(x, src_key_padding_mask=padding if masked else None)
    calls, original = [], SparseLinear.forward
    monkeypatch.setattr(
        SparseLinear, "forward", lambda layer, x: calls.append(layer) or original(layer, x)
    )
    monkeypatch.setattr(SparseLinear, "shaped_weight", lambda *_: pytest.fail("a dense weight"))
    modes = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    with ExitStack() as stack:
        stack.enter_context(modes[mode]())
        if mode == "autocast":
            stack.enter_context(torch.no_grad())
        y = model(x, src_key_padding_mask=padding if masked else None)
    assert len(calls) == 4
    bits = {"rtol": 0.02, "atol": 0.05} if mode == "autocast" else {"rtol": 1e-4, "atol": 1e-5}
    kept = ~padding
    torch.testing.assert_close(y.detach().float()[kept], expected[kept], **bits)


@pytest.mark.parametrize("how", ["compile", "export", "strict export"])
def test_a_traced_transformer_encoder_holds_the_sparse_op(how):
    model, x, graphs = _sparse_encoder(), _x(2, 6, 32), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        if how == "compile":
            torch.compiler.reset()
            traced = torch.compile(model, backend=backend)
            y = traced(x)
        else:
            program = torch.export.export(model, (x,), strict=how == "strict export")
            graphs.append(program.graph_module)
            y = program.module()(x)
        torch.testing.assert_close(y, _dense(model)(x), rtol=1e-4, atol=1e-5)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("sparse_lth.linear" in target for target in targets) == 4
    assert not any("_transformer_encoder_layer_fwd" in target for target in targets)


def test_f_linear_of_the_weight_is_the_layer():
    layer, x = _layer(), _x().requires_grad_()
    y = F.linear(x, layer.weight, layer.bias)
    _assert_same(y, layer, x.detach())
    y.sum().backward()
    ours = layer.weight_values.grad.clone(), x.grad.clone()
    layer.weight_values.grad = x.grad = None
    layer(x).sum().backward()
    torch.testing.assert_close(ours, (layer.weight_values.grad, x.grad))
    torch.testing.assert_close(x.detach() @ layer.weight.T + layer.bias, y)


def test_compiled_code_reads_what_a_weight_is():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = _layer()

        def forward(self, x):
            weight = self.layer.weight
            x = x.to(weight.dtype).to(weight.device)
            return self.layer(x) / weight.shape[1]

    model, graphs = Reader(), []
    torch.compiler.reset()
    compiled = torch.compile(
        model, fullgraph=True, backend=lambda g, _: graphs.append(g.code) or g.forward
    )
    torch.testing.assert_close(compiled(_x()), model(_x()))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(_x()), model(_x()))


def test_parametrizations_and_module_dicts_hold_the_values():
    class Half(nn.Module):
        def forward(self, values):
            return values / 2

    model = nn.ModuleDict({"layer": _layer()})
    layer = model["layer"]
    expected = F.linear(_x(), layer.to_dense().weight / 2, layer.bias)
    parametrize.register_parametrization(layer, "weight_values", Half())
    torch.testing.assert_close(layer(_x()), expected)
    layer(_x()).sum().backward()
    assert layer.parametrizations.weight_values.original.grad.any()
    torch.testing.assert_close(F.linear(_x(), layer.weight, layer.bias), expected)
    parametrize.remove_parametrizations(layer, "weight_values")
    torch.testing.assert_close(layer(_x()), expected)


def test_prune_masks_the_values():
    layer = _layer()
    prune.l1_unstructured(layer, "weight_values", 0.5)
    pruned = layer.weight_mask if hasattr(layer, "weight_mask") else layer.weight_values_mask
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(_x()).square().sum().backward()
        optimizer.step()
    y = layer(_x())
    assert not layer.weight_values[pruned == 0].any()
    prune.remove(layer, "weight_values")
    torch.testing.assert_close(layer(_x()), y)
    assert not layer.weight_values[pruned == 0].any()


def test_gradients_are_clipped_by_the_norm_of_the_dense_ones():
    layer = _layer()
    dense = _dense(layer)
    inside = layer.shaped_weight(torch.ones_like(layer.weight_values)) != 0
    dense(_x()).square().sum().backward()
    dense.weight.grad *= inside
    layer(_x()).square().sum().backward()
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (layer, dense)]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_move_the_kept_weights_as_in_a_masked_dense_layer(optimizer):
    torch.manual_seed(0)
    dense = nn.Linear(32, 64).double()
    prune.l1_unstructured(dense, "weight", 0.8)
    layer, mask = SparseLinear.from_dense(dense, blocksize=(4, 4)), dense.weight_mask != 0
    for each in (layer, dense):
        stepper = OPTIMIZERS[optimizer](each.parameters())
        for step in range(3):
            stepper.zero_grad()
            torch.manual_seed(step)
            each(torch.randn(B, 32, dtype=torch.float64)).square().mean().backward()
            stepper.step()
    weight = layer.to_dense().weight
    torch.testing.assert_close(weight, dense.weight_orig * mask)
    assert not weight[~mask].any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_refuses_values():
    layer = _layer()
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        torch.optim.Muon(layer.parameters())


def test_averaged_models_hold_the_average():
    model = _network()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    average.update_parameters(model)
    for mean, parameter in zip(average.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mean, parameter * 2 / 3)
    _assert_same(average(_x()), average.module, _x())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("how", ["jit", "export"])
def test_traces_compute_and_train_the_same_in_any_mode(how, grad, activation):
    model = nn.Sequential(_layer(activation=activation), SparseLinear(OUT, 7, density=0.5)).eval()
    with torch.set_grad_enabled(grad):
        if how == "jit":
            traced = torch.jit.trace(model, _x())
        else:
            shapes = ({0: torch.export.Dim("batch")},)
            traced = torch.export.export(model, (_x(),), dynamic_shapes=shapes).module()
    torch.testing.assert_close(traced(_x(9, IN)), model(_x(9, IN)))
    xs = [_x().requires_grad_() for _ in range(2)]
    for each, x in zip((model, traced), xs, strict=True):
        model.zero_grad()
        traced.zero_grad()
        each(x).square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)


def test_aot_autograd_gives_the_same_gradients():
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

    model = _network()
    compiled = torch.compile(
        copy.deepcopy(model),
        backend=lambda g, x: aot_module_simplified(g, x, lambda f, _: make_boxed_func(f.forward)),
    )
    torch.compiler.reset()
    for each in (model, compiled):
        each(_x()).square().sum().backward()
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_whole_modules_and_their_states_survive_files_and_copies():
    model, file = _network(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert torch.equal(twin(_x()), model(_x()))
        assert torch.equal(twin[0].weight, model[0].weight)
    state, twin = io.BytesIO(), _network()
    torch.save(model.state_dict(), state)
    state.seek(0)
    twin.load_state_dict(torch.load(state, weights_only=True))
    assert torch.equal(twin(_x()), model(_x()))
