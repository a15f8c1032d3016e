"""Which optimizers hold a state of a parameter, for parameters that become others."""

from warnings import warn
from weakref import WeakSet

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

_stepped = WeakSet()  # optimizers that have taken a step, and so have a state of what they train
register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: _stepped.add(optimizer))


def forget(parameter: Tensor) -> None:
    """Drops what optimizers remember of a parameter, such as momentum: it belongs to old values.

    A state that was loaded into an optimizer that has not stepped since is left: it came with the
    new values.
    """
    for optimizer in list(_stepped):
        if optimizer.state.pop(parameter, None):
            warn(
                f"{type(optimizer).__name__} starts anew for a weight of shape "
                f"{tuple(parameter.shape)}: other blocks were loaded, and its state was of the old",
                stacklevel=2,
            )
