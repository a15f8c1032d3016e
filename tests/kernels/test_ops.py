import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_lth import SparseLinear
from sparse_lth.kernels import is_traced

OPS = torch.ops.sparse_lth


def _layer(**options):
    torch.manual_seed(0)
    return SparseLinear(33, 20, density=0.3, blocksize=(8, 4), **options)


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


class _Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def test_tracers_and_modes_see_the_op_and_eager_code_does_without():
    layer, x = _layer().requires_grad_(False), torch.randn(5, 33)
    assert not is_traced(x)
    graph = make_fx(layer)(x).graph
    assert OPS.linear.default in [node.target for node in graph.nodes]
    with _Recorded() as mode:
        layer(x)
    assert OPS.linear.default in mode.ops


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_jit_trace_keeps_the_batch_open():
    layer, x = _layer(), torch.randn(5, 33)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x[:2]), layer(x[:2]))


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own forward mode uses it
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_transforms_are_those_of_the_dense_layer(activation):
    layer = _layer(activation=activation)
    dense, act = layer.to_dense(), getattr(torch.nn.functional, activation, lambda y: y)
    x, tangent = torch.randn(2, 5, 33)

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


def test_gradients_of_every_sample():
    layer, x = _layer(activation="relu"), torch.randn(5, 33)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(5):
        layer.zero_grad()
        layer(x[n]).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(each[name][n], p.grad)
