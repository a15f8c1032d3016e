"""Damaged files for whatever reads them: it may refuse them, in the way it says, and no other."""

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEEP = json.loads("[" * 60 + "]" * 60)
ODD = [None, True, 0, 1, -1, 0.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")]
ODD += [
    "",
    "x",
    "\0",
    "\ud800",
    "fc1",
    "F32",
    "I64",
    [],
    [0],
    [-1],
    [2**40, 2**40],
    {},
    {"a": 1},
    DEEP,
]


@dataclass(frozen=True)
class Target:
    """A kind of file: an example, what reads it, the errors that it documents.

    Whatever `load` returns must serve for `use`.
    """

    name: str
    content: bytes
    load: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    use: Callable[[object], object]


def attack(target: Target, folder: Path, count: int, seed: int) -> int:
    """Reads so many damaged files -> the number of those that were accepted.

    AssertionError says which one raised something else, or was accepted and then failed.
    """
    chance, accepted = random.Random(f"{target.name} {seed}"), 0
    path = folder / target.name
    for attempt in range(count):
        path.write_bytes(damage(target.content, chance))
        try:
            loaded = target.load(path)
        except target.errors:
            continue
        except Exception as error:
            raise AssertionError(
                f"{target.name}, attempt {attempt} of seed {seed}, raised {error!r}"
            ) from error
        try:
            target.use(loaded)
        except Exception as error:
            raise AssertionError(
                f"{target.name}, attempt {attempt} of seed {seed}, was accepted and then {error!r}"
            ) from error
        accepted += 1
    return accepted


def damage(content: bytes, chance: random.Random) -> bytes:
    """The file with one thing wrong in its bytes, its JSON or, in safetensors, its header."""
    ways = [_flip, _cut, _insert, _overwrite]
    if _header(content):
        ways += [_change_header] * 3 + [_change_metadata] * 5
    elif content.startswith(b"{"):
        ways += [_change_json] * 4
    return chance.choice(ways)(content, chance)


def _flip(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    # most of a file is numbers, most of what can break a reader stands at its start
    end = chance.choice([8, 64, 2000, len(content)])
    for _ in range(chance.choice([1, 1, 8])):
        damaged[chance.randrange(min(end, len(content)))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def _insert(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + chance.randbytes(chance.choice([1, 8, 100])) + content[at:]


def _overwrite(content: bytes, chance: random.Random) -> bytes:
    at, piece = chance.randrange(len(content)), chance.choice([b"\0", b"\xff", b"[", b'"'])
    return content[:at] + piece * chance.choice([1, 4, 5000]) + content[at + 4 :]


def _change_json(content: bytes, chance: random.Random) -> bytes:
    return _dump(_change(json.loads(content), chance))


def _header(content: bytes) -> dict | None:
    """That of a safetensors file."""
    size = struct.unpack("<Q", content[:8])[0] if len(content) > 8 else 0
    return json.loads(content[8 : 8 + size]) if 0 < size < len(content) else None


def _change_header(content: bytes, chance: random.Random) -> bytes:
    return _with_header(content, _change(_header(content), chance))


def _change_metadata(content: bytes, chance: random.Random) -> bytes:
    """Changes the JSON that stands as text in the header's metadata."""
    header = _header(content)
    key, text = next(iter(header["__metadata__"].items()))
    header["__metadata__"][key] = _dump(_change(json.loads(text), chance)).decode()
    return _with_header(content, header)


def _with_header(content: bytes, header: object) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    text = _dump(header)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def _dump(value: object) -> bytes:
    return json.dumps(value).encode()


def _change(value: object, chance: random.Random) -> object:
    """The JSON value with one thing in it removed, doubled or replaced by something odd."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return chance.choice(ODD)
    value = value.copy()
    key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    way = chance.random()
    if way < 0.1:
        del value[key]
    elif way < 0.2 and isinstance(value, list):
        value.insert(key, value[key])
    elif way < 0.2:
        value[chance.choice(["x", "model", "fc1.values", "\0"])] = value[key]
    else:
        value[key] = _change(value[key], chance)
    return value
