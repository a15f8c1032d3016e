"""Train and evaluate one network."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Split


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


Loss = Callable[..., Tensor]  # (outputs, labels, reduction="mean" or "sum") -> ()
Step = Callable[[Tensor], Tensor]  # (batch,) indices of a split -> the loss there, before it


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    loss_fn: Loss = F.cross_entropy,
) -> Step:
    """A step down the loss; on a GPU the optimizer must be capturable."""

    def step(chosen: Tensor) -> Tensor:
        images, labels = split.images.index_select(0, chosen), split.labels.index_select(0, chosen)
        loss = loss_fn(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return GraphedStep(step) if split.labels.is_cuda else step


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of all its parameters; one that is a tensor, which a CUDA graph reads, is written to."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class GraphedStep:
    """The same step as one replay of a CUDA graph; the loss is valid until the next step.

    A small network's step is dozens of kernels shorter than their launches: replayed, they are
    one launch.
    """

    def __init__(self, step: Step):
        self.step = step
        self.stream = torch.cuda.Stream()  # of every backward: its nodes remember their stream
        self.graphs = {}  # batch size: (graph, indices it reads, loss it writes)

    def __call__(self, chosen: Tensor) -> Tensor:
        if len(chosen) not in self.graphs:
            return self._first(chosen)
        graph, indices, loss = self.graphs[len(chosen)]
        indices.copy_(chosen)
        graph.replay()
        return loss

    def _first(self, chosen: Tensor) -> Tensor:
        """Takes the step, which allocates what a capture may not, then captures the next."""
        graph, indices = torch.cuda.CUDAGraph(), chosen.clone()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.step(chosen)
        torch.cuda.current_stream().wait_stream(self.stream)
        with torch.cuda.graph(graph, stream=self.stream):
            self.graphs[len(chosen)] = graph, indices, self.step(indices)
        return loss


@torch.inference_mode()
def evaluate(
    model: nn.Module, split: Split, loss_fn: Loss = F.cross_entropy
) -> tuple[float, float]:
    """(mean loss, fraction classified correctly)"""
    model.eval()
    loss, correct, total = 0.0, 0, len(split.labels)
    for images, labels in zip(split.images.split(1000), split.labels.split(1000), strict=True):
        logits = model(images)
        loss = loss + loss_fn(logits, labels, reduction="sum")
        correct = correct + (logits.argmax(1) == labels).sum()
    return float(loss) / total, int(correct) / total


@torch.inference_mode()
def confusion(model: nn.Module, split: Split) -> list[list[int]]:
    """How many images of each class, a row, are taken for each class, a column."""
    model.eval()
    logits = torch.cat([model(images) for images in split.images.split(1000)])
    classes = logits.shape[1]
    pairs = split.labels * classes + logits.argmax(1)
    return pairs.bincount(minlength=classes**2).view(classes, classes).tolist()
