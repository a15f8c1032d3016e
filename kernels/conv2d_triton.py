"""The block-sparse convolution on a GPU, by the products of the linear layer: a part of the batch
is unfolded, each output pixel a row of (in_channels * kernel) inputs, and multiplied."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv2d_torch import Window, memory_format
from .linear_triton import linear, linear_grad_input
from .pattern import Pattern
from .sddmm_triton import sddmm

UNFOLDED = 1 << 25  # numbers unfolded at a time, to bound memory: 64 MB in 16 bits


def conv2d(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    out_channels: int,
    window: Window,
    activation: str = "none",
) -> Tensor:
    """activation(F.conv2d(x, weight, bias)), in the memory format of x

    x: (batch, in_channels, height, width); values: (nnz, C, R); bias: (out_channels,)
    -> (batch, out_channels, out_height, out_width)
    """
    height, width = window.output_size(*x.shape[2:])
    y = x.new_empty(len(x), height, width, out_channels)
    for part, to in _parts(window, x, y):
        rows = linear(_unfold(part, window), values, pattern, bias, out_channels, activation)
        to.copy_(rows.view(to.shape))
    return y.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x))


def conv2d_grad_input(
    grad: Tensor, values: Tensor, pattern: Pattern, shape: torch.Size, window: Window
) -> Tensor:
    """grad: (batch, out_channels, out_height, out_width) -> (batch, in_channels, height, width) =
    shape, in the memory format of grad"""
    layout = memory_format(grad)
    dx = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    for to, part in _parts(window, dx, grad):
        rows = linear_grad_input(_rows(part), values, pattern, shape[1] * window.size)
        to.copy_(_fold(rows, to.shape, window))
    return dx


def conv2d_grad_weight(
    grad: Tensor, x: Tensor, pattern: Pattern, block: tuple[int, int], window: Window
) -> Tensor:
    """The kept blocks of the weight's gradient, transposed as `values` is; block: (C, R)

    grad: (batch, out_channels, out_height, out_width); x: (batch, in_channels, height, width)
    -> (nnz, C, R)
    """
    dvalues = torch.zeros(len(pattern.col_indices), *block, device=x.device)  # a sum in fp32
    for part, of_grad in _parts(window, x, grad):
        dvalues += sddmm(_rows(of_grad), _unfold(part, window), pattern, block)
    return dvalues.to(x.dtype)


def _parts(window: Window, x: Tensor, y: Tensor):
    """(part of x, part of y), images in order, as many at a time as UNFOLDED lets."""
    height, width = window.output_size(*x.shape[2:])
    images = max(1, UNFOLDED // (height * width * x.shape[1] * window.size))
    return zip(x.split(images), y.split(images), strict=True) if len(x) else ()


def _is_pointwise(window: Window) -> bool:
    return window == Window((1, 1), dilation=window.dilation)


def _rows(x: Tensor) -> Tensor:
    """(images, channels, height, width) -> (images * height * width, channels)"""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _unfold(x: Tensor, window: Window) -> Tensor:
    """-> (images * out_height * out_width, channels * kernel)"""
    if _is_pointwise(window):
        return _rows(x)
    x, (kernel_size, stride, _, dilation) = F.pad(x, window.padding), window
    return F.unfold(x, kernel_size, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


def _fold(rows: Tensor, shape: torch.Size, window: Window) -> Tensor:
    """The transpose of `_unfold`: to images of `shape`, where pixels meet they are added."""
    images, channels, height, width = shape
    if _is_pointwise(window):
        return rows.view(images, height, width, channels).permute(0, 3, 1, 2)
    kernel_size, stride, (left, right, top, bottom), dilation = window
    columns = rows.view(images, -1, rows.shape[1]).transpose(1, 2)
    padded = height + top + bottom, width + left + right
    dx = F.fold(columns, padded, kernel_size, dilation, 0, stride)
    return dx[:, :, top : top + height, left : left + width]
