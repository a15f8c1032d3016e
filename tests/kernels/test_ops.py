import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparse_lth import SparseConv2d, SparseLinear
from sparse_lth.kernels import is_traced

OPS = torch.ops.sparse_lth
CONV = {"stride": (2, 1), "padding": "valid", "dilation": (1, 2)}


def _linear(**options):
    return SparseLinear(33, 20, density=0.3, blocksize=(8, 4), **options), torch.randn(5, 33)


def _conv2d(**options):
    layer = SparseConv2d(3, 20, (3, 2), **CONV, density=0.3, blocksize=(8, 4), **options)
    return layer, torch.randn(5, 3, 6, 4)


@pytest.fixture(params=[_linear, _conv2d])
def make(request):
    """(**options) -> a layer, and a batch of 5 for it"""
    torch.manual_seed(0)
    return request.param


def _op(layer):
    return OPS.linear.default if isinstance(layer, SparseLinear) else OPS.conv2d.default


@pytest.mark.parametrize("op", ["linear_grad_input", "sddmm"])
@pytest.mark.parametrize("blocksize", [(8, 4), (4, 8)])
def test_gradient_ops_pass_torchs_own_checks(op, blocksize):
    layer = SparseLinear(33, 20, density=0.3, blocksize=blocksize).requires_grad_(False)
    grad, x, indices = torch.randn(5, 20), torch.randn(5, 33), layer.pattern[:2]
    args = {
        "linear_grad_input": (grad, layer.weight_values, *indices, 33),
        "sddmm": (grad, x, *indices, *blocksize[::-1]),
    }
    torch.library.opcheck(getattr(OPS, op).default, args[op])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ops_of_a_convolution_pass_torchs_own_checks(layout):
    layer, x = _conv2d()
    x = x.contiguous(memory_format=layout)
    values, indices, window = layer.weight_values, layer.pattern[:2], layer.window
    grad = torch.randn(layer(x).shape).contiguous(memory_format=layout)
    call = x.requires_grad_(), values, *indices, layer.bias, 20, *window, "relu"
    torch.library.opcheck(OPS.conv2d.default, call)
    x, values = x.detach(), values.detach()
    torch.library.opcheck(OPS.conv2d_grad_input.default, (grad, values, *indices, x.shape, *window))
    torch.library.opcheck(OPS.conv2d_grad_weight.default, (grad, x, *indices, 4, 8, *window))


class _Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def test_tracers_and_modes_see_the_op_and_eager_code_does_without(make):
    layer, x = make()
    layer.requires_grad_(False)
    assert not is_traced(x)
    graph = make_fx(layer)(x).graph
    assert _op(layer) in [node.target for node in graph.nodes]
    with _Recorded() as mode:
        layer(x)
    assert _op(layer) in mode.ops


def test_fx_traces_the_op(make):
    layer, x = make(activation="relu")
    traced = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(traced(x[:2]), layer(x[:2]))
    targets = {node.target for node in traced.graph.nodes}
    assert {_op(layer), _op(layer).overloadpacket} & targets


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_jit_trace_keeps_the_batch_open(make):
    layer, x = make()
    torch.testing.assert_close(torch.jit.trace(layer, x)(x[:2]), layer(x[:2]))


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own forward mode uses it
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_transforms_are_those_of_the_dense_layer(make, activation):
    layer, x = make(activation=activation)
    dense, act = layer.to_dense(), getattr(torch.nn.functional, activation, lambda y: y)
    tangent = torch.randn_like(x)

    def exact(x):
        return act(dense(x))

    def loss(call):
        return lambda x: call(x).square().sum()

    torch.testing.assert_close(vmap(layer)(x), exact(x))
    torch.testing.assert_close(jvp(layer, (x,), (tangent,)), jvp(exact, (x,), (tangent,)))
    for transform in (lambda f: vmap(grad(f))(x), lambda f: hessian(f)(x[0])):
        torch.testing.assert_close(transform(loss(layer)), transform(loss(exact)))
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(y.tangent, jvp(exact, (x,), (tangent,))[1])


def test_gradients_of_every_sample(make):
    layer, x = make(activation="relu")
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(5):
        layer.zero_grad()
        layer(x[n]).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(each[name][n], p.grad)


def test_layers_of_an_ensemble_have_blocks_of_their_own(make):
    layers = [make()[0] for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    layer, x = copy.deepcopy(layers[0]).to("meta"), make()[1]

    def call(parameters, buffers):
        return functional_call(layer, (parameters, buffers), (x,))

    stacked = vmap(call)(parameters, buffers)
    torch.testing.assert_close(stacked, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_second_derivatives(make, activation):
    layer, x = make(activation=activation)
    parameters = dict(layer.double().named_parameters())

    def call(x, *tensors):
        tensors = dict(zip(parameters, tensors, strict=True))
        return functional_call(layer, tensors, (x,))

    x = x[:2].double().requires_grad_()
    for check in (gradcheck, gradgradcheck):
        assert check(call, (x, *parameters.values()), fast_mode=True)


def test_flops_are_those_of_the_kept_weights(make):
    layer, x = make()
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    kept = round(layer.density * layer.in_features * layer.out_features)
    assert forward.get_total_flops() == 2 * kept * y.numel() // layer.out_features
    with FlopCounterMode(display=False) as step:
        layer(x.requires_grad_()).sum().backward()
    assert step.get_total_flops() == 3 * forward.get_total_flops()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_get_one_error(make, layout):
    layer, x = make()
    nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=layout)
    with pytest.raises(ValueError, match=r"expected a dense tensor, got a nested one"):
        layer(nested)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_exports_to_onnx(make, activation, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer, x = make(activation=activation)
    model = nn.Sequential(layer).eval()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x))
