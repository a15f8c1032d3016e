"""The block-sparse linear layer on a GPU: kernels, then launchers.

The blocks of a block row lie one after the other in `values`, so together they are a contiguous
(K, R) matrix, K = C * blocks of the row; its row k meets input col[k // C] * C + k % C. A program
walks that matrix in steps of BLOCK_K rows, whatever C is, and looks up the columns of a step while
the step before it is computed.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import linear_torch, tiles
from .pattern import Pattern


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    return y


@triton.jit(do_not_specialize=["batch", "block_rows"])
def _linear_kernel(
    x_ptr,
    values_ptr,
    crow_ptr,
    col_ptr,
    order_ptr,
    bias_ptr,
    y_ptr,
    batch,
    in_features,
    out_features,
    x_stride,
    block_rows,
    C: tl.constexpr,
    R: tl.constexpr,
    RAGGED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program owns BLOCK_M rows of y x BLOCK_N outputs of one block row.

    With SPLITS > 1 it sums one part of the inputs only, and y is (SPLITS, batch, out_features).
    """
    PARTS: tl.constexpr = (R + BLOCK_N - 1) // BLOCK_N
    rank = tl.program_id(0) % (block_rows * PARTS)
    m0 = tl.program_id(0) // (block_rows * PARTS) * BLOCK_M
    split = tl.program_id(1)
    row = tl.load(order_ptr + rank // PARTS)
    first = tl.load(crow_ptr + row)
    K = (tl.load(crow_ptr + row + 1) - first) * C
    span = tl.cdiv(K, SPLITS * BLOCK_K) * BLOCK_K
    begin = split * span
    end = tl.minimum(begin + span, K)

    m = tl.arange(0, BLOCK_M)
    r = rank % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += m0.to(tl.int64) * x_stride
    values_ptr += first.to(tl.int64) * (C * R)
    col_ptr += first
    x_rows = (x_ptr + m * x_stride)[:, None]
    x_width = tl.cdiv(in_features, 16) * 16
    in_batch = (m < batch - m0)[:, None]

    k = begin + tl.arange(0, BLOCK_K)
    col = tl.load(col_ptr + k // C, mask=k < end, other=0)
    if BLOCK_M == 1:
        acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(begin, end, BLOCK_K):
        inputs = col * C + k % C
        stored = (k < end)[:, None]
        if RAGGED:
            stored = stored & (inputs < in_features)[:, None]
        if R % BLOCK_N != 0:
            stored = stored & (r < R)[None, :]
        w = tl.load(values_ptr + (k[:, None] * R + r[None, :]), mask=stored, other=0.0)
        kept = (k < end) & (inputs < x_width)
        if BLOCK_M == 1:
            x = tl.load(x_ptr + inputs, mask=kept, other=0.0)  # (BLOCK_K,)
            acc += x.to(tl.float32)[:, None] * w.to(tl.float32)
        else:
            x = tl.load(x_rows + inputs[None, :], mask=in_batch & kept[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        k += BLOCK_K
        col = tl.load(col_ptr + k // C, mask=k < end, other=0)
    if BLOCK_M == 1:
        acc = tl.sum(acc, 0)[None, :]

    n = row * R + r
    owned = n < out_features
    if R % BLOCK_N != 0:
        owned = owned & (r < R)
    if SPLITS == 1:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=owned, other=0.0).to(tl.float32)[None, :]
        acc = _activate(acc, ACTIVATION)
    y_ptr += (split.to(tl.int64) * batch + m0) * out_features
    y = y_ptr + m[:, None] * out_features + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=in_batch & owned[None, :])


@triton.jit(do_not_specialize=["numel", "out_features"])
def _reduce_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    numel,
    out_features,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK elements of y and sums their SPLITS parts in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts_ptr + split * numel.to(tl.int64) + i, mask=inside, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + i % out_features, mask=inside, other=0.0).to(tl.float32)
    y = _activate(acc, ACTIVATION)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "block_cols"])
def _grad_input_kernel(
    grad_ptr,
    values_ptr,
    ccol_ptr,
    t_row_ptr,
    t_slot_ptr,
    order_ptr,
    dx_ptr,
    batch,
    in_features,
    out_features,
    grad_stride,
    block_cols,
    C: tl.constexpr,
    R: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_M rows of dx x BLOCK_N inputs of one block column.

    Its k runs over the R outputs of each block of the column, found by the transposed index.
    """
    PARTS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    rank = tl.program_id(0) % (block_cols * PARTS)
    m0 = tl.program_id(0) // (block_cols * PARTS) * BLOCK_M
    column = tl.load(order_ptr + rank // PARTS)
    first = tl.load(ccol_ptr + column)
    K = (tl.load(ccol_ptr + column + 1) - first) * R

    m = tl.arange(0, BLOCK_M)
    c = rank % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_ptr += m0.to(tl.int64) * grad_stride
    t_row_ptr += first
    t_slot_ptr += first
    grad_rows = (grad_ptr + m * grad_stride)[:, None]
    grad_width = tl.cdiv(out_features, 16) * 16
    in_batch = (m < batch - m0)[:, None]

    k = tl.arange(0, BLOCK_K)
    row = tl.load(t_row_ptr + k // R, mask=k < K, other=0)
    slot = tl.load(t_slot_ptr + k // R, mask=k < K, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        outputs = row * R + k % R
        stored = (k < K)[None, :]
        if RAGGED:
            stored = stored & (outputs < out_features)[None, :]
        if C % BLOCK_N != 0:
            stored = stored & (c < C)[:, None]
        block = values_ptr + slot.to(tl.int64) * (C * R) + k % R
        w = tl.load(block[None, :] + c[:, None] * R, mask=stored, other=0.0)  # (BLOCK_N, BLOCK_K)
        kept = (k < K) & (outputs < grad_width)
        grad = tl.load(grad_rows + outputs[None, :], mask=in_batch & kept[None, :], other=0.0)
        k += BLOCK_K
        row = tl.load(t_row_ptr + k // R, mask=k < K, other=0)
        slot = tl.load(t_slot_ptr + k // R, mask=k < K, other=0)
        acc = tl.dot(grad, tl.trans(w), acc, input_precision=PRECISION)

    i = column * C + c
    owned = i < in_features
    if C % BLOCK_N != 0:
        owned = owned & (c < C)
    dx = dx_ptr + m0.to(tl.int64) * in_features + m[:, None] * in_features + i[None, :]
    tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=in_batch & owned[None, :])


@triton.jit(do_not_specialize=["numel", "out_features", "in_features"])
def _to_dense_kernel(
    values_ptr,
    row_ptr,
    col_ptr,
    weight_ptr,
    numel,
    out_features,
    in_features,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK kept weights, ordered by block, output and input, and stores them."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot, r, c = i // (C * R), i // C % R, i % C
    stored = i < numel
    n = tl.load(row_ptr + slot, mask=stored, other=0).to(tl.int64) * R + r
    inputs = tl.load(col_ptr + slot, mask=stored, other=0).to(tl.int64) * C + c
    value = tl.load(values_ptr + slot * (C * R) + c * R + r, mask=stored)
    stored = stored & (n < out_features) & (inputs < in_features)  # not the padding
    tl.store(weight_ptr + n * in_features + inputs, value, mask=stored)


def linear(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(x @ weight.T + bias)

    x: (batch, in_features); values: (nnz, C, R); bias: (out_features,) -> (batch, out_features)
    """
    (batch, in_features), (_, C, R), grid = x.shape, values.shape, pattern.grid
    launch = tiles.launch("linear", x.dtype, batch, values.shape, grid, x.device, activation)
    if launch is None:
        weight = to_dense(values, pattern, (out_features, in_features))
        return linear_torch.ACTIVATIONS[activation](F.linear(x, weight, bias))
    y = x.new_empty(batch, out_features)
    if batch == 0:
        return y
    programs, splits, constants = launch
    parts = y if splits == 1 else x.new_empty(splits, batch, out_features, dtype=torch.float32)
    x, bias = row_major(x), None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        _linear_kernel[programs, splits](
            x,
            values.contiguous(),
            pattern.crow_indices,
            pattern.col_indices,
            pattern.row_order,
            bias,
            parts,
            batch,
            in_features,
            out_features,
            x.stride(0),
            grid[0],
            C,
            R,
            RAGGED=in_features % C != 0,
            ACTIVATION=activation,
            PRECISION=precision(x.dtype),
            SPLITS=splits,
            **constants,
        )
        if splits > 1:
            reduce_parts(parts, bias, y, activation)
    return y


def linear_grad_input(grad: Tensor, values: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """grad @ weight; grad: (batch, out_features) -> (batch, in_features)"""
    (batch, out_features), (_, C, R), grid = grad.shape, values.shape, pattern.grid
    launch = tiles.launch("grad_input", grad.dtype, batch, values.shape, grid, grad.device)
    if launch is None:
        return grad @ to_dense(values, pattern, (out_features, in_features))
    dx = grad.new_empty(batch, in_features)
    if batch == 0:
        return dx
    grad = row_major(grad)
    with torch.cuda.device_of(grad):
        _grad_input_kernel[(launch.programs,)](
            grad,
            values.contiguous(),
            pattern.ccol_indices,
            pattern.t_row_indices,
            pattern.t_slots,
            pattern.col_order,
            dx,
            batch,
            in_features,
            out_features,
            grad.stride(0),
            grid[1],
            C,
            R,
            RAGGED=out_features % R != 0,
            PRECISION=precision(grad.dtype),
            **launch.constants,
        )
    return dx


def to_dense(values: Tensor, pattern: Pattern, shape: tuple[int, int]) -> Tensor:
    """values: (nnz, C, R) -> (out_features, in_features) = shape, zero where no block is kept"""
    weight, (_, C, R), block = values.new_zeros(shape), values.shape, 1024
    if values.numel():
        with torch.cuda.device_of(values):
            _to_dense_kernel[(triton.cdiv(values.numel(), block),)](
                values.contiguous(),
                pattern.row_indices,
                pattern.col_indices,
                weight,
                values.numel(),
                *shape,
                C,
                R,
                BLOCK=block,
            )
    return weight


def reduce_parts(parts: Tensor, bias: Tensor | None, y: Tensor, activation: str = "none") -> None:
    """y = activation(parts.sum(0) + bias); parts: (splits, *y.shape) in fp32"""
    block = 1024
    _reduce_kernel[(triton.cdiv(y.numel(), block),)](
        parts,
        bias,
        y,
        y.numel(),
        y.shape[-1],
        ACTIVATION=activation,
        SPLITS=len(parts),
        BLOCK=block,
        enable_fp_fusion=True,
    )


def row_major(x: Tensor) -> Tensor:
    """x as the kernels want it, a copy if need be: rows contiguous, 16 numbers a multiple of
    their width and of their distance, zeros where there were none."""
    width, (distance, step) = x.shape[1], x.stride()
    aligned = (width | distance | x.data_ptr()) % 16 == 0
    if aligned and step == 1 and distance <= tiles.LONGEST_ROW:
        return x
    if width % 16:
        return F.pad(x, (0, -width % 16)).contiguous()
    return x.clone(memory_format=torch.contiguous_format)


_MATMUL = torch.backends.cuda.matmul
_SETTING = "fp32_precision" if hasattr(_MATMUL, "fp32_precision") else "allow_tf32"  # torch 2.9


def precision(dtype: torch.dtype) -> str:
    """TF32 for fp32 only where torch allows it."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if getattr(_MATMUL, _SETTING) in ("tf32", True) else "ieee"
