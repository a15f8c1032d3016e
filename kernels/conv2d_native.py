"""The block-sparse convolution on native CPU kernels, for float32."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv2d_torch import Window, memory_format
from .linear_native import _native, instruction_set
from .pattern import Pattern


def conv2d(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    out_channels: int,
    window: Window,
    activation: str = "none",
    pool: int = 1,
) -> Tensor:
    """activation(F.conv2d(x, weight, bias)), in the memory format of x

    x: (batch, in_channels, height, width); values: (nnz, C, R); bias: (out_channels,)
    pool: 1, or 2 for the maxima of each 2 x 2 outputs, as `F.max_pool2d` has them
    -> (batch, out_channels, out_height // pool, out_width // pool)
    """
    layout = memory_format(x)
    x, values = x.contiguous(memory_format=layout), values.contiguous()
    bias = None if bias is None else bias.contiguous()
    height, width = _output_size(window, *x.shape[2:])
    size = x.shape[0], out_channels, height // pool, width // pool
    if 0 in size[2:]:
        raise ValueError(f"expected outputs of at least 2 x 2 to pool, got {height} x {width}")
    y = torch.empty(size, dtype=x.dtype, memory_format=layout)
    if y.numel():
        _native.conv_forward(
            *_shape(x, (out_channels, height, width), values.shape, window, layout),
            *(x.data_ptr(), y.data_ptr()),
            *(values.data_ptr(), 0 if bias is None else bias.data_ptr()),
            *(pattern.crow_indices.data_ptr(), pattern.col_indices.data_ptr()),
            *(activation == "relu", pool),
        )
    return F.gelu(y) if activation == "gelu" else y


def conv2d_grad_input(
    grad: Tensor, values: Tensor, pattern: Pattern, shape: torch.Size, window: Window
) -> Tensor:
    """grad: (batch, out_channels, out_height, out_width) -> (batch, in_channels, height, width) =
    shape, in the memory format of grad"""
    layout = memory_format(grad)
    grad, values = grad.contiguous(memory_format=layout), values.contiguous()
    dx = torch.empty(shape, dtype=grad.dtype, memory_format=layout)
    if window.stride != (1, 1):  # which may pass over some pixels
        dx.zero_()
    if dx.numel():
        _native.conv_grad_input(
            *_shape(dx, grad.shape[1:], values.shape, window, layout),
            *(grad.data_ptr(), dx.data_ptr(), pattern.t_slots.data_ptr(), values.data_ptr()),
            *(pattern.ccol_indices.data_ptr(), pattern.t_row_indices.data_ptr()),
        )
    return dx


def conv2d_grad_weight(
    grad: Tensor, x: Tensor, pattern: Pattern, block: tuple[int, int], window: Window
) -> Tensor:
    """The kept blocks of the weight's gradient, transposed as `values` is; block: (C, R)

    grad: (batch, out_channels, out_height, out_width); x: (batch, in_channels, height, width)
    -> (nnz, C, R)
    """
    layout = memory_format(x)
    x, grad = (t.contiguous(memory_format=layout) for t in (x, grad))
    shape = (len(pattern.col_indices), *block)
    dvalues = x.new_zeros(shape)
    if dvalues.numel() and x.numel():
        _native.conv_grad_weight(
            *_shape(x, grad.shape[1:], shape, window, layout),
            *(grad.data_ptr(), x.data_ptr(), dvalues.data_ptr()),
            *(pattern.crow_indices.data_ptr(), pattern.col_indices.data_ptr()),
        )
    return dvalues


_output_size = lru_cache(Window.output_size)


def _shape(x: Tensor, outputs: tuple, values: torch.Size, window: Window, layout) -> tuple:
    """The first ints of every call; outputs: (out_channels, out_height, out_width)"""
    (_, C, R), (left, _, top, _) = values, window.padding
    return (
        *(instruction_set.get(), torch.get_num_threads(), layout == torch.channels_last),
        *(*x.shape, *outputs),
        *(*window.kernel_size, *window.stride, *window.dilation, top, left, R, C),
    )
