"""What a run leaves behind while it goes on: its state, its metrics, curves, and a sign of life."""

import json
import socket
import time
from bisect import bisect
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import accumulate
from pathlib import Path

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import write
from ..weights import weight_name
from .flags import plain
from .folder import ticket_path
from .lottery import Lottery, State
from .tickets import make_ticket


class Console(rich.console.Console):
    """rich's, except that it says when nobody reads on: rich's own exits without a word."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError in whose handler rich calls this


def write_metrics(run_dir: Path, records: list[dict]) -> None:
    """metrics.jsonl: a JSON object a line, whole at any moment."""
    write(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def watch(
    states: Iterator[State], lottery: Lottery, start: State, run_dir: Path, console: Console
) -> State:
    """Runs the search to its end, saving each state before the next begins; returns the last.

    On a terminal a bar is shown, elsewhere a line is printed for every evaluation.
    """
    ends = [*accumulate(lottery.evaluations)]
    curves = _Curves(run_dir / "tensorboard", lottery.steps, console)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("evaluations"),
        TimeRemainingColumn(),
    )
    state = start

    def doing() -> str:
        return f"round {min(bisect(ends, len(state.history)), len(ends) - 1)}"

    # an epoch may take minutes, and the time left is judged from those of the last hour
    progress = Progress(
        *columns, console=console, disable=not console.is_terminal, speed_estimate_period=3600
    )
    with progress as bar, closing(curves):
        task = bar.add_task(doing(), total=ends[-1], completed=len(start.history))
        for state in states:
            if state.step == lottery.steps and "control" not in state.history[-1]:
                make_ticket(state).save(ticket_path(run_dir, state.round))
            state.save(run_dir / "state.safetensors")
            write_metrics(run_dir, list(state.history))
            curves.add(state)
            bar.update(task, advance=1, description=doing())
            if state.step == lottery.steps or not console.is_terminal:
                console.print(describe(state.history[-1]), highlight=False, soft_wrap=True)
    return state


def describe(record: dict) -> str:
    """One line of history."""
    text = (
        f"round {record['round']}  epoch {record['epoch']:2}  density {record['density']:7.2%}  "
        f"loss {record['train_loss']:.4f}  validation {record['validation_accuracy']:.2%}"
    )
    text = f"{text}  {record['control']}" if "control" in record else text
    return f"{text}  test {record['test_accuracy']:.2%}" if "test_accuracy" in record else text


class _Curves:
    """TensorBoard's curves: each round, and each control, is a run of its own, to lie side by side.

    After every epoch its scalars and histograms of the weights that are kept; after the last one of
    a round its masks and, beside the settings as hparams, what it came to.

    Where they cannot be written, one line says so and the run goes on. That is why the events are
    written here: SummaryWriter has a thread of its own, which ends in a traceback on a full disk.
    """

    def __init__(self, folder: Path, steps: int, console: Console):
        self.folder, self.steps, self.console = folder, steps, console
        self.run, self.records = None, None  # of the file that is open
        self.given_up = False

    def add(self, state: State) -> None:
        if self.given_up:
            return
        try:
            record = state.history[-1]
            run = "_".join(filter(None, (f"round_{state.round}", record.get("control"))))
            if run != self.run:
                self._open(run, state.epoch)
            self._add(state)
            self.records.flush()
        except ImportError:
            self._give_up("pip install tensorboard to have them")
        except OSError as error:
            self._give_up(error)

    def _open(self, run: str, epoch: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.close()
        folder = self.folder / run
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self.event, self.records = Event, RecordWriter(open(folder / name, "wb"))  # noqa: SIM115
        self.run = run
        self._write(file_version="brain.Event:2")
        # what a run that was killed has from this step on, TensorBoard drops
        self._write(step=epoch, session_log=SessionLog(status=SessionLog.START))

    def _add(self, state: State) -> None:
        from torch.utils.tensorboard import summary

        record = state.history[-1]
        figures = {name: value for name, value in record.items() if isinstance(value, float)}
        parts = [summary.scalar(name, value) for name, value in figures.items()]
        for name, mask in state.masks.items():
            kept = state.weights[weight_name(name)][mask].cpu().numpy()
            parts.append(summary.histogram(f"weights/{name}", kept, bins=64))
        if state.step == self.steps:
            for name, mask in state.masks.items():
                matrix = mask.flatten(1).float()
                parts.append(summary.image(f"mask/{name}", matrix, dataformats="HW"))
            settings = {"round": state.round, "density": record["density"]}
            settings |= {name: plain(value) for name, value in state.settings.items()}
            parts += summary.hparams(settings, figures)
        for part in parts:
            self._write(step=state.epoch, summary=part)

    def close(self) -> None:
        if self.records is not None:
            with suppress(OSError):  # of what is left to write, when the disk is full
                self.records.close()
            self.records = None

    def _write(self, **content) -> None:
        event = self.event(wall_time=time.time(), **content)
        self.records.write(event.SerializeToString())

    def _give_up(self, reason: object) -> None:
        self.close()
        self.given_up = True
        self.console.print(
            f"no TensorBoard curves: {reason}", markup=False, highlight=False, soft_wrap=True
        )
