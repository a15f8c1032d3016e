"""The block-sparse convolution, differentiable: `conv2d` in eager code, `traced_conv2d` where a
compiler, tracer or transform looks on. As `linear`, on images."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import conv2d_native, conv2d_torch
from .calls import Weights, grid_of, is_transformed, kept_weights, plain
from .conv2d_torch import Window, memory_format
from .dispatch import TORCH, backend
from .pattern import Pattern, check_sizes, pattern_of


def conv2d(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    out_channels: int,
    window: Window,
    activation: str = "none",
    weights: Weights | None = None,
) -> Tensor:
    """activation(F.conv2d(x, weight, bias)), twice differentiable in x, values and bias.

    x: (batch, in_channels, height, width); values: (nnz, C, R), the blocks of an
    (out_channels, in_channels * kernel) weight; bias: (out_channels,); all of one floating dtype
    and device, else ValueError; activation: "none", "relu" or "gelu"
    -> (batch, out_channels, out_height, out_width), in the memory format of x
    weights: the numbers to compute with, where another thread may give values and bias others
    """
    if weights is None:
        weights = Weights(values.detach(), pattern, None if bias is None else bias.detach())
    _check_like(weights.values, x=x, bias=weights.bias)
    check_sizes(*weights, x.shape[1] * window.size, out_channels)
    if activation == "gelu" and torch.is_grad_enabled():  # its gradient needs what went in
        return F.gelu(conv2d(x, values, pattern, bias, out_channels, window, "none", weights))
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, values, bias)
    ):
        return _Conv2d.apply(x, values, bias, weights, out_channels, window, activation)
    return backend(x).conv2d(plain(x), *weights, out_channels, window, activation)


def _check_like(values: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and (t.dtype != values.dtype or t.device != values.device):
            raise ValueError(
                f"expected {name} in {values.dtype} on {values.device}, as the weight is, "
                f"got {t.dtype} on {t.device}"
            )


def max_pooled_conv2d(
    x: Tensor, weights: Weights, out_channels: int, window: Window, activation: str = "none"
) -> Tensor:
    """F.max_pool2d(conv2d(...), 2), without gradients: on native kernels one call, which pools
    outputs while they are in cache."""
    _check_like(weights.values, x=x, bias=weights.bias)
    check_sizes(*weights, x.shape[1] * window.size, out_channels)
    chosen = backend(x)
    if not chosen.pools or activation == "gelu":
        return F.max_pool2d(chosen.conv2d(plain(x), *weights, out_channels, window, activation), 2)
    return conv2d_native.conv2d(plain(x), *weights, out_channels, window, activation, pool=2)


def traced_conv2d(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_channels: int,
    window: Window,
    activation: str = "none",
) -> Tensor:
    """`conv2d` as one operator, for compilers, tracers and modes; its indices are checked when it
    runs. Transforms of `torch.func` and the ONNX exporter see the definition in plain torch."""
    weights = values, crow_indices, col_indices, bias, out_channels
    if activation == "gelu" and torch.is_grad_enabled():
        return F.gelu(traced_conv2d(x, *weights, window))
    compiling = torch.compiler.is_compiling()
    if torch.onnx.is_in_onnx_export() if compiling else is_transformed():
        return conv2d_torch.definition(x, *weights, window, activation)
    return torch.ops.sparse_lth.conv2d(x, *weights, *window, activation)


@torch.library.custom_op("sparse_lth::conv2d", mutates_args=())
def _conv2d(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    window = _window(kernel_size, stride, padding, dilation)
    grid = grid_of(out_channels, x.shape[1] * window.size, values.shape[1:])
    pattern = pattern_of(crow_indices, col_indices, grid)
    with torch.no_grad():
        return conv2d(x, values, pattern, bias, out_channels, window, activation)


@torch.library.custom_op("sparse_lth::conv2d_grad_input", mutates_args=())
def _conv2d_grad_input(
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    window = _window(kernel_size, stride, padding, dilation)
    sizes = shape[1] * window.size, grad.shape[1]
    pattern = pattern_of(crow_indices, col_indices, grid_of(*sizes[::-1], values.shape[1:]))
    check_sizes(values, pattern, None, *sizes)
    _check_like(values, grad=grad)
    return backend(grad).conv2d_grad_input(plain(grad), values, pattern, tuple(shape), window)


@torch.library.custom_op("sparse_lth::conv2d_grad_weight", mutates_args=())
def _conv2d_grad_weight(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    C: int,
    R: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    window = _window(kernel_size, stride, padding, dilation)
    grid = grid_of(grad.shape[1], x.shape[1] * window.size, (C, R))
    pattern = pattern_of(crow_indices, col_indices, grid)
    _check_like(x, grad=grad)
    return backend(grad).conv2d_grad_weight(plain(grad), plain(x), pattern, (C, R), window)


def _window(*sizes: Sequence[int]) -> Window:
    return Window(*map(tuple, sizes))


@_conv2d.register_fake
def _(x, values, crow_indices, col_indices, bias, out_channels, *window_and_activation):
    window = _window(*window_and_activation[:4])
    size = x.shape[0], out_channels, *window.output_size(*x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@_conv2d_grad_input.register_fake
def _(grad, values, crow_indices, col_indices, shape, *window):
    layout = memory_format(grad)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


@_conv2d_grad_weight.register_fake
def _(grad, x, crow_indices, col_indices, C, R, *window):
    return grad.new_empty(col_indices.shape[0], C, R)


def _save_traced(ctx, inputs, output):
    x, values, crow_indices, col_indices, bias, _, *window, activation = inputs
    ctx.has_bias, ctx.window = bias is not None, window
    y = output if activation == "relu" else None
    ctx.save_for_backward(x, values, y, crow_indices, col_indices)


def _traced_backward(ctx, grad):
    x, values, y, *indices = ctx.saved_tensors
    dx = dvalues = dbias = None
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    if ctx.needs_input_grad[0]:
        dx = _conv2d_grad_input(grad, values, *indices, x.shape, *ctx.window)
    if ctx.needs_input_grad[1]:
        dvalues = _conv2d_grad_weight(grad, x, *indices, *values.shape[1:], *ctx.window)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        dbias = grad.sum((0, 2, 3))
    return dx, dvalues, None, None, dbias, *[None] * 6


_conv2d.register_autograd(_traced_backward, setup_context=_save_traced)


class _Conv2d(torch.autograd.Function):
    """The same for eager training."""

    @staticmethod
    def forward(ctx, x, values, bias, weights, out_channels, window, activation):
        # without a setup_context, for which torch inspects the signature in every call
        y = backend(x).conv2d(plain(x), *weights, out_channels, window, activation)
        ctx.pattern, ctx.window, ctx.has_bias = weights.pattern, window, bias is not None
        ctx.save_for_backward(x, values, y if activation == "relu" else None)
        return y

    @staticmethod
    def backward(ctx, grad):
        (x, values, y), pattern, window = ctx.saved_tensors, ctx.pattern, ctx.window
        chosen = backend(grad)
        if torch.is_grad_enabled():  # create_graph: autograd has to see through this gradient
            chosen = TORCH
        else:
            grad, x = plain(grad), plain(x)
        check_sizes(values, pattern, None, x.shape[1] * window.size, grad.shape[1])
        dx = dvalues = dbias = None
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        if ctx.needs_input_grad[0]:
            dx = chosen.conv2d_grad_input(grad, values, pattern, x.shape, window)
        if ctx.needs_input_grad[1]:
            dvalues = chosen.conv2d_grad_weight(grad, x, pattern, values.shape[1:], window)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = grad.sum((0, 2, 3))
        return dx, dvalues, dbias, *[None] * 4


@register_flop_formula(torch.ops.sparse_lth.conv2d, get_raw=True)
def _flops(x, values, crow_indices, col_indices, bias, channels, kernel, *_, out_val, **__) -> int:
    return _products(out_val, x, values.shape[1:], crow_indices, col_indices, kernel)


@register_flop_formula(torch.ops.sparse_lth.conv2d_grad_input, get_raw=True)
def _grad_input_flops(
    grad, values, crow_indices, col_indices, shape, kernel, *_, out_val, **__
) -> int:
    return _products(grad, out_val, values.shape[1:], crow_indices, col_indices, kernel)


@register_flop_formula(torch.ops.sparse_lth.conv2d_grad_weight, get_raw=True)
def _grad_weight_flops(grad, x, crow_indices, col_indices, C, R, kernel, *_, **__) -> int:
    return _products(grad, x, (C, R), crow_indices, col_indices, kernel)


def _products(y, x, block, crow_indices, col_indices, kernel) -> int:
    """2 * kept weights for each output position of the batch"""
    batch, out_channels, *size = y.shape
    shape = out_channels, x.shape[1] * math.prod(kernel)
    return 2 * batch * math.prod(size) * kept_weights(shape, block, crow_indices, col_indices)
