"""Whether what a call was prepared from is still there: `unchanged`, native where it was built."""

from typing import NamedTuple

from torch import Tensor

from .linear_native import _native


class Held(NamedTuple):
    """What a module held: `value`, in its `__dict__` or in a dict of that, such as _parameters.

    A tensor also had `count` numbers at an address, contiguous, and had been written to so many
    times; None where that may change.
    """

    group: str | None
    name: str
    value: object
    address: int | None = None
    count: int | None = None
    version: int | None = None

    @classmethod
    def trained(cls, name: str, parameter: Tensor | None, memory: Tensor | None) -> "Held":
        """A parameter whose numbers, `memory`, may be written to in place."""
        if memory is None:
            return cls("_parameters", name, parameter)
        return cls("_parameters", name, parameter, memory.data_ptr(), memory.numel())

    @classmethod
    def buffer(cls, name: str, buffer: Tensor | None, memory: Tensor | None) -> "Held":
        """A buffer whose numbers, `memory`, are what they were as long as nobody writes to it."""
        if memory is None:
            return cls("_buffers", name, buffer)
        return cls("_buffers", name, buffer, memory.data_ptr(), None, buffer._version)


Modules = tuple[tuple[dict, tuple[Held, ...] | None], ...]


def _unchanged(modules: Modules) -> bool:
    """Whether each module holds all that it held; modules: for each its `__dict__` and what that
    was, or None where nothing can tell."""
    return all(entries is not None and _holds(own, entries) for own, entries in modules)


def _holds(own: dict, entries: tuple[Held, ...]) -> bool:
    for group, name, value, address, count, version in entries:
        mapping = own if group is None else own[group]
        if mapping.get(name) is not value:
            return False
        if address is not None and value.data_ptr() != address:
            return False
        if count is not None and not (value.numel() == count and value.is_contiguous()):
            return False
        if version is not None and value._version != version:
            return False
    return True


unchanged = _unchanged if _native is None else _native.unchanged
