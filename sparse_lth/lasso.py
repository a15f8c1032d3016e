"""The group lasso of blocks: shrinks whole blocks to zero while a network trains."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .base import BlockSparse
from .masks import expand


class BlockLasso:
    """A proximal step of the group lasso (Yuan & Lin, 2006), taken after each step of an optimizer.

    Each block W_b, of n_b weights, is multiplied by max(0, 1 - lr * strength * sqrt(n_b) / ‖W_b‖),
    where lr is the optimizer's. A block that is 0 stays 0; padding counts neither in n_b nor in the
    norm. Weights that the optimizer does not step stay as they are.

    layers: names of linear or convolutional layers of the model, dense, masked or block-sparse
    blocksize: (R, C) of a layer that is not block-sparse; one that is has its own

    It is a hook, for one optimizer or for all:

        optimizer.register_step_post_hook(BlockLasso(model, ["fc1"], (16, 16), 0.05))
        torch.optim.optimizer.register_optimizer_step_post_hook(BlockLasso(...))

    A layer that is masked or converted later needs a new one. `stepped` says whether any of the
    weights were stepped so far.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[str], blocksize: tuple[int, int], strength: float
    ):
        self.blocksize, self.strength, self.stepped = blocksize, strength, False
        self._layers = {_parameter(m): m for m in map(model.get_submodule, layers)}
        self._limits = {}  # strength * sqrt(n_b) of each block, made where and when it is needed

    def __call__(self, optimizer: Optimizer, args: tuple = (), kwargs: dict | None = None) -> None:
        """Shrinks the blocks of the weights that this optimizer has just stepped."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._layers and parameter.grad is not None:
                    self._shrink(parameter, group["lr"])
                    self.stepped = True

    @torch.no_grad()
    def _shrink(self, parameter: nn.Parameter, lr: float | Tensor) -> None:
        sparse = isinstance(self._layers[parameter], BlockSparse)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if sparse:
            norms = torch.linalg.vector_norm(parameter, dim=(1, 2), dtype=wide)
        else:
            norms = _block_sums(parameter.to(wide).square().flatten(1), self.blocksize).sqrt_()
        limits = self._limits.get(parameter)
        if limits is None or limits.device != parameter.device:
            limits = self._limits[parameter] = self._make_limits(parameter).to(norms)
        norms.clamp_(min=torch.finfo(wide).tiny)  # a block that is 0 has no 0 / 0
        kept = (limits * lr).div_(norms).neg_().add_(1).clamp_(min=0)
        if sparse:
            parameter.mul_(kept[:, None, None])
        else:
            parameter.mul_(expand(kept, self.blocksize, parameter.shape))

    def _make_limits(self, parameter: nn.Parameter) -> Tensor:
        layer = self._layers[parameter]
        sparse = isinstance(layer, BlockSparse)
        shape, blocksize = parameter.shape, self.blocksize
        if sparse:
            shape, blocksize = layer.weight_shape, layer.blocksize
        ones = torch.ones(shape, dtype=torch.float64, device=parameter.device)
        sizes = _block_sums(ones.flatten(1), blocksize)
        if sparse:
            sizes = sizes[layer.pattern.row_indices.long(), layer.pattern.col_indices.long()]
        return self.strength * sizes.sqrt()


def _block_sums(matrix: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """-> (block_rows, block_cols). Adds up rows first, which reads memory as it lies: this runs
    after every step of a training."""
    (R, C), (rows, cols) = blocksize, matrix.shape
    whole = rows // R * R
    columns = matrix[:whole].view(whole // R, R, cols).sum(1)
    if whole < rows:
        columns = torch.cat([columns, matrix[whole:].sum(0, keepdim=True)])
    if cols % C:
        columns = F.pad(columns, (0, -cols % C))
    return columns.view(len(columns), -1, C).sum(2)


def _parameter(layer: nn.Module) -> nn.Parameter:
    """What an optimizer steps where the layer has its weight."""
    if isinstance(layer, BlockSparse):
        return layer.weight_values
    return layer.weight_orig if hasattr(layer, "weight_mask") else layer.weight
