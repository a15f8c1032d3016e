"""LeNet-300-100, narrower ones, and LeNet-5 on (batch, 1, 28, 28) images, 10 classes."""

from collections import OrderedDict
from functools import partial

import torch
from torch import nn

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


NARROW = {  # what pruning competes with: the same network, narrower
    f"lenet-{3 * width}-{width}": partial(_lenet_fc, 3 * width, width) for width in (50, 25, 10, 5)
}
MODELS = {"lenet-300-100": partial(_lenet_fc, 300, 100), "lenet-5": _lenet_5, **NARROW}


def build(name: str) -> nn.Sequential:
    """The network on the meta device: all shapes, no weights; `initialise` or load gives those."""
    with torch.device("meta"):
        return MODELS[name]()


def initialise(model: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """θ₀ as the paper draws it: Gaussian Glorot weights, zero biases; on the CPU, by name."""
    init = {}
    for name, parameter in model.named_parameters():
        init[name] = torch.zeros(parameter.shape)
        if parameter.dim() > 1:
            nn.init.xavier_normal_(init[name], generator=generator)
    return init


def as_exported(name: str) -> SparseSequential:
    """The network in eval mode as `load_sparse` fills and returns it."""
    return SparseSequential(OrderedDict(build(name).named_children())).eval()


BUILDERS.update({name: partial(as_exported, name) for name in MODELS})
