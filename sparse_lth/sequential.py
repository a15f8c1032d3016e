"""SparseSequential, whose linear layers run as one call in inference on a CPU."""

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .conv import SparseConv2d
from .int8 import Int8SparseLinear
from .kernels import Chain, ChainLayer, any_autocast, backend, is_traced
from .kernels.unchanged import Held, Modules, unchanged
from .layers import SparseLinear

SMALL = 1 << 17  # weights of a dense layer that a chain may take: on larger ones torch is faster


class Prepared(NamedTuple):
    """The call of a network as it was; published whole, so that threads may share it."""

    modules: list[nn.Module]
    start: int  # where the chains begin
    flattens: bool  # whether with a Flatten, which is no part of their calls
    chains: list[Chain]  # one, or more where layers in int8 are next to others
    hooks: list[dict]  # of the chains' modules: none, as long as a call is its class's
    held: Modules  # what they held

    def is_current(self, modules: list[nn.Module]) -> bool:
        return self.modules == modules and not any(self.hooks) and unchanged(self.held)


class SparseSequential(nn.Sequential):
    """`nn.Sequential`: the same modules, names, `state_dict` and results, to rounding.

    Without gradients, and where the native kernels run, its end becomes one call that takes a chunk
    of the batch through all layers while it is in cache: block-sparse layers, small dense ones,
    ReLUs, and a flattening before them. Layers in int8 next to others are a call of their own. It
    trains, compiles, exports and moves to a GPU as usual.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: whatever the first module takes"""
        if torch.is_grad_enabled() or is_traced(x) or not backend(x).chains or any_autocast():
            return super().forward(x)
        if _global_forward_hooks or _global_forward_pre_hooks:  # which want to see each module
            return super().forward(x)
        modules = list(self._modules.values())
        prepared = self.__dict__.get("_prepared")
        if prepared is None or not prepared.is_current(modules):
            self._prepared = prepared = _prepare(modules)
        if not prepared.chains:
            return _run(modules, x)
        if prepared.start:
            x = _run(modules[: prepared.start], x)
        if prepared.flattens and x.dim() != 2:
            x = x.flatten(1)
        for chain in prepared.chains:
            x = chain(x)
        return x

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_prepared"}


def _run(modules: list[nn.Module], x: Tensor) -> Tensor:
    """The modules in turn; a sparse convolution, its ReLU and its 2 x 2 pooling are one call."""
    i = 0
    while i < len(modules):
        module, behind = modules[i], modules[i + 1 : i + 3]
        relu = len(behind) > 0 and type(behind[0]) is nn.ReLU
        together = [module, *behind[: relu + 1]]
        if (
            type(module) is SparseConv2d
            and _halves(together[-1])
            and all(map(_is_plain, together))
            and x.dim() == 4
        ):
            x = module.max_pooled(x, relu)
            i += len(together)
        else:
            x = module(x)
            i += 1
    return x


def _halves(module: nn.Module) -> bool:
    """Whether it takes the maxima of 2 x 2 pixels, each pixel once."""
    return type(module) is nn.MaxPool2d and (
        module.kernel_size in (2, (2, 2))
        and module.stride in (2, (2, 2))
        and module.padding in (0, (0, 0))
        and module.dilation in (1, (1, 1))
        and not (module.ceil_mode or module.return_indices)
    )


def _prepare(modules: list[nn.Module]) -> Prepared:
    parts = [_part(module) for module in modules]
    start = _tail(modules, parts)
    layers, hooks, held = [], [], []
    for module, part in zip(modules[start:], parts[start:], strict=True):
        hooks += _hooks(module)
        entries = (Held(None, "forward", None),)
        if part is not None:
            layers.append(part.layer)
            entries = None if part.held is None else (*entries, *part.held)
        elif isinstance(module, nn.ReLU):
            layers[-1] = layers[-1]._replace(activation="relu")
        else:
            entries += Held(None, "start_dim", 1), Held(None, "end_dim", -1)
        held.append((vars(module), entries))
    of_dtype = [list(run) for _, run in groupby(layers, key=lambda layer: layer.values.dtype)]
    takes = all(len(run) <= Chain.MAX_LAYERS for run in of_dtype)
    chains = [Chain(run) for run in of_dtype] if takes else []
    flattens = len(chains) > 0 and isinstance(modules[start], nn.Flatten)
    return Prepared(modules, start, flattens, chains, hooks, tuple(held))


class Part(NamedTuple):
    """What a chain takes of a module, and what the module held then, as in `Snapshot.seen`."""

    layer: ChainLayer
    held: tuple[Held, ...] | None


def _part(module: nn.Module) -> Part | None:
    """None if a chain cannot take it. All of it is of one moment, whatever other threads do."""
    if type(module) is SparseLinear:
        snapshot = module._snapshot()
        return None if snapshot.chain is None else Part(snapshot.chain.layers[0], snapshot.seen)
    if type(module) is Int8SparseLinear:
        snapshot = module._snapshot()
        in_chain = module.activation != "gelu"
        return Part(snapshot.chain.layers[0], snapshot.seen) if in_chain else None
    if type(module) is not nn.Linear:
        return None
    shape = module.out_features, module.in_features
    parameters = [module._parameters.get(name) for name in ("weight", "bias")]
    weight, bias = (None if t is None else t.data for t in parameters)
    if weight is None:
        return None
    layer = ChainLayer(weight, None, bias, *shape[::-1])
    fits = weight.shape == shape and (bias is None or bias.shape == shape[:1])
    if not (fits and weight.numel() <= SMALL and Chain.takes(layer)):
        return None
    held = zip(("weight", "bias"), parameters, (weight, bias), strict=True)
    return Part(layer, tuple(Held.trained(*each) for each in held))


def _hooks(module: nn.Module) -> tuple[dict, dict]:
    return module._forward_pre_hooks, module._forward_hooks


def _is_plain(module: nn.Module) -> bool:
    """Whether a call is that of its class: without hooks, or a forward of its own."""
    return not any(_hooks(module)) and "forward" not in vars(module)


def _tail(modules: list[nn.Module], parts: list[Part | None]) -> int:
    """Where the part begins that a chain can be: [Flatten] Linear [ReLU] Linear ... at the end."""
    start = len(modules)
    for i, module in reversed(list(enumerate(modules))):
        if not _is_plain(module):
            break
        if parts[i] is not None:
            start = i
        elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return i if start == i + 1 else start
        elif type(module) is not nn.ReLU:
            break
    return start
