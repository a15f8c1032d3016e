"""quantize_: the sparse linear layers of a model in int8, for inference."""

from collections.abc import Callable

from torch import nn

from .convert import own_hooks
from .int8 import Int8SparseLinear
from .layers import SparseLinear


def quantize_(
    model: nn.Module,
    config: str = "int8",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Replaces, in place, the `SparseLinear` layers of a model by `Int8SparseLinear`.

    config: "int8", the only one: int8 weights with a scale for each output, and activations that
        are quantised as they come, each row of the batch by itself
    filter_fn(module, name): which layers, by default all. Hooks and flags are kept. All layers are
    replaced, or none and a ValueError.
    """
    if config != "int8":
        raise ValueError(f"expected config 'int8', got {config!r}")
    if isinstance(model, SparseLinear):
        raise ValueError("expected a model with SparseLinear layers in it, got one of them alone")
    made = {
        module: Int8SparseLinear.from_sparse(module)
        for name, module in model.named_modules()
        if type(module) is SparseLinear and (filter_fn is None or filter_fn(module, name))
    }
    if not made:
        raise ValueError(f"expected a SparseLinear to quantise in {type(model).__name__}, got none")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = made.get(child, child)
    for old, new in made.items():
        vars(new).update({name: vars(old)[name] for name in _CARRIED})
        own_hooks(new)


# Hooks and flags: what any module holds besides its tensors and its parts
_CARRIED = vars(nn.Module()).keys() - {
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
}
