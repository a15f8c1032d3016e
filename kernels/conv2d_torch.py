"""The block-sparse convolution in plain torch: definition, fallback and reference."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sddmm_torch
from .linear_torch import ACTIVATIONS, to_dense
from .pattern import Pattern


class Window(NamedTuple):
    """How the kernel passes over an image; pairs are (vertical, horizontal)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, right, top, bottom, as F.pad has it
    dilation: tuple[int, int] = (1, 1)

    @property
    def size(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """ValueError where the kernel is larger than the padded image."""
        left, right, top, bottom = self.padding
        padded = height + top + bottom, width + left + right
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if padded[0] < spans[0] or padded[1] < spans[1]:
            raise ValueError(f"expected padded images of at least {spans}, got {list(padded)}")
        return tuple((p - s) // t + 1 for p, s, t in zip(padded, spans, self.stride, strict=True))


def memory_format(x: Tensor) -> torch.memory_format:
    """Of the outputs for x: channels-last where only that is dense, as torch has it."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def definition(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_channels: int,
    window: Window,
    activation: str = "none",
) -> Tensor:
    """activation(F.conv2d(x, weight, bias)), in operations that compile, export and vmap

    x: (batch, in_channels, height, width); values: (nnz, C, R), the blocks of an
    (out_channels, in_channels * kernel) weight; bias: (out_channels,)
    -> (batch, out_channels, out_height, out_width)
    """
    window.output_size(*x.shape[2:])  # ValueError where the kernel does not fit
    weight = _weight(values, crow_indices, col_indices, out_channels, x.shape[1], window)
    y = F.conv2d(_padded(x, window), weight, bias, window.stride, 0, window.dilation)
    return ACTIVATIONS[activation](y)


def conv2d(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    out_channels: int,
    window: Window,
    activation: str = "none",
) -> Tensor:
    """The same, of a checked pattern and in the memory format of x."""
    y = definition(x, values, *pattern[:2], bias, out_channels, window, activation)
    return y.contiguous(memory_format=memory_format(x))


def conv2d_grad_input(
    grad: Tensor, values: Tensor, pattern: Pattern, shape: torch.Size, window: Window
) -> Tensor:
    """grad: (batch, out_channels, out_height, out_width) -> (batch, in_channels, height, width) =
    shape, in the memory format of grad"""
    (batch, channels, height, width), (left, right, top, bottom) = shape, window.padding
    padded = batch, channels, height + top + bottom, width + left + right
    weight = _weight(values, *pattern[:2], grad.shape[1], channels, window)
    dx = torch.nn.grad.conv2d_input(padded, weight, grad, window.stride, 0, window.dilation)
    dx = dx[:, :, top : top + height, left : left + width]
    return dx.contiguous(memory_format=memory_format(grad))


def conv2d_grad_weight(
    grad: Tensor, x: Tensor, pattern: Pattern, block: tuple[int, int], window: Window
) -> Tensor:
    """The kept blocks of the weight's gradient, transposed as `values` is; block: (C, R)

    grad: (batch, out_channels, out_height, out_width); x: (batch, in_channels, height, width)
    -> (nnz, C, R)
    """
    shape, x = (grad.shape[1], x.shape[1], *window.kernel_size), _padded(x, window)
    dense = torch.nn.grad.conv2d_weight(x, shape, grad, window.stride, 0, window.dilation)
    return sddmm_torch.kept_blocks(dense.flatten(1), pattern, block)


def _weight(values, crow_indices, col_indices, out_channels, channels, window) -> Tensor:
    """(out_channels, channels, kernel_height, kernel_width)"""
    shape = out_channels, channels * window.size
    weight = to_dense(values, crow_indices, col_indices, shape)
    return weight.reshape(out_channels, channels, *window.kernel_size)


def _padded(x: Tensor, window: Window) -> Tensor:
    return F.pad(x, window.padding) if any(window.padding) else x
