"""Block-sparse linear algebra on plain tensors, and the one place that picks a backend.

`linear` is what a layer calls. Each operation is a set of siblings: `linear_torch.py` defines it
and runs anywhere; the others do the same faster where they can.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import linear_native, linear_torch, sddmm_native, sddmm_torch
from .linear_native import Chain, ChainLayer
from .pattern import Pattern

__all__ = ["Chain", "ChainLayer", "Pattern", "backends", "linear", "use_backend"]


class Backend(NamedTuple):
    linear: Callable[..., Tensor]
    linear_grad_input: Callable[..., Tensor]
    sddmm: Callable[..., Tensor]


BACKENDS = {
    "native": Backend(linear_native.linear, linear_native.linear_grad_input, sddmm_native.sddmm),
    "torch": Backend(linear_torch.linear, linear_torch.linear_grad_input, sddmm_torch.sddmm),
}
_forced: ContextVar[str | None] = ContextVar("forced_backend", default=None)


def _backend(x: Tensor) -> Backend:
    """The fastest backend for tensors of the device and dtype of x."""
    name = _forced.get()
    if name is None:
        native = x.is_cpu and x.dtype == torch.float32 and linear_native.WHY_NOT is None
        name = "native" if native else "torch"
    return BACKENDS[name]


def backends() -> dict[str, str]:
    """What each backend can do here: "available", with its instruction set, or why not."""
    native = linear_native.WHY_NOT or f"available ({linear_native.INSTRUCTION_SETS[0]})"
    return {"native": native, "torch": "available"}


@contextmanager
def use_backend(name: str, instruction_set: str | None = None) -> Iterator[None]:
    """Forces a backend in this thread and context, for tests and benchmarks.

    instruction_set: of the native kernels, one of `linear_native.INSTRUCTION_SETS`
    """
    if name not in BACKENDS or not backends()[name].startswith("available"):
        raise ValueError(f"expected an available backend, got {name!r}: {backends()}")
    known = linear_native.INSTRUCTION_SETS
    if instruction_set is not None and instruction_set not in known:
        raise ValueError(f"expected instruction_set in {list(known)}, got {instruction_set!r}")
    backend_before = _forced.set(name)
    set_before = linear_native.instruction_set.set(
        known.index(instruction_set) if instruction_set else 0
    )
    try:
        yield
    finally:
        _forced.reset(backend_before)
        linear_native.instruction_set.reset(set_before)


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
        return F.gelu(linear(x, values, pattern, bias, out_features))
    if _is_traced(x):
        call = _linear
    elif torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, values, bias)
    ):
        call = _Linear.apply
    else:
        call = _backend(x).linear
    return call(x, values, pattern, bias, out_features, activation)


def _is_traced(x: Tensor) -> bool:
    """Whether a compiler, tracer, transform or mode wants to see an op. Eager code does without: a
    registered op takes several us to call, and its autograd 100 us, more than a small layer."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


@torch.library.custom_op("sparse_lth::linear", mutates_args=())
def _linear(
    x: Tensor,
    values: Tensor,
    pattern: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    return _backend(x).linear(x, values, Pattern(*pattern), bias, out_features, activation)


@torch.library.custom_op("sparse_lth::linear_grad_input", mutates_args=())
def _linear_grad_input(
    grad: Tensor, values: Tensor, pattern: Sequence[Tensor], in_features: int
) -> Tensor:
    return _backend(grad).linear_grad_input(grad, values, Pattern(*pattern), in_features)


@torch.library.custom_op("sparse_lth::sddmm", mutates_args=())
def _sddmm(grad: Tensor, x: Tensor, pattern: Sequence[Tensor], C: int, R: int) -> Tensor:
    return _backend(grad).sddmm(grad, x, Pattern(*pattern), (C, R))


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

    setup_context = staticmethod(_save)

    @staticmethod
    def forward(x, values, pattern, bias, out_features, activation):
        return _backend(x).linear(x, values, pattern, bias, out_features, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        _, linear_grad_input, sddmm = _backend(grad)
        dx, dvalues, dbias = _gradients(ctx, grad, linear_grad_input, sddmm)
        return dx, dvalues, None, dbias, None, None
