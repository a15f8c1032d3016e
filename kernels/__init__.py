"""Block-sparse linear algebra on plain tensors.

Each operation has one file per backend: `linear_torch.py` defines it and runs anywhere, the others
do the same faster where they can, as `dispatch.py` decides. `linear` is what a layer calls in eager
code, `traced_linear` where a compiler, tracer or transform looks on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import linear_torch
from .calls import (
    Weights,
    any_autocast,
    grid_of,
    is_traced,
    is_transformed,
    jit_tracing,
    kept_weights,
    plain,
)
from .conv2d_torch import Window
from .convolution import conv2d, max_pooled_conv2d, traced_conv2d
from .dispatch import TORCH, backend, backends, use_backend
from .linear_native import Chain, ChainLayer
from .pattern import Pattern, check_sizes, pattern_of

__all__ = [
    "Chain",
    "ChainLayer",
    "Pattern",
    "Weights",
    "Window",
    "any_autocast",
    "backend",
    "backends",
    "conv2d",
    "is_traced",
    "linear",
    "max_pooled_conv2d",
    "pattern_of",
    "traced_conv2d",
    "traced_linear",
    "use_backend",
]


def linear(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
    weights: Weights | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias), twice differentiable in x, values and bias.

    x: (batch, in_features); values: (nnz, C, R); bias: (out_features,); all of one floating dtype
    and device, else ValueError; activation: "none", "relu" or "gelu" -> (batch, out_features)
    weights: the numbers to compute with, where another thread may give values and bias others
    """
    if weights is None:
        weights = Weights(values.detach(), pattern, None if bias is None else bias.detach())
    for name, t in (("x", x), ("bias", values if bias is None else weights.bias)):
        if t.dtype != weights.values.dtype or t.device != weights.values.device:
            raise ValueError(
                f"expected {name} in {values.dtype} on {values.device}, as the weight is, "
                f"got {t.dtype} on {t.device}"
            )
    check_sizes(*weights, x.shape[1], out_features)
    if activation == "gelu" and torch.is_grad_enabled():  # its gradient needs what went in
        return F.gelu(linear(x, values, pattern, bias, out_features, "none", weights))
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, values, bias)
    ):
        return _Linear.apply(x, values, bias, weights, out_features, activation)
    return backend(x).linear(plain(x), *weights, out_features, activation)


def traced_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """`linear` as one operator, for compilers, tracers and modes; its indices are checked when it
    runs. Transforms of `torch.func` and the ONNX exporter see the definition in plain torch."""
    if (
        activation == "gelu" and torch.is_grad_enabled() and not jit_tracing()
    ):  # it checks without grad
        return F.gelu(traced_linear(x, values, crow_indices, col_indices, bias, out_features))
    compiling = torch.compiler.is_compiling()
    seen_through = torch.onnx.is_in_onnx_export() if compiling else is_transformed()
    call = linear_torch.definition if seen_through else torch.ops.sparse_lth.linear
    return call(x, values, crow_indices, col_indices, bias, out_features, activation)


@torch.library.custom_op("sparse_lth::linear", mutates_args=())
def _linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    grid = grid_of(out_features, x.shape[1], values.shape[1:])
    pattern = pattern_of(crow_indices, col_indices, grid)
    with torch.no_grad():
        return linear(x, values, pattern, bias, out_features, activation)


@torch.library.custom_op("sparse_lth::linear_grad_input", mutates_args=())
def _linear_grad_input(
    grad: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, in_features: int
) -> Tensor:
    grid = grid_of(grad.shape[1], in_features, values.shape[1:])
    pattern = pattern_of(crow_indices, col_indices, grid)
    check_sizes(values, pattern, None, in_features, grad.shape[1])
    return backend(grad).linear_grad_input(plain(grad), values, pattern, in_features)


@torch.library.custom_op("sparse_lth::sddmm", mutates_args=())
def _sddmm(
    grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, C: int, R: int
) -> Tensor:
    pattern = pattern_of(crow_indices, col_indices, grid_of(grad.shape[1], x.shape[1], (C, R)))
    return backend(grad).sddmm(plain(grad), plain(x), pattern, (C, R))


@_linear.register_fake
def _(x, values, crow_indices, col_indices, bias, out_features, activation):
    return x.new_empty(x.shape[0], out_features)


@_linear_grad_input.register_fake
def _(grad, values, crow_indices, col_indices, in_features):
    return grad.new_empty(grad.shape[0], in_features)


@_sddmm.register_fake
def _(grad, x, crow_indices, col_indices, C, R):
    return grad.new_empty(col_indices.shape[0], C, R)


def _save_traced(ctx, inputs, output):
    x, values, crow_indices, col_indices, bias, _, ctx.activation = inputs
    y = output if ctx.activation == "relu" else None
    ctx.save_for_backward(x, values, y, bias, crow_indices, col_indices)


def _traced_backward(ctx, grad):
    x, values, y, bias, *indices = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    elif ctx.activation == "gelu":  # where a graph that was traced without gradients gets them
        inner = _linear(x, values, *indices, bias, grad.shape[1], "none")
        grad = torch.ops.aten.gelu_backward(grad, inner)
    if ctx.needs_input_grad[0]:
        dx = _linear_grad_input(grad, values, *indices, x.shape[1])
    if ctx.needs_input_grad[1]:
        dvalues = _sddmm(grad, x, *indices, *values.shape[1:])
    if bias is not None and ctx.needs_input_grad[4]:
        dbias = grad.sum(0)
    return dx, dvalues, None, None, dbias, None, None


_linear.register_autograd(_traced_backward, setup_context=_save_traced)


def _save_four(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _grad_input_backward(ctx, grad):
    """Of grad @ weight; grad: (batch, in_features)"""
    outer, values, *indices = ctx.saved_tensors
    douter = dvalues = None
    if ctx.needs_input_grad[0]:
        douter = _linear(grad, values, *indices, None, outer.shape[1], "none")
    if ctx.needs_input_grad[1]:
        dvalues = _sddmm(outer, grad, *indices, *values.shape[1:])
    return douter, dvalues, None, None, None


def _sddmm_backward(ctx, grad):
    """Of the gradient at the kept blocks; grad: (nnz, C, R)"""
    outer, x, *indices = ctx.saved_tensors
    douter = dx = None
    if ctx.needs_input_grad[0]:
        douter = _linear(x, grad, *indices, None, outer.shape[1], "none")
    if ctx.needs_input_grad[1]:
        dx = _linear_grad_input(outer, grad, *indices, x.shape[1])
    return douter, dx, None, None, None, None


_linear_grad_input.register_autograd(_grad_input_backward, setup_context=_save_four)
_sddmm.register_autograd(_sddmm_backward, setup_context=_save_four)


class _Linear(torch.autograd.Function):
    """The same for eager training."""

    @staticmethod
    def forward(ctx, x, values, bias, weights, out_features, activation):
        # without a setup_context, for which torch inspects the signature in every call
        y = backend(x).linear(plain(x), *weights, out_features, activation)
        ctx.pattern, ctx.has_bias = weights.pattern, bias is not None
        ctx.save_for_backward(x, values, y if activation == "relu" else None)
        return y

    @staticmethod
    def backward(ctx, grad):
        (x, values, y), pattern, chosen = ctx.saved_tensors, ctx.pattern, backend(grad)
        if torch.is_grad_enabled():  # create_graph: autograd has to see through this gradient
            chosen = TORCH
        else:
            grad, x = plain(grad), plain(x)
        check_sizes(values, pattern, None, x.shape[1], grad.shape[1])
        dx = dvalues = dbias = None
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        if ctx.needs_input_grad[0]:
            dx = chosen.linear_grad_input(grad, values, pattern, x.shape[1])
        if ctx.needs_input_grad[1]:
            dvalues = chosen.sddmm(grad, x, pattern, values.shape[1:])
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = grad.sum(0)
        return dx, dvalues, dbias, None, None, None


@register_flop_formula(
    [torch.ops.sparse_lth.linear, torch.ops.sparse_lth.linear_grad_input], get_raw=True
)
def _flops(x, values, crow_indices, col_indices, *sizes, out_val, **_) -> int:
    ends = (out_val, x) if len(sizes) == 1 else (x, out_val)  # the gradient goes the other way
    return _products(*ends, values.shape[1:], crow_indices, col_indices)


@register_flop_formula(torch.ops.sparse_lth.sddmm, get_raw=True)
def _sddmm_flops(grad, x, crow_indices, col_indices, C, R, **_) -> int:
    return _products(x, grad, (C, R), crow_indices, col_indices)


def _products(x, y, block, crow_indices, col_indices) -> int:
    """2 * batch * kept weights"""
    (batch, inputs), outputs = x.shape, y.shape[1]
    return 2 * batch * kept_weights((outputs, inputs), block, crow_indices, col_indices)
