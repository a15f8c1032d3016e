"""A ticket in torch's own transformer, which learns what token a sequence has most of."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from sparse_lth import benchmark, find_ticket, load_sparse, save_sparse

STEPS, ROUNDS = map(int, sys.argv[1:] or (300, 3))


def transformer():
    layer = nn.TransformerEncoderLayer(128, 4, 1024, dropout=0, batch_first=True)
    return nn.Sequential(nn.Embedding(5, 128), nn.TransformerEncoder(layer, 2), nn.Linear(128, 5))


def train(model):
    optimizer = torch.optim.AdamW(model.parameters())
    for tokens in torch.randint(5, (STEPS, 32, 12)):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens)[:, 0], tokens.mode(1).values).backward()
        optimizer.step()


def accuracy(model):
    tokens = torch.randint(5, (500, 12))
    return (model(tokens)[:, 0].argmax(1) == tokens.mode(1).values).float().mean()


ticket = find_ticket(transformer(), train, 0.1, ROUNDS, (16, 16), accuracy)
exported = ticket.sparse_network(transformer())
save_sparse(exported, "transformer.safetensors")
loaded = load_sparse("transformer.safetensors", transformer())
print(ticket, *ticket.rounds, sep="\n")
print(benchmark({"dense": transformer(), "pruned": loaded}, torch.randint(5, (1, 12))))
