"""LeNet-300-100, narrower ones, and LeNet-5 on (batch, 1, 28, 28) images, 10 classes."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..saving import BUILDERS
from ..sequential import SparseSequential


def _lenet_fc(width1: int, width2: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, width1),
            relu1=nn.ReLU(),
            fc2=nn.Linear(width1, width2),
            relu2=nn.ReLU(),
            fc3=nn.Linear(width2, 10),
        )
    )


def _lenet_5() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 6, 5, padding=2),  # (batch, 6, 28, 28)
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),  # (batch, 6, 14, 14)
            conv2=nn.Conv2d(6, 16, 5),  # (batch, 16, 10, 10)
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),  # (batch, 16, 5, 5)
            flatten=nn.Flatten(),
            fc1=nn.Linear(400, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, 10),
        )
    )


def glorot_(model: nn.Module, generator: torch.Generator) -> None:
    """Draws θ₀ as the paper does: Gaussian Glorot weights, zero biases; norms do nothing yet."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):  # of BatchNorm and its kind: no chance in it
            module.reset_parameters()


@dataclass(frozen=True)
class Model:
    """What the program has to know of a model.

    build: () -> the model; initialise(model, generator) draws its first weights in place
    input_shape: of one sample; loss(outputs, labels, reduction) -> (), as torch's functions have it
    output: the name of the output layer, which is pruned at half the rate
    blocksize: what --export-sparse prunes in by default
    """

    build: Callable[[], nn.Module]
    initialise: Callable[[nn.Module, torch.Generator], None] = glorot_
    input_shape: tuple[int, ...] = (1, 28, 28)
    loss: Callable[..., Tensor] = F.cross_entropy
    output: str = "fc3"
    blocksize: tuple[int, int] = (16, 16)

    def empty(self) -> nn.Module:
        """All shapes and no weights, on the meta device."""
        with torch.device("meta"):
            return self.build()

    def fresh(self) -> nn.Module:
        """With whatever weights, to be filled."""
        return self.empty().to_empty(device="cpu")

    def new(self, generator: torch.Generator) -> nn.Module:
        """With its first weights, of which there are no others."""
        model = self.fresh()
        self.initialise(model, generator)
        return model


NARROW = {  # what pruning competes with: the same network, narrower
    f"lenet-{3 * width}-{width}": Model(partial(_lenet_fc, 3 * width, width))
    for width in (50, 25, 10, 5)
}
MODELS = {
    "lenet-300-100": Model(partial(_lenet_fc, 300, 100)),
    "lenet-5": Model(_lenet_5, blocksize=(1, 1)),  # of 6 channels, which no taller block fits well
    **NARROW,
}


def as_exported(model: Model) -> SparseSequential:
    """The network in eval mode as `load_sparse` fills and returns it."""
    return SparseSequential(OrderedDict(model.empty().named_children())).eval()


BUILDERS.update({name: partial(as_exported, model) for name, model in MODELS.items()})
