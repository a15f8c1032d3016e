"""What a run leaves behind while it goes on: its state, its metrics, curves, and a sign of life."""

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import write
from .config import RunConfig
from .lottery import State


def write_metrics(run_dir: Path, records: list[dict]) -> None:
    """metrics.jsonl: a JSON object a line, whole at any moment."""
    write(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def watch(
    states: Iterator[State], config: RunConfig, start: State, run_dir: Path, console: Console
) -> State:
    """Runs the search to its end, saving each state before the next begins; returns the last.

    On a terminal a bar is shown, elsewhere a line is printed for every epoch.
    """
    total = (config.rounds + 1) * config.epochs
    curves = _Curves(run_dir / "tensorboard", config, len(start.history), console)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeRemainingColumn(),
    )
    state = start

    def doing() -> str:
        return f"round {min(len(state.history) // config.epochs, config.rounds)}"

    # an epoch may take minutes, and the time left is judged from those of the last hour
    progress = Progress(
        *columns, console=console, disable=not console.is_terminal, speed_estimate_period=3600
    )
    with progress as bar:
        task = bar.add_task(doing(), total=total, completed=len(start.history))
        for state in states:
            state.save(run_dir / "state.safetensors")
            write_metrics(run_dir, list(state.history))
            curves.add(state)
            bar.update(task, advance=1, description=doing())
            if state.epoch == config.epochs or not console.is_terminal:
                console.print(describe(state.history[-1]), highlight=False, soft_wrap=True)
    curves.close()
    return state


def describe(record: dict) -> str:
    """One line of history."""
    text = (
        f"round {record['round']}  epoch {record['epoch']:2}  density {record['density']:7.2%}  "
        f"loss {record['train_loss']:.4f}  validation {record['validation_accuracy']:.2%}"
    )
    return f"{text}  test {record['test_accuracy']:.2%}" if "test_accuracy" in record else text


class _Curves:
    """TensorBoard scalars for every epoch and the masks of every round, if TensorBoard is there."""

    def __init__(self, folder: Path, config: RunConfig, step: int, console: Console):
        self.writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            console.print(
                "no TensorBoard curves: pip install tensorboard to have them", soft_wrap=True
            )
            return
        self.writer = SummaryWriter(folder, purge_step=step + 1)
        self.epochs = config.epochs

    def add(self, state: State) -> None:
        if self.writer is None:
            return
        step = len(state.history)
        for name, value in state.history[-1].items():
            if isinstance(value, float):
                self.writer.add_scalar(name, value, step)
        if state.epoch == self.epochs:
            for name, mask in state.masks.items():
                matrix = mask.flatten(1).float()
                self.writer.add_image(f"mask/{name}", matrix, step, dataformats="HW")
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
