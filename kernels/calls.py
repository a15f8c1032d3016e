"""Who sees a call: the operators that compilers and transforms get, or the kernels themselves."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .pattern import Pattern


class Weights(NamedTuple):
    """What a call computes with: tensors that belong together, and no part of a graph."""

    values: Tensor  # (nnz, C, R)
    pattern: Pattern
    bias: Tensor | None  # (out_features,)


# They have no public name; a torch without them pays for the op, or the definition, in every call.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)
jit_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)
any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler, tracer, transform or mode wants to see an op. Eager code does without: a
    registered op takes several us to call, and its autograd 100 us, more than a small layer."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or jit_tracing()
        or _modes() > 0
        or _transform() is not None
        or getattr(forward_ad, "_current_level", 0) >= 0
    )


def is_transformed() -> bool:
    """Whether under vmap, jvp, grad or forward-mode AD. They have no rules for a registered op,
    and jvp drops its tangents without a word, but see through the definition in plain torch."""
    return _transform() is not None or getattr(forward_ad, "_current_level", 0) >= 0


def plain(x: Tensor) -> Tensor:
    """x as its memory says: no negation that is still to be done, no zeros without memory."""
    if x.layout is not torch.strided or x.is_nested:
        raise ValueError(f"expected a dense (strided) tensor, got {x.layout}, nested={x.is_nested}")
    return x.clone() if x._is_zerotensor() else x.resolve_neg()


def grid_of(out_features: int, in_features: int, block: tuple[int, int]) -> tuple[int, int]:
    """(block_rows, block_cols) of blocks (C, R)"""
    C, R = block
    return -(-out_features // R), -(-in_features // C)


def kept_weights(
    shape: tuple[int, int], block: tuple[int, int], crow_indices: Tensor, col_indices: Tensor
) -> int:
    """How many weights of an (out_features, in_features) matrix its blocks (C, R) hold; padding
    counts only where the indices have no numbers."""
    (outputs, inputs), (C, R), nnz = shape, block, len(col_indices)
    kept = nnz * C * R
    if nnz and type(col_indices) is Tensor and not col_indices.is_meta:
        below, beside = -outputs % R, -inputs % C  # the padding of the last block row and column
        in_last_row = int(crow_indices[-1] - crow_indices[-2])
        in_last_column = col_indices == -(-inputs // C) - 1
        corner = in_last_row > 0 and bool(in_last_column[-1])
        kept -= in_last_row * below * C + int(in_last_column.sum()) * beside * R
        kept += corner * below * beside
    return kept
