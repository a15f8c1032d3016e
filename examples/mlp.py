"""A ticket in a multilayer perceptron on scikit-learn's digits, in blocks of 16x16."""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from sparse_lth import SparseSequential, benchmark, find_ticket, load_sparse, save_sparse

EPOCHS, ROUNDS = map(int, sys.argv[1:] or (20, 3))
images, labels = map(torch.tensor, load_digits(return_X_y=True))  # (1797, 64), (1797,)
images = images.float() / 16


def mlp():
    hidden = nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(1024, 10))


def train(model):
    optimizer = torch.optim.Adam(model.parameters())
    for chosen in [b for _ in range(EPOCHS) for b in torch.randperm(1500).split(100)]:
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()


def accuracy(model):
    return (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()


ticket = find_ticket(mlp(), train, 0.1, ROUNDS, (16, 16), accuracy)
exported = ticket.sparse_network(mlp())
save_sparse(exported, "mlp.safetensors")
loaded = load_sparse("mlp.safetensors", SparseSequential(*mlp()))
print(ticket, *ticket.rounds, sep="\n")
print(benchmark({"dense": mlp(), "pruned": loaded}, images[:1]))
