"""sparsify_: the pruned layers of any model made block-sparse, with a word on each that is left."""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize, prune

from . import bsr
from .base import BlockSparse
from .conv import SparseConv2d
from .huggingface import is_conv1d, refuse_from_pretrained
from .kernels import backend
from .layers import SparseLinear
from .sequential import SparseSequential
from .weights import expect_model

SMALLER = ((16, 16), (16, 4), (16, 1), (8, 8), (8, 1), (4, 4), (1, 1))  # to suggest, best first


class Row(NamedTuple):
    """What became of one layer."""

    name: str
    layer: str  # its class before
    shape: tuple[int, ...]  # (out_features, in_features), of a convolution (channels, c * kernel)
    density: float | None  # stored / all weights; None where it was left
    reason: str  # why it was left; "" where it was converted


@dataclass(frozen=True)
class Conversion:
    """What `sparsify_` did with each layer of a model that it could convert; printed, a table."""

    rows: tuple[Row, ...]

    @property
    def converted(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.reason)

    @property
    def left(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.reason)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"{len(self.converted)} of {len(self.rows)} layers are block-sparse"]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            what = f"left dense: {row.reason}" if row.reason else f"density {row.density:.4f}"
            lines.append(f"{row.name:{width}}  {row.layer} {shape}  {what}")
        return "\n".join(lines)


_conversions = weakref.WeakKeyDictionary()  # model -> Conversion


def conversion(model: nn.Module) -> Conversion:
    """What the last `sparsify_` of this model did; KeyError if there was none."""
    return _conversions[model]


def sparsify_(
    model: nn.Module,
    blocksize: tuple[int, int] | int = (16, 16),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    max_density: float | None = None,
) -> nn.Module:
    """Replaces, in place, the pruned linear layers of a model by `SparseLinear`, and its pruned
    convolutions by `SparseConv2d`.

    A layer is pruned where `torch.nn.utils.prune` masks it, and what is masked stays 0 in training,
    or where its weight has zeros. It is converted if one of its blocks is empty and at most the
    fraction `max_density` of them is not: by default, the density up to which a sparse layer is
    the faster one on its device and in its dtype; 1.0 converts all that have an empty block.
    `nn.Linear`, `nn.Conv2d` of one group and Hugging Face's `Conv1D` are converted, other classes
    are left. An `nn.Sequential` that holds a converted layer becomes a `SparseSequential`, which
    is one that runs its layers in one call where it can.

    Hooks, flags, attributes, the bias and tied weights are kept. All of the layers are replaced, or
    none and an error. filter_fn(module, name) says which may be, by default all. Returns `model`,
    or the new layer if `model` itself is one; `conversion(model)` says what became of each layer,
    and a warning where none was converted. Make optimizers after it: it makes new Parameters.
    """
    expect_model(model)
    blocksize = bsr.as_blocksize(blocksize)
    layers = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if is_weighted(m)]
    owners, reasons, made = _owners(model), {}, {}
    for name, layer in layers:
        if filter_fn is not None and not filter_fn(layer, name):
            reasons[layer] = "filter_fn says no"
        elif layer not in reasons:
            parent = model.get_submodule(name.rpartition(".")[0])
            reasons[layer] = _why_left(layer, parent, blocksize, max_density)
    alone = dict(reasons)
    for layer, reason in alone.items():
        reasons[layer] = reason or _why_tied(layer, owners, alone)
    for layer, reason in reasons.items():
        if not reason:
            twins = (made.get(owner) for owner in owners[_parameter(layer)])
            made[layer] = _convert(layer, blocksize, next(filter(None, twins), None))
    replace(model, made)
    refuse_from_pretrained(model)
    rows = tuple(_row(name, layer, made.get(layer), reasons[layer]) for name, layer in layers)
    result = made.get(model, model)
    _conversions[result] = Conversion(rows)
    if not made:
        common = Counter(row.reason for row in rows).most_common(1)
        why = common[0][0] if common else "it has no linear layer or convolution"
        warn(f"sparsify_ converted no layer of {type(model).__name__}: {why}", stacklevel=2)
    return result


def replace(model: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    """Puts each new layer wherever the old one stands, with all that the old one carries."""
    for old, new in made.items():
        _carry(old, new)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
                if type(parent) is nn.Sequential:
                    parent.__class__ = SparseSequential
    for new in made.values():  # last, since the old layer has the same hooks
        own_hooks(new)
        for key, hook in list(new._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
                del new._forward_pre_hooks[key]  # it made the dense weight


def own_hooks(module: nn.Module) -> None:
    """Has the hooks that are given their module given this one."""
    for hook in module._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(module)


def is_weighted(layer: nn.Module | None) -> bool:
    """Whether it is of a kind that might be converted."""
    return isinstance(layer, nn.Linear | _ConvNd) or is_conv1d(layer)


def empty(layer: nn.Module, blocksize: tuple[int, int]) -> BlockSparse:
    """What takes the place of the layer, without a block or a number."""
    if isinstance(layer, nn.Conv2d):
        return SparseConv2d.empty(layer, blocksize)
    shape = matrix(layer, _parameter(layer)).shape
    return SparseLinear.empty(*shape[::-1], blocksize)


def _is_pruned(layer: nn.Module) -> bool:
    return "weight_orig" in layer._parameters and "weight_mask" in layer._buffers


def _parameter(layer: nn.Module) -> Tensor | None:
    """What an optimizer trains of the weight."""
    return layer._parameters.get("weight_orig" if _is_pruned(layer) else "weight")


def matrix(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape as (out_features, in_features)."""
    return tensor.t() if is_conv1d(layer) else tensor.flatten(1)


def _mask(layer: nn.Module) -> Tensor:
    """(out_features, in_features), True where kept: by torch's prune, or where it is not zero."""
    mask = layer.weight_mask if _is_pruned(layer) else layer.weight
    return matrix(layer, mask.detach() != 0)


def _owners(model: nn.Module) -> dict[Tensor, list[nn.Module]]:
    """The modules that hold each Parameter."""
    owners = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(module)
    return owners


def _why_left(
    layer: nn.Module,
    parent: nn.Module,
    blocksize: tuple[int, int],
    max_density: float | None,
) -> str:
    """Why a layer stays dense for what it is itself; "" if it can be converted."""
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads the weight of out_proj and never calls the layer"
    if parametrize.is_parametrized(layer):
        return "it is parametrized: remove_parametrizations first"
    if type(layer) not in (nn.Linear, nn.Conv2d) and not is_conv1d(layer):
        return f"{type(layer).__name__} is neither nn.Linear nor nn.Conv2d itself"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"it is a convolution of {layer.groups} groups"
    if "forward" in vars(layer):
        return "its forward was replaced"
    weight = _parameter(layer)
    if weight is None or "bias" not in layer._parameters:
        return "a hook computes its weight or bias: remove that (weight_norm, prune, ...) first"
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "a hook is registered on its weight"
    if clash := sorted(_added(layer) & _OWN_NAMES):
        return f"it has attributes that mean something else on a sparse layer: {', '.join(clash)}"
    if weight.is_meta:
        return "its weight has no numbers (meta device)"
    if weight.numel() == 0:
        return "its weight is empty"
    mask = _mask(layer)
    if not mask.any() and not _is_pruned(layer):
        return "its weight is all zero without a mask, as a new head or adapter is"
    return _why_not_faster(mask, weight, blocksize, max_density)


def _why_not_faster(
    mask: Tensor, weight: Tensor, blocksize: tuple[int, int], max_density: float | None
) -> str:
    chosen = backend(weight)

    def kept(blocksize: tuple[int, int]) -> float:
        return float(bsr.blocks_of(mask, blocksize).any((2, 3)).double().mean())

    def pays(blocksize: tuple[int, int]) -> bool:
        limit = chosen.crossover(blocksize[0]) if max_density is None else max_density
        return kept(blocksize) < 1 and kept(blocksize) <= limit

    if pays(blocksize):
        return ""
    R, C = blocksize
    if max_density is None and chosen.crossover(R) == 0:
        return (
            f"no kernel for {weight.dtype} on this {weight.device.type} is faster than dense; "
            f"max_density=1.0 converts all the same"
        )
    why = f"{kept(blocksize):.4g} of its {R}x{C} blocks are not empty, too many to be faster"
    if kept(blocksize) == 1:
        why = f"it has no empty {R}x{C} block"
    elif max_density is not None:
        why = f"{kept(blocksize):.4g} of its {R}x{C} blocks are not empty, above max_density"
    for smaller in SMALLER:
        if smaller[0] * smaller[1] < R * C and pays(smaller):
            return f"{why}; blocksize={smaller} would keep {kept(smaller):.4g} of it"
    return why


def _why_tied(layer: nn.Module, owners: dict, reasons: dict[nn.Module, str]) -> str:
    """Why a layer has to share its weight as it is; "" if it can share it with sparse layers."""
    for owner in owners[_parameter(layer)]:
        if owner not in reasons:
            return f"its weight is tied to {type(owner).__name__}, which needs it dense"
        if reasons[owner]:
            return f"its weight is tied to a layer that is left: {reasons[owner]}"
        if type(owner) is not type(layer) or not torch.equal(_mask(owner), _mask(layer)):
            return "its weight is tied to a layer of another mask"
    return ""


def _convert(layer: nn.Module, blocksize: tuple[int, int], twin: BlockSparse | None) -> BlockSparse:
    """The layer's function on stored blocks; `twin` is what a layer tied to it became."""
    weight, mask = _parameter(layer), _mask(layer)
    blocks = bsr.from_dense(matrix(layer, weight.detach()), mask, blocksize)
    kept = bsr.kept_in_blocks(mask, blocks) if _is_pruned(layer) else None
    sparse = empty(layer, blocksize)._hold(*blocks, layer.bias, kept)
    if twin is not None:
        sparse.weight_values = twin.weight_values
    else:
        sparse.weight_values.requires_grad_(weight.requires_grad)
        vars(sparse.weight_values).update(vars(weight))
    return sparse


_STATE = vars(nn.Module()).keys()  # hooks, flags and the dicts of what a module holds
_TENSORS = ("_parameters", "_buffers", "_modules")
_DENSE = (nn.Linear(1, 1, device="meta"), nn.Conv2d(1, 1, 1, device="meta"))
_DENSE_NAMES = {"weight", "nf", "nx"}.union(*map(vars, _DENSE))
_DENSE_TENSORS = {"weight", "bias", "weight_orig", "weight_mask"}
_OWN_NAMES = {name for layer in _DENSE for name in dir(empty(layer, (1, 1)))} - {*dir(nn.Module)}


def _added(layer: nn.Module) -> set[str]:
    """Names of the attributes, parameters, buffers and modules that somebody put on a layer."""
    names = vars(layer).keys() - _DENSE_NAMES
    return names.union(*(getattr(layer, kind).keys() - _DENSE_TENSORS for kind in _TENSORS))


def _carry(old: nn.Module, new: BlockSparse) -> None:
    """Gives `new` all that `old` has besides its weight: hooks, flags, what somebody put there."""
    added = _added(old)
    for name, value in vars(old).items():
        if name in _TENSORS:
            getattr(new, name).update({n: t for n, t in value.items() if n in added})
        elif name == "_non_persistent_buffers_set":
            new._non_persistent_buffers_set |= value
        elif name in _STATE or name in added:
            vars(new)[name] = value


def _row(name: str, layer: nn.Module, sparse: BlockSparse | None, reason: str) -> Row:
    weight = _parameter(layer)
    shape = () if weight is None else tuple(matrix(layer, weight).shape)
    return Row(name, type(layer).__name__, shape, sparse and sparse.density, reason)
