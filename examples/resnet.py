"""A ticket in torchvision's ResNet-18 on scikit-learn's digits, in blocks of 16 channels."""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torchvision.models import resnet18

from sparse_lth import benchmark, find_ticket, load_sparse, save_sparse

IMAGES, EPOCHS, ROUNDS = map(int, sys.argv[1:] or (1500, 2, 2))
images, labels = map(torch.tensor, load_digits(return_X_y=True))  # (1797, 64), (1797,)
images = F.interpolate(images.view(-1, 1, 8, 8).float() / 16, scale_factor=4).expand(-1, 3, -1, -1)


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for chosen in [b for _ in range(EPOCHS) for b in torch.randperm(IMAGES).split(50)]:
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()


def accuracy(model):
    return (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()


ticket = find_ticket(resnet18(num_classes=10), train, 0.1, ROUNDS, (16, 1), accuracy)
exported = ticket.sparse_network(resnet18(num_classes=10))
save_sparse(exported, "resnet.safetensors")
loaded = load_sparse("resnet.safetensors", resnet18(num_classes=10))
print(ticket, *ticket.rounds, sep="\n")
print(benchmark({"dense": resnet18(num_classes=10), "pruned": loaded}, images[:16]))
