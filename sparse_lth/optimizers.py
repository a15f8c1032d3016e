"""Which optimizers hold a state of a parameter, for parameters that become others."""

from warnings import warn
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

_stepped = WeakSet()  # optimizers that have taken a step, and so have a state of what they train
_before = WeakTensorKeyDictionary()  # parameter -> the shape that it had before its last blocks


def forget(parameter: Tensor, before: torch.Size) -> None:
    """Drops what optimizers remember of a parameter, such as momentum: it belongs to old values.

    before: the shape of those. A state that was loaded into an optimizer that has not stepped since
    is left if it may be of the new values, by its shape.
    """
    _before[parameter] = before
    for optimizer in list(_stepped):
        if parameter in optimizer.state:
            _start_anew(optimizer, parameter)


def _start_anew(optimizer: Optimizer, parameter: Tensor) -> None:
    del optimizer.state[parameter]
    warn(
        f"{type(optimizer).__name__} starts anew for a weight of shape "
        f"{tuple(parameter.shape)}: other blocks were loaded, and its state was of the old",
        stacklevel=2,
    )


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    _stepped.add(optimizer)
    for parameter, before in list(_before.items()):
        state = optimizer.state.get(parameter, {}).values()
        if before != parameter.shape and any(
            isinstance(t, Tensor) and t.shape == before for t in state
        ):
            _start_anew(optimizer, parameter)


register_optimizer_step_pre_hook(_before_step)
