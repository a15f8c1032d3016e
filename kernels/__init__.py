"""Block-sparse linear algebra on plain tensors, and the one place that picks a backend.

`linear` is what a layer calls. Each operation is a set of siblings: `linear_torch.py` defines it
and runs anywhere; the others do the same faster where they can.
"""

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear_torch, sddmm_torch
from .pattern import Pattern

__all__ = ["Pattern", "linear"]


class Backend(NamedTuple):
    """One implementation of each operation, with the signatures of `linear_torch.py`."""

    name: str
    linear: Callable[..., Tensor]
    linear_grad_input: Callable[..., Tensor]
    sddmm: Callable[..., Tensor]


TORCH = Backend("torch", linear_torch.linear, linear_torch.linear_grad_input, sddmm_torch.sddmm)


def backend(x: Tensor) -> Backend:
    """What runs an operation on `x` and tensors of its device and dtype."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return _triton(x.device) or TORCH
    return TORCH


@functools.cache
def _triton(device: torch.device) -> Backend | None:
    """Imported at the first call on a GPU; None where triton is missing or the GPU is too old."""
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    from . import linear_triton, sddmm_triton

    return Backend(
        "triton", linear_triton.linear, linear_triton.linear_grad_input, sddmm_triton.sddmm
    )


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
    and device; activation: "none", "relu" or "gelu" -> (batch, out_features)
    """
    if activation == "gelu" and torch.is_grad_enabled():  # its gradient needs what went in
        return F.gelu(_linear(x, values, pattern, bias, out_features, "none"))
    return _linear(x, values, pattern, bias, out_features, activation)


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
    return backend(x).sddmm(grad, x, Pattern(*pattern), (C, R))


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


def _backward(ctx, grad):
    x, values, y, *pattern = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    if ctx.needs_input_grad[0]:
        dx = _linear_grad_input(grad, values, pattern, x.shape[1])
    if ctx.needs_input_grad[1]:
        dvalues = _sddmm(grad, x, pattern, *values.shape[1:])
    if ctx.has_bias and ctx.needs_input_grad[3]:
        dbias = grad.sum(0)
    return dx, dvalues, [None] * len(pattern), dbias, None, None


_linear.register_autograd(_backward, setup_context=_save)
