"""benchmark: how long models take on the same inputs, beside the best that a dense one can do."""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from timeit import Timer
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_map_only

from .sequential import SparseSequential

RIVALS = ("one call", "compiled", "bfloat16")  # other ways to run a dense model
Name = TypeVar("Name", bound=Hashable)
TURN = 4e-3  # seconds of one call's part of a turn


@dataclass(frozen=True)
class Times:
    """Seconds of one call, measured once in each turn."""

    turns: tuple[float, ...]

    @property
    def p50(self) -> float:
        return median(self.turns)

    @property
    def p20(self) -> float:
        return quantiles(self.turns, n=5)[0]

    @property
    def p80(self) -> float:
        return quantiles(self.turns, n=5)[-1]

    def over(self, other: "Times") -> "Times":
        """How many times as fast as `other`, in each turn; below 1 is slower."""
        return Times(tuple(o / t for t, o in zip(self.turns, other.turns, strict=True)))


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark` measured; printed, it is a table."""

    times: dict[str, Times]  # by the name of the model, or of a rival as "dense, compiled"
    baseline: str | None
    left_out: dict[str, str]  # the rivals that could not run, and why

    @property
    def best_dense(self) -> str | None:
        """The fastest way that was found to run the baseline."""
        rivals = [n for n in self.times if n == self.baseline or n.startswith(f"{self.baseline}, ")]
        return min(rivals, key=lambda name: self.times[name].p50, default=None)

    def speedup(self, name: str, over: str | None = None) -> Times:
        """How many times as fast a model is as another, by default as the best dense one."""
        return self.times[name].over(self.times[over or self.best_dense or name])

    def __str__(self) -> str:
        width = max(map(len, self.times))
        best = self.best_dense
        titles = ["median", "p20 to p80"]
        if best:
            titles += [f"x {self.baseline}", f"x {best}"][: 1 + (best != self.baseline)]
        lines = ["  ".join([" " * width, *(f"{title:>20}" for title in titles)])]
        for name, times in self.times.items():
            cells = [_duration(times.p50), f"{_duration(times.p20)} to {_duration(times.p80)}"]
            for other in dict.fromkeys((self.baseline, best) if best else ()):
                cells.append(f"{self.times[other].p50 / times.p50:.2f}")
            lines.append("  ".join([f"{name:{width}}", *(f"{cell:>20}" for cell in cells)]))
        lines += [f"{name} was left out: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


def benchmark(
    models: Mapping[str, nn.Module],
    inputs: Tensor | tuple | dict,
    baseline: str | None = "dense",
    rivals: tuple[str, ...] = RIVALS,
    turns: int = 101,
) -> Benchmark:
    """Times each model on the inputs, in eval and inference mode, on the device where both are.

    models: by name; inputs: a tensor, the arguments as a tuple, or the keyword arguments as a dict
    baseline: the dense model that others are compared with, if it is among them. Since a comparison
        with a slow dense model is worth nothing, it also runs in each way of `rivals`: "one call"
        (an `nn.Sequential` on the native kernels), "compiled" (`torch.compile`, whose compilation
        is not counted) and "bfloat16".
    The models take turns, so that a busy moment of the machine falls on all of them, and the turns
    are many and short, so that it spoils few. Raises ValueError where the baseline is masked by
    `torch.nn.utils.prune`, which slows it.
    """
    if not models:
        raise ValueError("expected at least one model to time, got none")
    if baseline in models and prune.is_pruned(models[baseline]):
        raise ValueError(
            f"expected {baseline!r} without masks, which slow it: take a fresh model, or "
            "torch.nn.utils.prune.remove"
        )
    calls, left_out = {name: _call(model, inputs) for name, model in models.items()}, {}
    with _in_eval_mode(models.values()):
        for rival in rivals if baseline in models else ():
            name = f"{baseline}, {rival}"
            try:
                calls[name] = _rival(rival, models[baseline], inputs)
            except Exception as error:  # of a compiler, a backend, an operation without bfloat16
                left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        with torch.inference_mode():
            times = in_turn(calls, turns)
    return Benchmark(times, baseline if baseline in models else None, left_out)


def in_turn(calls: Mapping[Name, Callable[[], object]], turns: int = 101) -> dict[Name, Times]:
    """Times of each call; in a turn, each runs as often as fits into a few milliseconds."""
    timers = {name: Timer(call) for name, call in calls.items()}
    runs, seconds = {}, {name: [] for name in calls}
    for name, timer in timers.items():
        timer.timeit(1)
        count, total = timer.autorange()
        runs[name] = max(1, round(TURN * count / total))
    for _ in range(turns):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(runs[name]) / runs[name])
    return {name: Times(tuple(turn)) for name, turn in seconds.items()}


@contextmanager
def _in_eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _call(model: nn.Module, inputs: Tensor | tuple | dict) -> Callable[[], object]:
    args, kwargs = (inputs,) if isinstance(inputs, Tensor) else inputs, {}
    if isinstance(inputs, dict):
        args, kwargs = (), inputs
    on_gpu = any(t.is_cuda for t in (*args, *kwargs.values()) if isinstance(t, Tensor))

    def call():
        y = model(*args, **kwargs)
        if on_gpu:
            torch.cuda.synchronize()
        return y

    return call


def _rival(rival: str, model: nn.Module, inputs: Tensor | tuple | dict) -> Callable[[], object]:
    """The call of a dense model run in another way, once run; raises where it cannot."""
    if rival == "one call":
        if not isinstance(model, nn.Sequential):
            raise TypeError(f"expected an nn.Sequential, got {type(model).__name__}")
        model = SparseSequential(*model).eval()
    elif rival == "compiled":
        model = torch.compile(model)
    elif rival == "bfloat16":
        model = copy.deepcopy(model).to(torch.bfloat16)
        inputs = tree_map_only(
            Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, inputs
        )
    else:
        raise ValueError(f"expected rivals of {RIVALS}, got {rival!r}")
    call = _call(model, inputs)
    with torch.inference_mode():
        call()
    return call


def _duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
