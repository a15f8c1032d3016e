"""Files that are either whole or absent, and tensors in them that need no pickle."""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import safetensors
import safetensors.torch
from torch import Tensor

DEPTH = 16  # levels of JSON: what we write has five
READERS = {"ticket": "Ticket.load", "model": "load_sparse"}  # of files that users read
SMALL = 1 << 20  # bytes; a file of settings has a few hundred


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
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
        raise


def leftovers(folder: Path) -> list[Path]:
    """What a `write` that was killed has left there, or one that goes on now is writing."""
    return list(folder.glob(f".*.{'[0-9a-f]' * 32}.part"))


def file_size(path: str | Path) -> int:
    """In bytes. OSError if it is absent, FormatError for a folder, a pipe or a device."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise FormatError(f"{path}: expected a file, got a folder, a pipe or a device")
    return about.st_size


def read_json(path: str | Path) -> dict:
    """The JSON object in a small file; OSError, or FormatError for anything else."""
    if (size := file_size(path)) > SMALL:
        raise FormatError(f"{path}: expected at most {SMALL} bytes of JSON, got {size}")
    try:
        return parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise FormatError(f"{path}: expected a JSON object: {error}") from error


def parse_json(text: str | bytes) -> dict:
    """A JSON object of integers of 64 bits and text in UTF-8, nested at most DEPTH deep.

    Raises only ValueError: whoever reads the values need fear none of them.
    """
    try:
        value = json.loads(text, parse_int=_parse_int)
    except RecursionError:
        raise ValueError(f"expected at most {DEPTH} levels") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    _check_json(value, DEPTH)
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= 2**63:
        raise ValueError(f"expected integers of 64 bits, got {digits[:40]}")
    return int(digits)


def _check_json(value: object, levels: int) -> None:
    if isinstance(value, str):
        value.encode()  # raises for half a surrogate pair, which JSON can spell
    if not isinstance(value, dict | list):
        return
    if levels == 0:
        raise ValueError(f"expected at most {DEPTH} levels")
    for child in value:
        _check_json(child, levels - 1)
    if isinstance(value, dict):
        for child in value.values():
            _check_json(child, levels - 1)


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], about: dict) -> None:
    """Safetensors of this kind ("ticket", ...), with `about` as JSON in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {f"sparse_lth.{kind}": json.dumps(about)}  # one key: safetensors does not keep order
    write(path, safetensors.torch.save(tensors, metadata))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """(tensors on the CPU, about), the latter as of `parse_json`.

    Raises OSError if the file cannot be read, FormatError if it is not whole or of another kind.
    """
    file_size(path)
    expected = f"{path}: expected a sparse_lth {kind}"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if f"sparse_lth.{kind}" not in metadata:
                raise FormatError(f"{expected}, got {_describe(metadata)}")
            about = parse_json(metadata[f"sparse_lth.{kind}"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (OSError, FormatError):
        raise
    except Exception as error:  # of a damaged file safetensors and torch raise many kinds
        raise FormatError(f"{expected}, got {error!r}") from error


def _describe(metadata: dict[str, str]) -> str:
    """What safetensors of another kind are."""
    for kind, reader in READERS.items():
        if f"sparse_lth.{kind}" in metadata:
            return f"a {kind}, which {reader} reads"
    return "safetensors of something else"


def split_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix.`, without it."""
    start = f"{prefix}."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def join_groups(owner: object, groups: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of these attributes, dicts by name, each name behind `<group>.`."""
    return {f"{g}.{name}": tensor for g in groups for name, tensor in getattr(owner, g).items()}
