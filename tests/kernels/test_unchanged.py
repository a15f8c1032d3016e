"""What a prepared call asks: whether a module still holds what it held, in Python and natively."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sparse_lth.kernels import unchanged as module
from sparse_lth.kernels.unchanged import Held, _unchanged

BOTH = pytest.mark.parametrize("ask", [*dict.fromkeys([_unchanged, module.unchanged])])


def _holder():
    """A module, and what it holds: a trained parameter, an index, nothing, and an attribute."""
    holder = nn.Linear(4, 3, bias=False)
    holder.register_buffer("index", torch.arange(3))
    holder.kind = "none"
    held = (
        Held.trained("weight", holder.weight, holder.weight.data),
        Held.trained("bias", None, None),
        Held("_buffers", "index", holder.index, holder.index.data_ptr(), None, 0),
        Held(None, "kind", holder.kind),
        Held(None, "forward", None),
    )
    return holder, held


def _give_other_memory(holder):
    holder.weight.data = holder.weight.data.clone()


def _transpose(holder):
    holder.weight.data = holder.weight.data.T


def _shrink(holder):
    holder.weight.data = holder.weight.data[:2]


def _replace(holder):
    holder.weight = nn.Parameter(holder.weight.data)


def _remove(holder):
    del holder._parameters["weight"]


def _add(holder):
    holder.bias = nn.Parameter(torch.zeros(3))


def _write(holder):
    holder.index.add_(1)


def _swap_for_what_has_no_version(holder):
    with torch.inference_mode():
        other = torch.arange(3)
    torch.utils.swap_tensors(holder.index, other)


def _leave_without_numbers(holder):
    torch.utils.swap_tensors(holder.weight, nn.Parameter(holder.weight.to("meta")))


def _set(holder):
    holder.kind = "relu"


def _patch(holder):
    holder.forward = lambda x: x


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        _give_other_memory,
        _transpose,
        _shrink,
        _replace,
        _remove,
        _add,
        _write,
        _swap_for_what_has_no_version,
        _leave_without_numbers,
        _set,
        _patch,
    ],
)
def test_every_change_is_seen(ask, change):
    holder, held = _holder()
    alive = holder.weight.data  # so that nothing else comes to lie there
    assert ask(((vars(holder), held),))
    change(holder)
    assert not ask(((vars(holder), held),))
    del alive


@BOTH
def test_values_may_be_trained_in_place(ask):
    holder, held = _holder()
    with torch.no_grad():
        holder.weight.add_(1)
    assert ask(((vars(holder), held),))


@BOTH
def test_each_module_is_asked_and_none_is_known_to_be_unchanged(ask):
    holder, held = _holder()
    other, others = _holder()
    both = (vars(holder), held), (vars(other), others)
    assert ask(())
    assert ask(both)
    assert not ask((*both, (vars(holder), None)))
    _set(other)
    assert not ask(both)


class _Stops(TorchFunctionMode):
    """Raises where a version is read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__self__", None) is torch.Tensor._version:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@BOTH
def test_an_error_comes_through(ask):
    holder, held = _holder()
    with _Stops(), pytest.raises(KeyboardInterrupt):
        ask(((vars(holder), held),))


@pytest.mark.skipif(module.unchanged is _unchanged, reason="native kernels are not built")
@pytest.mark.parametrize(
    "modules", [1, [], (1,), (({},),), ([], ()), ({}, []), ({}, (1,)), ({}, (("g",) * 6,))]
)
def test_native_raises_for_other_arguments(modules):
    modules = (modules,) if isinstance(modules, tuple) and len(modules) == 2 else modules
    with pytest.raises(TypeError, match="expected"):
        module.unchanged(modules)
