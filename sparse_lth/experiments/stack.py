"""Runs chains in lockstep: the networks that all of them wait for train as one stack.

A GPU is idle between the launches of one network as small as LeNet-300-100; a stack of fifty takes
a few times as long as one. Each network sees the batches, and takes the steps, that it would alone.
"""

import math
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import density
from ..program.data import Dataset, Split, load
from ..program.lottery import Lottery
from ..program.training import GraphedStep, TrainingError
from ..weights import Tensors, weight_name
from .chains import Chain, Job, Plan, Trained, early_stop, record_of, run_chain
from .progress import Watch

LAYERS = ("fc1", "fc2", "fc3")  # of the networks that can be stacked, with ReLUs between them
Stack = dict[str, Tensor]  # (networks, in, out) and (networks, out), by the parameter's name


def run_stacked(plan: Plan, chains: Sequence[Chain], folder: Path) -> None:
    """All chains to their ends, a round of each at a time."""
    torch.set_float32_matmul_precision("highest")  # not TF32
    data = load(plan.dataset, plan.data_dir, plan.device)
    rounds = [run_chain(plan, chain, data, folder) for chain in chains]
    answers = [None] * len(rounds)
    with ThreadPoolExecutor() as pool, Watch(chains, folder) as watch:
        while rounds:
            wanted = pool.map(_ask, rounds, answers)
            going = [(chain, jobs) for chain, jobs in zip(rounds, wanted, strict=True) if jobs]
            watch.update()
            every_job = [job for _, jobs in going for job in jobs]
            trained = iter(train_stack(every_job, data, plan.test_every) if going else ())
            answers = [[next(trained) for _ in jobs] for _, jobs in going]
            rounds = [chain for chain, _ in going]


def _ask(chain: Generator, answer: list[Trained] | None) -> list[Job]:
    """What the chain wants trained next, nothing at its end."""
    try:
        return chain.send(answer)
    except StopIteration:
        return []


def train_stack(jobs: Sequence[Job], data: Dataset, test_every: int) -> list[Trained]:
    """What `engine.train` gives for each of them, to rounding.

    All have the same number of iterations, batch size and steps between evaluations.
    """
    order = sorted(range(len(jobs)), key=lambda n: _kind(jobs[n]))
    trained = _Training([jobs[n] for n in order], data, test_every).run()
    return [result for _, result in sorted(zip(order, trained, strict=True), key=lambda x: x[0])]


def _kind(job: Job) -> tuple[int, float]:
    """What the networks of one group share: the step at which they begin, and the learning rate."""
    return job.start.step, job.config.lr


class _Training:
    """One round of a stack, whose jobs are sorted by their kind.

    Those that begin at a later step are trained along until then, and put back to their start.
    """

    def __init__(self, jobs: Sequence[Job], data: Dataset, test_every: int):
        self.jobs, self.data, self.test_every = jobs, data, test_every
        self.lotteries = [Lottery(job.config, data) for job in jobs]
        self.steps, self.every = self.lotteries[0].steps, jobs[0].config.every
        self.device = data.train.labels.device
        self.starts = _stack([job.start.weights for job in jobs], self.device)
        self.masks = _stack([_weight_masks(job) for job in jobs], self.device)
        self.parameters = {n: p.clone().requires_grad_() for n, p in self.starts.items()}
        self.losses = torch.zeros(len(jobs), device=self.device)  # since the last evaluation
        self.groups = []  # (step at which it begins, rows of the stack, parameters there)
        settings, first = [], 0
        for (begin, lr), same in groupby(jobs, _kind):
            rows = slice(first, first + len(list(same)))
            parts = {n: p.detach()[rows] for n, p in self.parameters.items()}
            self.groups.append((begin, rows, parts))
            settings.append({"params": [*parts.values()], "lr": lr})
            first = rows.stop
        cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(settings, fused=True, capturable=cuda)
        self.take_step = GraphedStep(self._step) if cuda else self._step
        self.best = torch.full((len(jobs),), torch.inf, device=self.device, dtype=torch.float64)
        self.early = dict(self.parameters)  # the weights of the least validation loss so far
        self.marked = {}  # the weights of each rewind_step
        self.evaluations = []  # (step, the numbers of each network there)

    def run(self) -> list[Trained]:
        generators = [torch.Generator() for _ in self.jobs]
        for generator, job in zip(generators, self.jobs, strict=True):
            generator.set_state(job.start.generator)
        step = epoch = 0
        self._after(step)
        while step < self.steps:
            for chosen in self._draw(generators, epoch).split(self.jobs[0].config.bs):
                self.take_step(chosen)
                step += 1
                self._after(step)
                if step == self.steps:
                    break
            epoch += 1
        ends = _evaluate(self.parameters, self.data.train)[1].tolist()
        early = [_evaluate(self.early, s)[1].tolist() for s in (self.data.test, self.data.train)]
        steps, numbers = zip(*self.evaluations, strict=True)
        numbers = torch.stack(numbers, 2).cpu()  # (networks, 4, evaluations)
        weights = _on_cpu(self.parameters)
        trained = []
        for n, job in enumerate(self.jobs):
            records = self._records(job, steps, numbers[n].T.tolist())
            records[-1]["train_accuracy"] = ends[n]
            test, train = (accuracies[n] for accuracies in early)
            early_stop(records).update(test_accuracy=test, train_accuracy=train)
            init, rewind_step = job.start.init, self.lotteries[n].rewind_step
            if job.start.round == 0 and rewind_step:
                init = _network(self.marked[rewind_step], n, job.start.weights)
            state = replace(
                job.start,
                epoch=self.steps // self.lotteries[n].per_epoch,
                step=self.steps,
                init=init,
                weights=_network(weights, n, job.start.weights),
                generator=generators[n].get_state(),
            )
            trained.append(Trained(state, records))
        return trained

    def _draw(self, generators: list[torch.Generator], epoch: int) -> Tensor:
        """The order of the samples in this epoch for each network -> (samples, networks)"""
        orders, samples = [], len(self.data.train.labels)
        for generator, job in zip(generators, self.jobs, strict=True):
            began = epoch >= job.start.epoch
            orders.append(
                torch.randperm(samples, generator=generator) if began else torch.arange(samples)
            )
        order = torch.stack(orders, 1)
        if self.device.type == "cuda":
            order = order.pin_memory()  # to be copied while steps are under way
        return order.to(self.device, non_blocking=True)

    def _step(self, chosen: Tensor) -> Tensor:
        """chosen: (batch, networks) samples -> the losses of each network since its evaluation"""
        batch, networks = chosen.shape
        samples = chosen.T.flatten()
        images = self.data.train.images.index_select(0, samples).view(networks, batch, -1)
        labels = self.data.train.labels.index_select(0, samples)
        logits = _forward(self.parameters, images).flatten(0, 1)
        losses = F.cross_entropy(logits, labels, reduction="none").view(networks, batch).mean(1)
        gradients = torch.autograd.grad(losses.sum(), [*self.parameters.values()])
        gradients = dict(zip(self.parameters, gradients, strict=True))
        for name, mask in self.masks.items():
            gradients[name].mul_(mask)
        for _, rows, parts in self.groups:
            for name, part in parts.items():
                part.grad = gradients[name][rows]
        self.optimizer.step()
        return self.losses.add_(losses.detach())

    @torch.no_grad()
    def _after(self, step: int) -> None:
        """What is due after so many steps: rewind points, beginnings, an evaluation."""
        if step and any(lottery.rewind_step == step for lottery in self.lotteries):
            self.marked[step] = _on_cpu(self.parameters)
        begins = [group for group in self.groups if group[0] == step]
        for _, rows, parts in begins:
            self.best[rows] = torch.inf
            for name, part in parts.items():
                part.copy_(self.starts[name][rows])
                for value in self.optimizer.state[part].values():
                    value.zero_()
        if begins or self._is_due(step):
            self._evaluate_all(step)

    def _evaluate_all(self, step: int) -> None:
        """Keeps the numbers of every network, and its weights where they are its best so far. No
        number is read here: the device goes on meanwhile."""
        numbers = torch.full((len(self.jobs), 4), torch.nan, dtype=torch.float64)
        numbers = numbers.to(self.device)
        numbers[:, 0] = self.losses
        self.losses.zero_()
        numbers[:, 1], numbers[:, 2] = _evaluate(self.parameters, self.data.validation)
        if any(self._is_tested(job, step) for job in self.jobs):
            numbers[:, 3] = _evaluate(self.parameters, self.data.test)[1]
        self.evaluations.append((step, numbers))
        counts = torch.tensor([self._is_recorded(job, step) for job in self.jobs])
        better = counts.to(self.device) & (numbers[:, 1] < self.best)
        self.best = torch.where(better, numbers[:, 1], self.best)
        for name, parameter in self.parameters.items():
            chosen = better.view(-1, *[1] * (parameter.dim() - 1))
            self.early[name] = torch.where(chosen, parameter, self.early[name])

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def _is_recorded(self, job: Job, step: int) -> bool:
        return step == job.start.step or (step > job.start.step and self._is_due(step))

    def _is_tested(self, job: Job, step: int) -> bool:
        return step in (job.start.step, self.steps) or step % self.test_every == 0

    def _records(self, job: Job, steps: list[int], numbers: list[list[float]]) -> list[dict]:
        """numbers: those of this network at these steps"""
        kept, begin, records, loss, since = density(job.start.masks), job.start.step, [], 0.0, 0
        for step, row in zip(steps, numbers, strict=True):
            loss += row[0] if step > begin else 0.0
            if not self._is_recorded(job, step):
                continue
            losses = {"validation_loss": row[1]}
            if step > begin:
                losses["train_loss"] = loss / (step - since)
            if not all(map(math.isfinite, losses.values())):
                raise TrainingError(f"expected finite losses of {job.name}, got {losses}")
            accuracies = {"validation_accuracy": row[2]}
            if self._is_tested(job, step):
                accuracies["test_accuracy"] = row[3]
            records.append(record_of(kept, step, losses, accuracies))
            loss, since = 0.0, step
        return records


def _forward(parameters: Stack, images: Tensor) -> Tensor:
    """images: (networks, batch, 784), or (1, batch, 784) for all -> (networks, batch, 10) logits"""
    x = images.expand(len(parameters["fc1.weight"]), -1, -1)
    for layer in LAYERS:
        x = F.relu(x) if layer != LAYERS[0] else x
        bias, weight = parameters[f"{layer}.bias"], parameters[f"{layer}.weight"]
        x = torch.baddbmm(bias.unsqueeze(1), x, weight)
    return x


@torch.inference_mode()
def _evaluate(parameters: Stack, split: Split) -> tuple[Tensor, Tensor]:
    """(mean loss, fraction classified correctly) of each network, in float64"""
    loss, correct, total = 0.0, 0, len(split.labels)
    for images, labels in zip(split.images.split(1000), split.labels.split(1000), strict=True):
        logits = _forward(parameters, images.flatten(1).unsqueeze(0))
        log_likelihood = logits.log_softmax(2).gather(2, labels.expand(len(logits), -1)[..., None])
        loss = loss - log_likelihood.sum((1, 2))
        correct = correct + (logits.argmax(2) == labels).sum(1)
    return loss.double() / total, correct.double() / total


def _weight_masks(job: Job) -> Tensors:
    """A mask by the name of each weight; a layer that is too small to be pruned has one, too."""
    matrices = {name: w for name, w in job.start.weights.items() if w.dim() == 2}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in matrices.items()}
    return masks | {weight_name(name): mask for name, mask in job.start.masks.items()}


def _stack(networks: Sequence[Tensors], device: torch.device) -> Stack:
    """Weights transposed, and all padded with zeros to the widest network's shape.

    No step changes the zeros: nothing reaches a neuron without weights, and nothing leaves it.
    """
    stacked = {}
    for name in networks[0]:
        tensors = [_turned(network[name]) for network in networks]
        shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        stacked[name] = torch.zeros(len(tensors), *shape, dtype=tensors[0].dtype)
        for n, tensor in enumerate(tensors):
            stacked[name][(n, *map(slice, tensor.shape))] = tensor
        stacked[name] = stacked[name].to(device)
    return stacked


def _network(stack: Stack, n: int, like: Tensors) -> Tensors:
    """The n-th network of a stack on the CPU, as it was before it was stacked."""
    network = {}
    for name, tensor in like.items():
        part = _turned(stack[name][n])[tuple(map(slice, tensor.shape))]
        network[name] = part.clone(memory_format=torch.contiguous_format)
    return network


def _turned(tensor: Tensor) -> Tensor:
    """A weight transposed; a bias as it is."""
    return tensor.mT if tensor.dim() == 2 else tensor


def _on_cpu(stack: Stack) -> Stack:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in stack.items()}
