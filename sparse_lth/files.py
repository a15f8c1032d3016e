"""Files that are either whole or absent, and tensors in them that need no pickle."""

import json
import os
from pathlib import Path
from uuid import uuid4

import safetensors
import safetensors.torch
from torch import Tensor


class FormatError(ValueError):
    """A file does not hold what it should; the message names the file and what is wrong."""


class TicketError(FormatError):
    """A file holds no whole ticket, or no whole model; the message says what is wrong."""


def write(path: str | Path, content: bytes | str) -> None:
    """Replaces the file in one step: a reader, or a crash, sees the old content or the new.

    Raises OSError naming the file, and leaves the old content, when the disk is full.
    """
    path = Path(path)
    # a name of its own: a lost worker may still be at the same file as the one that replaces it
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], about: dict) -> None:
    """Safetensors of this kind ("ticket", ...), with `about` as JSON in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {f"sparse_lth.{kind}": json.dumps(about)}  # one key: safetensors does not keep order
    write(path, safetensors.torch.save(tensors, metadata))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """(tensors on the CPU, about); FormatError for a file that is not whole or of another kind."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[f"sparse_lth.{kind}"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise FormatError(f"{path}: expected a sparse_lth {kind}, got {error!r}") from error


def split_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix.`, without it."""
    start = f"{prefix}."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def join_groups(owner: object, groups: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of these attributes, dicts by name, each name behind `<group>.`."""
    return {f"{g}.{name}": tensor for g in groups for name, tensor in getattr(owner, g).items()}
