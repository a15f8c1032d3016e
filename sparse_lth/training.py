"""Train and evaluate one network."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Split


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> float:
    """One pass of cross-entropy; the mean loss of the batches. TrainingError if not finite."""
    model.train()
    total, count = 0.0, 0
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + loss.detach(), count + 1
    mean = float(total) / count
    if not math.isfinite(mean):
        raise TrainingError(f"expected a finite training loss, got {mean}: try a lower --lr")
    return mean


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """(mean cross-entropy, fraction classified correctly)"""
    model.eval()
    loss, correct, total = 0.0, 0, len(split.labels)
    for images, labels in zip(split.images.split(1000), split.labels.split(1000), strict=True):
        logits = model(images)
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        correct = correct + (logits.argmax(1) == labels).sum()
    return float(loss) / total, int(correct) / total
