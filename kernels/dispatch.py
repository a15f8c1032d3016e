"""The one place that picks a backend."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from . import (
    conv2d_native,
    conv2d_torch,
    instruction_sets,
    linear_bf16,
    linear_int8,
    linear_native,
    linear_torch,
    sddmm_native,
    sddmm_torch,
)


class Backend(NamedTuple):
    """One implementation of each operation, with the signatures of the files `*_torch.py`."""

    name: str
    linear: Callable[..., Tensor]
    linear_grad_input: Callable[..., Tensor]
    sddmm: Callable[..., Tensor]
    conv2d: Callable[..., Tensor]
    conv2d_grad_input: Callable[..., Tensor]
    conv2d_grad_weight: Callable[..., Tensor]
    crossover: Callable[[int], float]  # block height R -> density up to which sparse is faster
    chains: bool = False  # whether several layers can run as one call
    pools: bool = False  # whether its conv2d takes pool=2


TORCH = Backend(
    "torch",
    linear_torch.linear,
    linear_torch.linear_grad_input,
    sddmm_torch.sddmm,
    conv2d_torch.conv2d,
    conv2d_torch.conv2d_grad_input,
    conv2d_torch.conv2d_grad_weight,
    crossover=lambda R: 0.0,
)
NATIVE = Backend(
    "native",
    linear_native.linear,
    linear_native.linear_grad_input,
    sddmm_native.sddmm,
    conv2d_native.conv2d,
    conv2d_native.conv2d_grad_input,
    conv2d_native.conv2d_grad_weight,
    # as measured on 784x300 and 1024x1024 layers at batch 1, 16 and 128: slower at none of them
    crossover=lambda R: (
        0.7 if R % 16 == 0 else 0.5 if R % 8 == 0 else 0.3 if R % 4 == 0 or R == 1 else 0.07
    ),
    chains=True,
    pools=True,
)
NATIVE_BF16 = TORCH._replace(
    name="native",
    linear=linear_bf16.linear,
    linear_grad_input=linear_bf16.linear_grad_input,
    sddmm=linear_bf16.sddmm,
    # by the times at 10 % of 1024x1024 layers at batch 128
    crossover=lambda R: 0.2 if R % 16 == 0 else 0.1,
    chains=True,
)
NATIVE_BY_DTYPE = {torch.float32: NATIVE, torch.bfloat16: NATIVE_BF16}
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_only: ContextVar[str | None] = ContextVar("only_backend", default=None)


def backend(x: Tensor) -> Backend:
    """The fastest backend for tensors of the device and dtype of x."""
    only = _only.get()
    if x.is_cpu and x.dtype in NATIVE_BY_DTYPE and linear_native.WHY_NOT is None:
        return NATIVE_BY_DTYPE[x.dtype] if only in (None, "native") else TORCH
    if x.is_cuda and x.dtype in TRITON_DTYPES and triton_why_not(x.device) is None:
        return _triton() if only in (None, "triton") else TORCH
    return TORCH


def backends() -> dict[str, str]:
    """What each backend can do here: "available", with its instruction set or GPU, or why not."""
    native = linear_native.WHY_NOT
    if native is None:
        without = linear_native.WHY_NO_CODE and f"; no machine code: {linear_native.WHY_NO_CODE}"
        native = f"available ({linear_native.INSTRUCTION_SETS[0]}{without})"
    triton = "torch sees no GPU"
    if torch.cuda.is_available():
        triton = triton_why_not(torch.device("cuda"))
        triton = triton or f"available ({torch.cuda.get_device_name()})"
    return {"triton": triton, "native": native, "torch": "available"}


@contextmanager
def use_backend(name: str, instruction_set: str | None = None) -> Iterator[None]:
    """Leaves only this backend, and torch for what it cannot do, in this thread and context.

    instruction_set: of the native kernels, one that this machine has of
        `instruction_sets.ORDER`; a type without kernels for it takes the next.
    Raises ValueError for a backend or an instruction set that is not there.
    """
    if not backends().get(name, "").startswith("available"):
        raise ValueError(f"expected an available backend, got {name!r}: {backends()}")
    types = linear_native, linear_bf16, linear_int8
    usable = {name for kernels in types for name in kernels.INSTRUCTION_SETS}
    if instruction_set is not None and instruction_set not in usable:
        known = [known for known in instruction_sets.ORDER if known in usable]
        raise ValueError(f"expected instruction_set in {known}, got {instruction_set!r}")
    chosen = instruction_sets.index_of(linear_native.INSTRUCTION_SETS, instruction_set)
    variables = {
        _only: name,
        linear_native.instruction_set: chosen,
        instruction_sets.chosen: instruction_set,
    }
    before = {variable: variable.set(value) for variable, value in variables.items()}
    try:
        yield
    finally:
        for variable, token in before.items():
            variable.reset(token)


@functools.cache
def triton_why_not(device: torch.device) -> str | None:
    """None where the Triton kernels run on this GPU."""
    if find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        return f"expected a GPU of compute capability 8.0 or newer, got {capability}"
    return None


@functools.cache
def _triton() -> Backend:
    """Imported at the first call on a GPU: triton takes a second."""
    from . import conv2d_triton, linear_triton, sddmm_triton

    return Backend(
        "triton",
        linear_triton.linear,
        linear_triton.linear_grad_input,
        sddmm_triton.sddmm,
        conv2d_triton.conv2d,
        conv2d_triton.conv2d_grad_input,
        conv2d_triton.conv2d_grad_weight,
        # as measured on an H200, 4096x4096 in bf16 at batch 4096: that of C = 16, and of R x R
        crossover=lambda R: (
            0.6 if R >= 128 else 0.38 if R >= 64 else 0.28 if R >= 32 else 0.08 if R >= 16 else 0.0
        ),
    )
