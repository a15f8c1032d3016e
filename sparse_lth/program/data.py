"""Data sets as tensors that live on the training device.

MNIST is read from torchvision's layout, ROOT/MNIST/raw, and every file is checked before it is
used. Where it is absent it is downloaded, into memory first: what reaches the disk is whole.
"""

import gzip
import hashlib
import os
import queue
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import FormatError, file_size

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels in 0..1
VALIDATION = 5000  # of MNIST's 60,000 training images
SPLIT_SEED = 0  # one split for every run, whatever its seed: replicates differ in training only
FILES = {  # name: (bytes, md5), unpacked
    "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
}
# Seconds without a byte, seconds in all (11 MB). `auto` has something to fall back on and gives
# up soon; who asked for `mnist` would rather wait for a slow line.
PATIENCE = {"auto": (5.0, 30.0), "mnist": (30.0, 3600.0)}


class DataError(Exception):
    """The data set cannot be used; the message says why and what to do."""


class DownloadError(DataError):
    """MNIST is not on disk and cannot be fetched."""


@dataclass(frozen=True)
class Split:
    """images: (n, 1, 28, 28) float32, normalised; labels: (n,) int64; both on one device"""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """name: "mnist" or "digits". The test split is for the report: nothing is chosen by it."""

    name: str
    train: Split
    validation: Split
    test: Split


def load(
    name: str,
    root: str | Path,
    device: torch.device | str,
    *,
    notify: Callable[[str], None] = print,
) -> Dataset:
    """The data set `name`, split the same way every time, on `device`.

    mnist: 55,000 train, 5,000 validation, 10,000 test; downloaded into `root` if absent
    digits: scikit-learn's 1,797 digits brought to 28x28; 1,350 train, 150 validation, 297 test
    auto: mnist where it is on disk or quickly downloaded, else digits, and `notify` gets the
        one line that says why

    Raises DataError for a damaged or unreadable file, and where `mnist` cannot be had.
    """
    if name not in ("auto", *SOURCES):
        raise DataError(f"expected dataset auto, {' or '.join(SOURCES)}, got {name}")
    *wanted, last = SOURCES.values() if name == "auto" else [SOURCES[name]]
    for source in wanted:
        try:
            return source.load(root, device, False, notify)
        except DownloadError as error:
            notify(f"{error}; going on with {last.title}")
    return last.load(root, device, True, notify)


def batches(split: Split, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """One epoch as the (batch,) indices of each batch, in an order drawn from the CPU `generator`.

    Every sample comes once; the last batch may be smaller. Gathering batch by batch stays in the
    CPU's cache: four times as fast as shuffling the whole epoch first.
    """
    order = torch.randperm(len(split.labels), generator=generator).to(split.labels.device)
    return order.split(batch_size)


def _split(images: Tensor, labels: Tensor, white: int, device: torch.device | str) -> Split:
    """images: (n, 28, 28), 0..white; labels: (n,) int64"""
    images = images.to(device).float().unsqueeze(1)
    return Split(images.div_(white).sub_(MEAN).div_(STD), labels.to(device))


def _load_mnist(
    root: str | Path, device: torch.device | str, patient: bool, notify: Callable[[str], None]
) -> Dataset:
    try:
        raw = Path(root).expanduser() / "MNIST" / "raw"
    except RuntimeError as error:  # there is no such user
        raise DataError(f"cannot find {root}: {error}") from error
    try:
        _provide(raw, *PATIENCE["mnist" if patient else "auto"], notify)
    except DownloadError as error:
        reason = f"MNIST is not in {raw} and could not be downloaded ({error})"
        if not patient:
            raise DownloadError(reason) from error
        raise DataError(
            f"{reason}; put {', '.join(FILES)} there, unpacked, "
            f"or name the folder of a copy with --data_dir, or choose --dataset digits"
        ) from error
    return _mnist(raw, device)


def _mnist(raw: Path, device: torch.device | str) -> Dataset:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    # Not MNIST(root): it prefers a processed/training.pt, which nobody has checked.
    (images, labels), test = (
        (
            read_image_file(raw / f"{part}-images-idx3-ubyte"),
            read_label_file(raw / f"{part}-labels-idx1-ubyte"),
        )
        for part in ("train", "t10k")
    )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, validation = order[VALIDATION:], order[:VALIDATION]
    return Dataset(
        "mnist",
        _split(images[train], labels[train], 255, device),
        _split(images[validation], labels[validation], 255, device),
        _split(*test, 255, device),
    )


def _digits(device: torch.device | str) -> Dataset:
    from sklearn.datasets import load_digits  # half a second that MNIST need not pay
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)  # (1797, 1, 8, 8), 0..16
    images = F.interpolate(images, size=(28, 28), mode="bilinear").squeeze(1)
    labels = torch.from_numpy(digits.target)

    def hold_out(chosen, size):  # as many of each digit as its share
        return train_test_split(
            chosen, test_size=size, stratify=digits.target[chosen], random_state=SPLIT_SEED
        )

    rest, test = hold_out(range(len(labels)), 297)
    train, validation = hold_out(rest, 150)
    parts = (_split(images[part], labels[part], 16, device) for part in (train, validation, test))
    return Dataset("digits", *parts)


def _provide(raw: Path, silence: float, total: float, notify: Callable[[str], None]) -> None:
    """Leaves every file whole in `raw`. Raises DownloadError, and DataError for a damaged file."""
    missing = [name for name in FILES if not _verified(raw / name)]
    if not missing:
        return
    files = _download(missing, silence, total, lambda: notify(f"downloading MNIST to {raw}"))
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw, prefix=".download-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            for name in files:
                os.replace(Path(folder) / name, raw / name)
    except OSError as error:
        raise DownloadError(f"cannot write there: {error.strerror}") from error


def _verified(path: Path) -> bool:
    """False if there is no such file; raises DataError if it is not what MNIST has."""
    size, md5 = FILES[path.name]
    try:
        found = file_size(path)
        if found == size and _md5(path.read_bytes()) == md5:
            return True
    except FileNotFoundError:
        return False
    except FormatError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    raise DataError(
        f"{path} is damaged: expected {size} bytes with md5 {md5}, got "
        f"{'others' if found == size else f'{found} bytes'}; delete it to have it downloaded again"
    )


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(
    names: list[str], silence: float, total: float, started: Callable[[], None]
) -> dict[str, bytes]:
    """The unpacked files by name; `started` is called once, at the first byte.

    Raises DownloadError after `silence` seconds without a byte, or about `total` in all.
    torchvision's own download has no limit. A socket's timeout does not cover the name lookup,
    which cannot be interrupted: hence a thread, left behind if need be, that touches no disk.
    """
    from torchvision.datasets.mnist import MNIST

    events = queue.SimpleQueue()  # None for each chunk, at last the files or a DownloadError
    limits = silence / len(MNIST.mirrors), time.monotonic() + total  # every mirror has its turn
    threading.Thread(target=_fetch, args=(names, *limits, events), daemon=True).start()
    try:
        event = events.get(timeout=silence)
        if event is None:
            started()
        while event is None:
            event = events.get(timeout=silence)
    except queue.Empty:
        raise DownloadError(f"nothing came for {silence:g} s") from None
    if isinstance(event, DownloadError):
        raise event
    return event


def _fetch(names: list[str], timeout: float, deadline: float, events: queue.SimpleQueue) -> None:
    try:
        events.put({name: _fetch_file(name, timeout, deadline, events) for name in names})
    except DownloadError as error:
        events.put(error)


def _fetch_file(name: str, timeout: float, deadline: float, events: queue.SimpleQueue) -> bytes:
    """The unpacked file, from the first mirror that has it whole."""
    from torchvision.datasets.mnist import MNIST

    failures = []
    for mirror in MNIST.mirrors:
        try:
            packed = _read(f"{mirror}{name}.gz", timeout, deadline, events)
            if _md5(packed) != dict(MNIST.resources)[f"{name}.gz"]:
                raise ValueError(f"{name}.gz came broken, {len(packed)} bytes of it")
            return gzip.decompress(packed)
        except DownloadError:
            raise
        except Exception as error:  # whatever a server or a proxy does wrong, ask the next
            failures.append(f"{urlsplit(mirror).netloc}: {str(error).strip('<>')}")
    raise DownloadError("; ".join(failures))


def _read(url: str, timeout: float, deadline: float, events: queue.SimpleQueue) -> bytes:
    chunks = []
    with urllib.request.urlopen(url, timeout=timeout) as response:
        while chunk := response.read1(1 << 16):  # read() would wait for all of a slow trickle
            chunks.append(chunk)
            events.put(None)
            if time.monotonic() > deadline:
                raise DownloadError("the connection is too slow")
    return b"".join(chunks)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    load: (root, device, patient, notify) -> Dataset; where it is not patient, it may raise a
        DownloadError soon, and `auto` goes on with the next
    title: its name in a sentence
    """

    load: Callable[..., Dataset]
    train_images: int
    title: str


SOURCES = {  # in the order that `auto` tries them
    "mnist": Source(_load_mnist, 55_000, "MNIST"),
    "digits": Source(lambda root, device, *_: _digits(device), 1_350, "scikit-learn's digits"),
}
