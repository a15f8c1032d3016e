"""The weight gradient at the kept blocks (SDDMM) on a GPU: kernel, then launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sddmm_torch, tiles
from .linear_triton import precision, reduce_parts, row_major
from .pattern import Pattern


@triton.jit(do_not_specialize=["batch", "block_rows"])
def _sddmm_kernel(
    grad_ptr,
    x_ptr,
    crow_ptr,
    col_ptr,
    order_ptr,
    dvalues_ptr,
    batch,
    in_features,
    out_features,
    grad_stride,
    x_stride,
    block_rows,
    numel,
    C: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program owns BLOCK_K rows x BLOCK_N columns of the (K, R) matrix of one block row.

    It sums over the batch in order, BLOCK_M rows at a time. With SPLITS > 1 it sums one part of
    the batch only, and dvalues is (SPLITS, numel). The grid covers full block rows; a program
    past the end of its row has nothing to do.
    """
    PARTS: tl.constexpr = (R + BLOCK_N - 1) // BLOCK_N
    rank = tl.program_id(0) % (block_rows * PARTS)
    k = tl.program_id(0) // (block_rows * PARTS) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    row = tl.load(order_ptr + rank // PARTS)
    first = tl.load(crow_ptr + row)
    K = (tl.load(crow_ptr + row + 1) - first) * C
    if tl.program_id(0) // (block_rows * PARTS) * BLOCK_K >= K:
        return

    r = rank % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    n = row * R + r
    inputs = tl.load(col_ptr + first + k // C, mask=k < K, other=0) * C + k % C
    kept = (k < K) & (inputs < tl.cdiv(in_features, 16) * 16)
    owned = n < tl.cdiv(out_features, 16) * 16
    if R % BLOCK_N != 0:
        owned = owned & (r < R)

    span = tl.cdiv(batch, SPLITS * BLOCK_M) * BLOCK_M
    begin = split * span
    end = tl.minimum(begin + span, batch)
    m = tl.arange(0, BLOCK_M)
    x_ptr += begin.to(tl.int64) * x_stride
    grad_ptr += begin.to(tl.int64) * grad_stride
    x_tile = inputs[:, None] + m[None, :] * x_stride
    grad_tile = m[:, None] * grad_stride + n[None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for m0 in range(begin, end, BLOCK_M):
        in_batch = m < end - m0
        x = tl.load(x_ptr + x_tile, mask=kept[:, None] & in_batch[None, :], other=0.0)
        grad = tl.load(grad_ptr + grad_tile, mask=in_batch[:, None] & owned[None, :], other=0.0)
        acc = tl.dot(x, grad, acc, input_precision=PRECISION)  # x: (BLOCK_K, BLOCK_M)
        x_ptr += BLOCK_M * x_stride
        grad_ptr += BLOCK_M * grad_stride

    weight = (inputs < in_features)[:, None] & (n < out_features)[None, :]
    acc = tl.where(weight, acc, 0.0)  # padding has no gradient
    dvalues_ptr += split.to(tl.int64) * numel + first.to(tl.int64) * (C * R)
    stored = (k < K)[:, None]
    if R % BLOCK_N != 0:
        stored = stored & (r < R)[None, :]
    dvalues = dvalues_ptr + (k[:, None] * R + r[None, :])
    tl.store(dvalues, acc.to(dvalues_ptr.dtype.element_ty), mask=stored)


def sddmm(grad: Tensor, x: Tensor, pattern: Pattern, block: tuple[int, int]) -> Tensor:
    """The kept blocks of grad.T @ x, transposed as `values` is; block: (C, R)

    grad: (batch, out_features); x: (batch, in_features) -> (nnz, C, R)
    """
    (batch, in_features), out_features, (C, R) = x.shape, grad.shape[1], block
    shape, grid = (pattern.col_indices.shape[0], C, R), pattern.grid
    launch = tiles.launch("sddmm", x.dtype, batch, shape, grid, x.device)
    if launch is None:
        return sddmm_torch.sddmm(grad, x, pattern, block)
    dvalues = x.new_empty(shape)
    if dvalues.numel() == 0:
        return dvalues
    programs, splits, constants = launch
    parts = dvalues
    if splits > 1:
        parts = x.new_empty(splits, *shape, dtype=torch.float32)
    grad, x = row_major(grad), row_major(x)
    with torch.cuda.device_of(x):
        _sddmm_kernel[programs, splits](
            grad,
            x,
            pattern.crow_indices,
            pattern.col_indices,
            pattern.row_order,
            parts,
            batch,
            in_features,
            out_features,
            grad.stride(0),
            x.stride(0),
            grid[0],
            dvalues.numel(),
            C,
            R,
            PRECISION=precision(x.dtype),
            SPLITS=splits,
            **constants,
        )
        if splits > 1:
            reduce_parts(parts, None, dvalues)
    return dvalues
