"""SparseConv2d, a convolution that stores and computes only the kept blocks of its weight."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from . import base, bsr
from .base import BlockSparse
from .kernels import Weights, Window, conv2d, is_traced, max_pooled_conv2d, traced_conv2d
from .kernels.linear_native import NESTED

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class SparseConv2d(BlockSparse):
    """`nn.Conv2d` of groups=1 with a block-sparse (out_channels, in_channels * kernel) weight:
    x (batch, in_channels, height, width) -> (batch, out_channels, out_height, out_width).

    The constructor keeps `round(density * grid)` random blocks and initialises as `nn.Conv2d` does
    with the inputs that an output has on average; `from_dense` converts. `BlockSparse` says what it
    holds, and the arguments are those of `nn.Conv2d`. Outputs are in the memory format of x.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        blocksize: tuple[int, int] | int = (16, 1),
        density: float = 0.1,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        sizes = {name: _pair(size, name, 1) for name, size in sizes.items()}
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"expected padding_mode in {list(PADDING_MODES)}, got {padding_mode!r}"
            )
        if in_channels < 1 or out_channels < 1:
            raise ValueError(f"expected positive channels, got {in_channels} -> {out_channels}")
        height, width = sizes["kernel_size"]
        features = in_channels * height * width, out_channels
        super().__init__(*features, bias, blocksize, density, activation, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.padding_mode = padding_mode
        self.kernel_size, self.stride, self.dilation = sizes.values()
        self.padding = padding if isinstance(padding, str) else _pair(padding, "padding", 0)
        self.window = Window(self.kernel_size, self.stride, self._sides(), self.dilation)

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        mask: Tensor | None = None,
        blocksize: tuple[int, int] | int = (16, 1),
    ) -> "SparseConv2d":
        """The same function as `conv` under `mask`: keeps every block that holds a kept weight.

        mask: (out_channels, in_channels, height, width), nonzero = kept; what it prunes stays 0 in
        training. Without one, as `SparseLinear.from_dense`. ValueError for more than one group.
        """
        if conv.groups != 1:
            raise ValueError(f"expected a convolution of one group, got groups={conv.groups}")
        layer = cls.empty(conv, bsr.as_blocksize(blocksize))
        return layer._hold_dense(conv, mask).train(conv.training)

    @classmethod
    def empty(cls, conv: nn.Conv2d, blocksize: tuple[int, int]) -> "SparseConv2d":
        """A layer for the inputs of `conv`, without a block or a number, on the meta device."""
        return cls(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding),
            *(conv.dilation, False, conv.padding_mode, blocksize),
            density=0.0,
            device="meta",
        )

    def to_dense(self) -> nn.Conv2d:
        """An `nn.Conv2d` with the same weight and bias; the activation is not part of it."""
        dense = nn.Conv2d(
            *(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding),
            dilation=self.dilation,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
        )
        dense.weight = nn.Parameter(self.shaped_weight().detach(), self.weight_values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return dense.train(self.training)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, *self.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in_channels, height, width), or one image without the batch, in the weight's
        dtype unless under autocast -> (batch, out_channels, out_height, out_width)"""
        if isinstance(x, Proxy):  # of torch.fx, which has no shape yet
            return self._traced(*self._padded(x))
        if x.dim() == 3 and not x.is_nested:
            return self(x[None])[0]
        self._check(x)
        dtype = base._autocast_dtype(x)
        x, window = self._padded(x if dtype is None else x.to(dtype))
        if is_traced(x) or self._snapshot().pattern is None:
            return self._traced(x, window, dtype)
        with base._changing:  # tensors of one moment
            values, bias = self._operands(self.bias, dtype)
            weights = self._weights(values, bias)
        sizes = self.out_channels, window, self.activation
        return conv2d(x, values, weights.pattern, bias, *sizes, weights)

    def max_pooled(self, x: Tensor, relu: bool = False) -> Tensor:
        """`F.max_pool2d(y, 2)` of y = self(x), or of its ReLU; without gradients. One native call,
        unless the activation is gelu."""
        snapshot = self._snapshot()
        if self.activation == "gelu" or snapshot.pattern is None:
            y = self(x)
            return F.max_pool2d(y.relu() if relu else y, 2)
        self._check(x)
        x, window = self._padded(x)
        values, bias, *_, kept = snapshot.alive
        weights = Weights(values if kept is None else values * kept, snapshot.pattern, bias)
        activation = "relu" if relu else self.activation
        return max_pooled_conv2d(x, weights, self.out_channels, window, activation)

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        sizes += f", stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}"
        if self.padding_mode != "zeros":
            sizes += f", padding_mode={self.padding_mode}"
        return f"{sizes}, {super().extra_repr()}"

    def _traced(self, x: Tensor, window: Window, dtype: torch.dtype | None = None) -> Tensor:
        values, bias = self._operands(self.bias, dtype)
        weights = values, self.crow_indices, self.col_indices, bias, self.out_channels
        return traced_conv2d(x, *weights, window, self.activation)

    def _check(self, x: Tensor) -> None:
        if x.is_nested:
            raise ValueError(NESTED)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"expected (batch, {self.in_channels}, height, width) inputs, got {tuple(x.shape)}"
            )

    def _padded(self, x: Tensor) -> tuple[Tensor, Window]:
        """What the operation takes: x itself, unless zeros are not what it is padded with."""
        window = self.window
        if self.padding_mode != "zeros":
            x = F.pad(x, window.padding, self.padding_mode)
            window = window._replace(padding=(0, 0, 0, 0))
        return x, window

    def _sides(self) -> tuple[int, int, int, int]:
        """The padding: left, right, top, bottom"""
        if self.padding == "valid":
            return 0, 0, 0, 0
        if self.padding == "same":
            if self.stride != (1, 1):
                raise ValueError(f"expected stride 1 for padding='same', got {self.stride}")
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            top, left = (span // 2 for span in spans)
            return left, spans[1] - left, top, spans[0] - top
        if isinstance(self.padding, str):
            raise ValueError(f"expected padding in ['valid', 'same'] or ints, got {self.padding!r}")
        top, left = self.padding
        return left, left, top, top


def _pair(size: int | tuple[int, int], name: str, least: int) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(f"expected {name} of two ints of at least {least}, got {size!r}")
    return pair
