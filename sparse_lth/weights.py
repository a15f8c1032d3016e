"""A model's tensors by name, as if no mask were on it, and the layers of it that may be pruned."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from .base import BLOCKS, BlockSparse
from .bsr import grid_shape
from .masks import Masks

Tensors = dict[str, Tensor]
Filter = Callable[[nn.Module, str], bool]  # (layer, its name) -> whether it may be pruned
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolutional layers by name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}


def expect_model(model: nn.Module) -> None:
    """TypeError for anything but a module, ValueError for lazy layers that have no weights yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, an nn.Module, got {type(model).__name__}")
    lazy = [n for n, p in chain(model.named_parameters(), model.named_buffers()) if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"expected a model that has its weights, got lazy layers without ({', '.join(lazy)}): "
            "call it on a batch first"
        )


def weight_name(layer: str) -> str:
    """fc1 -> fc1.weight; a model that is itself a layer has the name "" """
    return f"{layer}.weight" if layer else "weight"


@dataclass(frozen=True)
class Prunable:
    """The layers that may be pruned, and those of their kinds that may not.

    weights: Parameters by layer name; a weight that several layers share is there once
    dense: why a layer stays dense, by layer name
    """

    weights: dict[str, nn.Parameter]
    dense: dict[str, str]

    def sizes(self) -> dict[str, int]:
        return {name: weight.numel() for name, weight in self.weights.items()}

    def masks(self) -> Masks:
        """Those of a dense model."""
        return {n: torch.ones(w.shape, dtype=torch.bool) for n, w in self.weights.items()}

    def expect_room(self, densities: Mapping[str, float], blocksize: tuple[int, int]) -> None:
        """Raises ValueError where a density leaves a layer without a block."""
        for name, density in densities.items():
            rows, cols = grid_shape(_matrix(self.weights[name]), blocksize)
            if round(density * rows * cols) == 0:
                raise ValueError(
                    f"expected to leave at least one of the {rows * cols} blocks of {name}, "
                    f"got a density of {density:.2g} there"
                )


def prunable(
    model: nn.Module, blocksize: tuple[int, int] = (1, 1), filter_fn: Filter | None = None
) -> Prunable:
    """The linear and convolutional layers that filter_fn lets through and a block fits into.

    A weight that an embedding, or a layer that stays dense, holds too is left alone. Raises
    ValueError where no layer is left.
    """
    holders = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[parameter].append((name, module))
    reasons = {n: _reason(m, n, blocksize, filter_fn) for n, m in weight_layers(model).items()}
    weights, dense, seen = {}, {}, set()
    for name, reason in reasons.items():
        weight = model.get_submodule(name)._parameters.get("weight")
        if weight in seen:
            continue
        shared = [n for n, _ in holders.get(weight, ()) if reasons.get(n, "another kind")]
        if reason or shared:
            dense[name] = reason or f"its weight is also that of {shared[0]}, which stays dense"
        else:
            weights[name] = weight
            seen.add(weight)
    if not weights:
        why = "; ".join(f"{name}: {reason}" for name, reason in dense.items())
        raise ValueError(f"expected a model with a layer to prune, got none: {why or 'no layers'}")
    return Prunable(weights, dense)


def _reason(
    layer: nn.Module, name: str, blocksize: tuple[int, int], filter_fn: Filter | None
) -> str:
    """Why the layer stays dense by itself; "" where it does not."""
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return "its weight is computed from other tensors, or is not floating-point"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it, so no mask would hold"
    if filter_fn and not filter_fn(layer, name):
        return "filter_fn leaves it out"
    matrix = _matrix(weight)
    if any(size < block for size, block in zip(matrix, blocksize, strict=True)):
        return f"expected blocks of at most {matrix} to fit {name}, got {tuple(blocksize)}"
    return ""


def _matrix(weight: Tensor) -> tuple[int, int]:
    """(out_channels, in_channels * kernel)"""
    return weight.shape[0], weight.shape[1:].numel()


def read(model: nn.Module) -> Tensors:
    """What the model computes with: parameters and buffers, pruned weights exactly 0.

    The names are those of the dense model without masks; a tensor that is shared is there once.
    Tensors are the live ones where nothing had to be computed.
    """
    tensors = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, BlockSparse) and leaf in BLOCKS:
            if leaf == "weight_values":
                tensors[weight_name(path)] = module.shaped_weight().detach()
        elif leaf.endswith("_orig") and hasattr(module, f"{leaf[:-5]}_mask"):
            kept = getattr(module, f"{leaf[:-5]}_mask") != 0
            tensors[name[:-5]] = torch.where(kept, tensor.detach(), 0)
        elif not (leaf.endswith("_mask") and hasattr(module, f"{leaf[:-5]}_orig")):
            tensors[name] = tensor.detach()
    return tensors


def snapshot(model: nn.Module) -> Tensors:
    """`read`, copied to the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in read(model).items()}


def masked(tensors: Tensors, masks: Masks) -> Tensors:
    """The tensors with the weights of these layers 0 where they are pruned."""
    weights = {weight_name(name): mask for name, mask in masks.items()}
    return tensors | {name: torch.where(m, tensors[name], 0) for name, m in weights.items()}


@torch.no_grad()
def write_(model: nn.Module, tensors: Tensors, masks: Masks) -> None:
    """Copies the tensors, named as `read` has them, into the model, and puts the masks on it.

    The model's Parameters stay the same objects, so an optimizer goes on with them. Masks are held
    by `torch.nn.utils.prune`, on every layer that shares the weight; an all-True one by nothing.
    """
    layers = weight_layers(model)
    for layer in layers.values():
        if hasattr(layer, "weight_mask"):
            prune.remove(layer, "weight")
    own = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    by_weight = {layers[name].weight: mask for name, mask in masks.items() if not mask.all()}
    for layer in layers.values():
        weight = layer._parameters.get("weight")
        if weight in by_weight:
            weight.masked_fill_(~by_weight[weight].to(weight.device), 0)  # no norm counts them
            prune.custom_from_mask(layer, "weight", by_weight[weight].to(weight.device))
