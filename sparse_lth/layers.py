"""SparseLinear, a linear layer that stores and computes only its kept blocks."""

import torch
from torch import Tensor, nn

from . import bsr
from .base import BlockSparse
from .kernels import any_autocast, backend, is_traced


class SparseLinear(BlockSparse):
    """`nn.Linear` with a block-sparse weight: x (..., in_features) -> (..., out_features).

    The constructor keeps `round(density * grid)` random blocks and initialises as `nn.Linear`
    does with the inputs that an output has on average; `from_dense` and `from_bsr` convert.
    `BlockSparse` says what it holds. Loading a `state_dict` takes its blocks too, and with
    `assign=True` fills a layer that was made on the meta device.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        blocksize: tuple[int, int] | int = (16, 16),
        density: float = 0.1,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_features, out_features, bias, blocksize, density, activation, device, dtype
        )

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        mask: Tensor | None = None,
        blocksize: tuple[int, int] | int = (16, 16),
    ) -> "SparseLinear":
        """The same function as `linear` under `mask`: keeps every block that holds a kept weight.

        mask: (out_features, in_features), nonzero = kept; what it prunes stays 0 in training.
        Without one, the `weight_mask` that `torch.nn.utils.prune` put there; without that, where
        the weight is not zero, and zeros inside a kept block may train.
        """
        layer = cls.empty(*linear.weight.shape[::-1], bsr.as_blocksize(blocksize))
        return layer._hold_dense(linear, mask)

    @classmethod
    def from_bsr(cls, weight, bias: Tensor | None = None) -> "SparseLinear":
        """A layer of a BSR or CSR (out_features, in_features) weight, of torch or scipy, in its
        blocks; ValueError for anything else. Both tensors are copied."""
        if getattr(weight, "format", None) in ("bsr", "csr"):
            weight = _from_scipy(weight)
        if not isinstance(weight, Tensor) or weight.layout not in (
            torch.sparse_bsr,
            torch.sparse_csr,
        ):
            raise ValueError(
                f"expected a BSR or CSR weight of torch or scipy, got "
                f"{getattr(weight, 'layout', type(weight).__name__)}"
            )
        weight = weight.detach()
        values = weight.values()  # (nnz, R, C) or (nnz,)
        values = values.mT if values.dim() == 3 else values.view(-1, 1, 1)
        indices = (t.to(torch.int32) for t in (weight.crow_indices(), weight.col_indices()))
        copied = None if bias is None else bias.detach().clone()
        values = values.clone(memory_format=torch.contiguous_format)
        layer = cls.empty(*weight.shape[::-1], bsr.blocksize_of(values))
        return layer._hold(values, *indices, copied)

    def to_bsr(self) -> Tensor:
        """The weight in torch's BSR layout; ValueError where the blocks do not divide it."""
        (R, C), shape = self.blocksize, (self.out_features, self.in_features)
        if shape[0] % R or shape[1] % C:
            raise ValueError(
                f"expected a blocksize that divides {shape}, as torch's BSR does, got {(R, C)}"
            )
        indices = (t.long() for t in (self.crow_indices, self.col_indices))
        values = self.masked_values().detach().mT.contiguous()
        return torch.sparse_bsr_tensor(*indices, values, shape, check_invariants=True)

    def to_scipy(self):
        """The weight as a `scipy.sparse.bsr_array`; ValueError as in `to_bsr`."""
        from scipy.sparse import bsr_array

        weight = self.to_bsr().cpu()
        parts = (t.numpy() for t in (weight.values(), weight.col_indices(), weight.crow_indices()))
        return bsr_array(tuple(parts), shape=tuple(weight.shape))

    @classmethod
    def empty(cls, in_features: int, out_features: int, blocksize: tuple[int, int]):
        """A layer without a block or a number, on the meta device."""
        return cls(in_features, out_features, False, blocksize, density=0.0, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features), in the weight's dtype unless under autocast -> (..., outputs)"""
        if not is_traced(x):
            chain = self._snapshot().chain
            if chain is not None and backend(x).chains and not self._needs_more(x):
                return chain(x)
        return self.product(x, self.bias, self.activation)

    def _needs_more(self, x: Tensor) -> bool:
        """Whether a call has to keep a graph, or to compute in another dtype."""
        if any_autocast():
            return True
        return torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, self.weight_values, self.bias)
        )

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same weight and bias; the activation is not part of it.

        ValueError where the tensors of the layer do not fit each other.
        """
        self._snapshot()  # which raises where the tensors do not fit
        bias = self.bias
        dense = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        dense.weight = nn.Parameter(self.shaped_weight().detach(), self.weight_values.requires_grad)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {super().extra_repr()}"


def _from_scipy(weight) -> Tensor:
    """scipy's BSR or CSR as torch's, its columns sorted and entries of one place added up."""
    weight = weight.copy()
    weight.sum_duplicates()
    parts = (torch.from_numpy(t) for t in (weight.indptr, weight.indices, weight.data))
    layout = torch.sparse_bsr if weight.format == "bsr" else torch.sparse_csr
    return torch.sparse_compressed_tensor(
        *parts, size=weight.shape, layout=layout, check_invariants=True
    )
