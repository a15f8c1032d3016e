"""SparseSequential, whose linear layers run as one call in inference on a CPU."""

import torch
from torch import Tensor, nn

from .kernels import Chain, ChainLayer, backend, is_traced
from .layers import SparseLinear

SMALL = 1 << 17  # weights of a dense layer that a chain may take: on larger ones torch is faster


class SparseSequential(nn.Sequential):
    """`nn.Sequential`: the same modules, names, `state_dict` and results, to rounding.

    Without gradients, and where the native kernels run, its end becomes one call that takes a chunk
    of the batch through all layers while it is in cache: block-sparse layers, small dense ones,
    ReLUs, and a flattening before them. It trains, compiles, exports and moves to a GPU as usual.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: whatever the first module takes"""
        if (
            torch.is_grad_enabled()
            or is_traced(x)
            or backend(x).name != "native"
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        start, chain = self._prepared()
        if chain is None:
            return super().forward(x)
        modules = list(self._modules.values())
        for module in modules[:start]:
            x = module(x)
        if isinstance(modules[start], nn.Flatten):
            x = x.flatten(1)
        if x.shape[-1] != chain.in_features:
            raise ValueError(f"expected (..., {chain.in_features}) inputs, got {tuple(x.shape)}")
        if x.dim() == 2:
            return chain(x)
        y = chain(x.reshape(-1, chain.in_features))
        return y.view(*x.shape[:-1], chain.out_features)

    def _prepared(self) -> tuple[int, Chain | None]:
        """Where the chain begins, and the chain: made anew when what it was made of has changed."""
        watched, hooks, counts, found = self.__dict__.get("_cached", ((), (), (), None))
        if (
            found is None
            or [len(h) for h in hooks] != counts
            or any(mapping.get(name) is not value for mapping, name, value in watched)
        ):
            modules = list(self._modules.values())
            start = _tail(modules)
            found = start, _chain(modules[start:])
            hooks = [self._modules, *(h for module in modules for h in _hooks(module))]
            self._cached = _watched(self._modules), hooks, [len(h) for h in hooks], found
        return found

    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k != "_cached"}


def _watched(modules: dict[str, nn.Module]) -> list[tuple[dict, str, object]]:
    """(mapping, name, value): a chain is what the modules are while each mapping has that value."""
    watched = [(modules, name, module) for name, module in modules.items()]
    for module in modules.values():
        own = vars(module)
        watched += [(own["_parameters"], *item) for item in own["_parameters"].items()]
        watched += [(own["_buffers"], "col_indices", own["_buffers"].get("col_indices"))]
        watched += [(own, name, own.get(name)) for name in ("activation", "forward")]
    return watched


def _hooks(module: nn.Module) -> tuple[dict, dict]:
    return module._forward_hooks, module._forward_pre_hooks


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is that of its class: no hooks, no forward of its own."""
    return not (any(_hooks(module)) or "forward" in vars(module))


def _is_layer(module: nn.Module) -> bool:
    """Whether a chain can take it: plain float32 parameters on the CPU, no gelu."""
    if type(module) is nn.Linear:
        weight = module._parameters.get("weight")
        fits = weight is not None and weight.numel() <= SMALL
    else:
        weight = module._parameters.get("values") if type(module) is SparseLinear else None
        fits = weight is not None and module.activation != "gelu"
    tensors = [t for t in module._parameters.values() if t is not None]
    return fits and all(
        t.dtype == torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors
    )


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


def _chain(modules: list[nn.Module]) -> Chain | None:
    """None where there is no layer, or more of them than a call takes."""
    layers = []
    for module in modules:
        if isinstance(module, nn.ReLU):
            layers[-1] = layers[-1]._replace(activation="relu")
        elif isinstance(module, SparseLinear):
            sizes = module.in_features, module.out_features, module.activation
            layers.append(ChainLayer(module.weight_values, module.pattern, module.bias, *sizes))
        elif isinstance(module, nn.Linear):
            sizes = module.in_features, module.out_features
            layers.append(ChainLayer(module.weight, None, module.bias, *sizes))
    return Chain(layers) if 1 <= len(layers) <= Chain.MAX_LAYERS else None
