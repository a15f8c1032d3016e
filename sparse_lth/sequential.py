"""SparseSequential, whose linear layers run as one call in inference on a CPU."""

import torch
from torch import Tensor, nn

from .kernels import Chain, ChainLayer, backend, is_traced
from .layers import SparseLinear


class SparseSequential(nn.Sequential):
    """`nn.Sequential`: the same modules, names, `state_dict` and results, to rounding.

    Without gradients, and where the native kernels run, the linear layers and ReLUs at its end, a
    flattening before them included, are one call that takes a chunk of the batch through all of
    them while it is in cache. It trains, compiles, exports and moves to a GPU as usual.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: whatever the first module takes"""
        if torch.is_grad_enabled() or is_traced(x) or backend(x).name != "native":
            return super().forward(x)
        modules = list(self._modules.values())
        key = [id(part) for module in modules for part in _parts(module)]
        if key != self.__dict__.get("_key"):
            start = _tail(modules)
            # the chain's tensors stay alive with it, and so their ids stay theirs
            self._chain = start, _chain(modules[start:]), [_parts(m) for m in modules]
            self._key = key
        start, chain, _ = self._chain
        if chain is None:
            return super().forward(x)
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

    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k not in ("_chain", "_key")}


def _parts(module: nn.Module) -> tuple:
    """What a chain was made of: when one of these is another object, it has to be made anew."""
    return module, *module._parameters.values(), module._buffers.get("col_indices")


def _is_linear(module: nn.Module) -> bool:
    linear = type(module) is nn.Linear
    return linear or (type(module) is SparseLinear and module.activation != "gelu")


def _tail(modules: list[nn.Module]) -> int:
    """Where the part begins that a chain can be: [Flatten] Linear [ReLU] Linear ... at the end."""
    start = len(modules)
    for i in reversed(range(len(modules))):
        module = modules[i]
        plain = not (module._forward_hooks or module._forward_pre_hooks)
        if plain and _is_linear(module):
            start = i
        elif plain and type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return i if start == i + 1 else start
        elif not (plain and type(module) is nn.ReLU):
            break
    return start


def _chain(modules: list[nn.Module]) -> Chain | None:
    """None where there is no linear layer, or one that is not float32."""
    layers = []
    for module in modules:
        if isinstance(module, nn.ReLU):
            layers[-1] = layers[-1]._replace(activation="relu")
        elif isinstance(module, SparseLinear):
            sizes = module.in_features, module.out_features, module.activation
            layers.append(ChainLayer(module.values, module.pattern, module.bias, *sizes))
        elif isinstance(module, nn.Linear):
            sizes = module.in_features, module.out_features
            layers.append(ChainLayer(module.weight, None, module.bias, *sizes))
    tensors = [t for layer in layers for t in (layer.values, layer.bias) if t is not None]
    if not layers or any(t.dtype != torch.float32 or not t.is_cpu for t in tensors):
        return None
    return Chain(layers)
