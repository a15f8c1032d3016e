"""The folder of a run: one run at a time, and what a killed one leaves there is no obstacle."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import leftovers, read_json, write
from .config import RunConfig, SettingError, is_path

LOCK, CONFIG = ".lock", "config.json"


class FolderError(Exception):
    """The folder cannot be used now; the message says why and what to do."""


def new_folder(out_dir: Path | None) -> Path:
    """out_dir, or by default a new name under runs/; SettingError if it holds something."""
    if out_dir is None:
        return Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
    _expect_path("--out_dir", out_dir)
    try:
        in_use = out_dir.exists() and (not out_dir.is_dir() or _holds_something(out_dir))
    except OSError as error:
        raise SettingError(
            f"--out_dir: expected a new or empty folder, got {out_dir}: {error.strerror}"
        ) from error
    if in_use:
        message = f"--out_dir: expected a new or empty folder, got {out_dir}"
        if can_go_on(out_dir):
            message += f"; to go on with the run in it: {resume_command(out_dir)}"
        raise SettingError(message)
    return out_dir


def _expect_path(flag: str, folder: Path) -> None:
    if not is_path(str(folder)):
        raise SettingError(f"{flag}: expected a path in UTF-8, got {str(folder)!a}")


def _holds_something(folder: Path) -> bool:
    return bool({*folder.iterdir()} - {folder / LOCK, *leftovers(folder)})


@contextmanager
def owned(folder: Path, new: bool) -> Iterator[None]:
    """Inside it the folder exists, and no other run works there; a death, too, gives it free.

    A new run expects it empty. Raises FolderError where another run has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"expected a folder that can be written, got {folder}: {error.strerror}"
        ) from error
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise FolderError(
            f"expected a folder that no other run works in, got {folder}: "
            "wait until that run ends, or choose another --out_dir"
        ) from None
    with lock:
        if new:
            new_folder(folder)
        for path in leftovers(folder):
            path.unlink()
        yield


def save_config(folder: Path, config: RunConfig) -> None:
    write(folder / CONFIG, json.dumps(asdict(config), indent=1))


def load_config(folder: Path, flag: str = "--resume", **others: object) -> RunConfig:
    """The settings of the run in it, but for others; SettingError, of that flag, where none is."""
    _expect_path(flag, folder)
    try:
        return RunConfig.from_dict(read_json(folder / CONFIG) | others)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"{flag}: expected the folder of a run, got {folder}: {error}"
        ) from error


def ticket_path(folder: Path, round: int) -> Path:
    """Where the ticket of this round is, once the round is trained."""
    return folder / f"ticket_round_{round}.safetensors"


def can_go_on(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def resume_command(folder: Path) -> str:
    """What to type into a shell; a name that begins with a dash must not look like a flag."""
    name = str(folder)
    return f"python main.py --resume {shlex.quote(f'./{name}' if name.startswith('-') else name)}"
