"""SparseSequential, whose linear layers run as one call in inference on a CPU."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .conv import SparseConv2d
from .kernels import Chain, ChainLayer, any_autocast, backend, is_traced
from .layers import SparseLinear

SMALL = 1 << 17  # weights of a dense layer that a chain may take: on larger ones torch is faster


class Prepared(NamedTuple):
    """The call of a network as it was; published whole, so that threads may share it."""

    modules: list[nn.Module]
    start: int  # where the chain begins
    chain: Chain | None
    hooks: list[dict]  # of the chain's modules, all empty
    watched: list[tuple[dict, str, object]]  # what says what a module computes
    sparse: list[tuple[SparseLinear, tuple | None]]  # as `SparseLinear._seen` has them
    dense: list[tuple[Tensor, int, torch.Size]]  # parameters, their addresses and shapes

    def is_current(self, modules: list[nn.Module]) -> bool:
        if self.modules != modules or any(self.hooks):
            return False
        for mapping, name, value in self.watched:
            if mapping.get(name) is not value:
                return False
        for t, address, size in self.dense:
            if t.data_ptr() != address or t.shape != size:
                return False
        for layer, seen in self.sparse:
            if seen is None or not layer._is_as(seen):
                return False
        return True  # loops, since all() of a generator takes as long again


class SparseSequential(nn.Sequential):
    """`nn.Sequential`: the same modules, names, `state_dict` and results, to rounding.

    Without gradients, and where the native kernels run, its end becomes one call that takes a chunk
    of the batch through all layers while it is in cache: block-sparse layers, small dense ones,
    ReLUs, and a flattening before them. It trains, compiles, exports and moves to a GPU as usual.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: whatever the first module takes"""
        if torch.is_grad_enabled() or is_traced(x) or not backend(x).chains or any_autocast():
            return super().forward(x)
        modules = list(self._modules.values())
        prepared = self.__dict__.get("_prepared")
        if prepared is None or not prepared.is_current(modules):
            self._prepared = prepared = _prepare(modules)
        if prepared.chain is None:
            return _run(modules, x)
        x = _run(modules[: prepared.start], x)
        if isinstance(modules[prepared.start], nn.Flatten):
            x = x.flatten(1)
        return prepared.chain(x)

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
    start = _tail(modules)
    watched, hooks, layers, sparse, dense = [], [], [], [], []
    for module in modules[start:]:
        hooks += _hooks(module)
        watched.append((vars(module), "forward", None))
        if isinstance(module, nn.ReLU):
            layers[-1] = layers[-1]._replace(activation="relu")
        elif isinstance(module, SparseLinear):
            snapshot = module._snapshot()
            sparse.append((module, snapshot.seen))
            layers += snapshot.chain.layers
        elif isinstance(module, nn.Linear):
            parameters = module._parameters
            watched += [(parameters, name, parameters[name]) for name in ("weight", "bias")]
            dense += [(t, t.data_ptr(), t.shape) for t in parameters.values() if t is not None]
            sizes = module.in_features, module.out_features
            layers.append(ChainLayer(module.weight, None, module.bias, *sizes))
    chain = Chain(layers) if 1 <= len(layers) <= Chain.MAX_LAYERS else None
    return Prepared(modules, start, chain, hooks, watched, sparse, dense)


def _hooks(module: nn.Module) -> tuple[dict, dict]:
    return module._forward_hooks, module._forward_pre_hooks


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is that of its class: no hooks, no forward of its own."""
    return not (any(_hooks(module)) or "forward" in vars(module))


def _is_layer(module: nn.Module) -> bool:
    """Whether a chain can take it."""
    if type(module) is SparseLinear:
        return module._snapshot().chain is not None
    if type(module) is not nn.Linear or module._parameters.get("weight") is None:
        return False
    shape = module.out_features, module.in_features
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    fits = weight.shape == shape and weight.numel() <= SMALL
    return fits and Chain.takes(ChainLayer(weight, None, bias, *shape[::-1]))


def _tail(modules: list[nn.Module]) -> int:
    """Where the part begins that a chain can be: [Flatten] Linear [ReLU] Linear ... at the end."""
    start = len(modules)
    for i, module in reversed(list(enumerate(modules))):
        if not _is_plain(module):
            break
        if _is_layer(module):
            start = i
        elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return i if start == i + 1 else start
        elif type(module) is not nn.ReLU:
            break
    return start
