"""Block-sparse linear algebra on plain tensors.

`linear` is what a layer calls. Each operation is a set of siblings: `linear_torch.py` defines it
and runs anywhere; the others do the same faster where they can, as `dispatch.py` decides.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import linear_torch
from .dispatch import backend, backends, use_backend
from .linear_native import Chain, ChainLayer
from .pattern import Pattern

__all__ = [
    "Chain",
    "ChainLayer",
    "Pattern",
    "backend",
    "backends",
    "is_traced",
    "linear",
    "use_backend",
]


def linear(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(x @ weight.T + bias), differentiable in x, values and bias.

    x: (batch, in_features); values: (nnz, C, R); bias: (out_features,); all of one floating dtype
    and device, else ValueError; activation: "none", "relu" or "gelu" -> (batch, out_features)
    """
    for name, t in (("x", x), ("bias", values if bias is None else bias)):
        if t.dtype != values.dtype or t.device != values.device:
            raise ValueError(
                f"expected {name} in {values.dtype} on {values.device}, as the weight is, "
                f"got {t.dtype} on {t.device}"
            )
    if activation == "gelu" and torch.is_grad_enabled():  # its gradient needs what went in
        return F.gelu(linear(x, values, pattern, bias, out_features))
    if is_traced(x):
        seen_through = not torch.compiler.is_compiling() and _transformed()
        call = linear_torch.linear if seen_through else _linear
    elif torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, values, bias)
    ):
        call = _Linear.apply
    else:
        call = backend(x).linear
    return call(x, values, pattern, bias, out_features, activation)


# They have no public name; a torch without them pays for the op, or the definition, in every call.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler, tracer, transform or mode wants to see an op. Eager code does without: a
    registered op takes several us to call, and its autograd 100 us, more than a small layer."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch.jit.is_tracing()
        or _modes() > 0
        or _transformed()
    )


def _transformed() -> bool:
    """Whether under vmap, jvp, grad or forward-mode AD. They have no rules for a registered op,
    and jvp drops its tangents without a word, but see through the definition in plain torch."""
    return _transform() is not None or getattr(forward_ad, "_current_level", 0) >= 0


@torch.library.custom_op("sparse_lth::linear", mutates_args=())
def _linear(
    x: Tensor,
    values: Tensor,
    pattern: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    return backend(x).linear(x, values, Pattern(*pattern), bias, out_features, activation)


@torch.library.custom_op("sparse_lth::linear_grad_input", mutates_args=())
def _linear_grad_input(
    grad: Tensor, values: Tensor, pattern: Sequence[Tensor], in_features: int
) -> Tensor:
    return backend(grad).linear_grad_input(grad, values, Pattern(*pattern), in_features)


@torch.library.custom_op("sparse_lth::sddmm", mutates_args=())
def _sddmm(grad: Tensor, x: Tensor, pattern: Sequence[Tensor], C: int, R: int) -> Tensor:
    return backend(grad).sddmm(grad, x, Pattern(*pattern), (C, R))


@_linear.register_fake
def _(x, values, pattern, bias, out_features, activation):
    return x.new_empty(x.shape[0], out_features)


@_linear_grad_input.register_fake
def _(grad, values, pattern, in_features):
    return grad.new_empty(grad.shape[0], in_features)


@_sddmm.register_fake
def _(grad, x, pattern, C, R):
    return grad.new_empty(pattern[1].shape[0], C, R)


def _save(ctx, inputs, output):
    x, values, pattern, bias, _, ctx.activation = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, values, output if ctx.activation == "relu" else None, *pattern)


def _gradients(ctx, grad, linear_grad_input, sddmm):
    """dx, dvalues, dbias; None where none is wanted"""
    x, values, y, *pattern = ctx.saved_tensors
    pattern = Pattern(*pattern)
    dx = dvalues = dbias = None
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    if ctx.needs_input_grad[0]:
        dx = linear_grad_input(grad, values, pattern, x.shape[1])
    if ctx.needs_input_grad[1]:
        dvalues = sddmm(grad, x, pattern, values.shape[1:])
    if ctx.has_bias and ctx.needs_input_grad[3]:
        dbias = grad.sum(0)
    return dx, dvalues, dbias


def _backward(ctx, grad):
    def sddmm(grad, x, pattern, block):
        return _sddmm(grad, x, pattern, *block)

    dx, dvalues, dbias = _gradients(ctx, grad, _linear_grad_input, sddmm)
    return dx, dvalues, [None] * len(Pattern._fields), dbias, None, None


_linear.register_autograd(_backward, setup_context=_save)


class _Linear(torch.autograd.Function):
    """The same for eager training."""

    @staticmethod
    def forward(ctx, *inputs):
        # without a setup_context, for which torch inspects the signature in every call
        y = backend(inputs[0]).linear(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        chosen = backend(grad)
        dx, dvalues, dbias = _gradients(ctx, grad, chosen.linear_grad_input, chosen.sddmm)
        return dx, dvalues, None, dbias, None, None
