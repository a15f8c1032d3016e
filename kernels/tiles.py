"""Which tile a Triton kernel uses: a table, the user's own measurements over it, and the limits.

A block of `height` outputs x `width` inputs means what the kernel sees: (R, C) for `linear` and
`sddmm`, (C, R) for `grad_input`, whose outputs are the layer's inputs.
"""

import functools
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program computes a step on; a block narrower than block_n shrinks block_n to it."""

    block_m: int  # rows of the batch
    block_n: int  # outputs, of one block
    block_k: int  # inputs, of as many blocks as it takes
    warps: int
    stages: int


class Device(NamedTuple):
    """What a choice depends on."""

    name: str
    capability: int  # of an NVIDIA GPU, 80 for 8.0; else 0
    processors: int
    shared_memory: int  # bytes a program can have


class Case(NamedTuple):
    """What tiles are chosen and tuned by."""

    op: str  # "linear", "grad_input" or "sddmm"
    dtype: str  # "float16", "bfloat16" or "float32"
    height: int
    width: int
    batch: int  # one of BATCHES, the first that is not less

    def key(self) -> str:
        return "/".join(str(field) for field in self)

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2


class Tuned(NamedTuple):
    """What `python -m benchmarks.tune` measured of a case."""

    tile: Tile
    crossover: float  # the density above which the dense product was faster


class Launch(NamedTuple):
    """How a call runs: its grid is programs x splits, `constants` are the kernel's for the tile."""

    programs: int
    splits: int  # parts that each sum is cut into
    constants: dict[str, int]


BATCHES = (1, 16, 64, 512, 1 << 62)

# (kind of op, bytes of a number, batch) -> Tile; `matmul` is linear and grad_input
TABLE = {
    ("matmul", 2, 1): Tile(1, 16, 512, 4, 1),
    ("matmul", 2, 16): Tile(16, 32, 128, 4, 4),
    ("matmul", 2, 64): Tile(64, 32, 64, 4, 4),
    ("matmul", 2, 512): Tile(64, 64, 64, 4, 4),
    ("matmul", 2, BATCHES[-1]): Tile(128, 128, 64, 8, 4),
    ("matmul", 4, 1): Tile(1, 16, 256, 4, 1),
    ("matmul", 4, 16): Tile(16, 16, 64, 2, 4),
    ("matmul", 4, 64): Tile(64, 32, 32, 4, 3),
    ("matmul", 4, 512): Tile(64, 64, 16, 4, 3),
    ("matmul", 4, BATCHES[-1]): Tile(128, 128, 16, 8, 3),
    ("sddmm", 2): Tile(64, 128, 128, 8, 4),
    ("sddmm", 4): Tile(16, 128, 128, 8, 3),
}
# for large batches in 16 bits on sm_90 and sm_100: 256 rows read the weight half as often
HIGH, LOW = Tile(256, 128, 64, 8, 3), Tile(256, 32, 64, 4, 3)  # blocks from 128 up, up to 32

# What sets where a dense product wins, measured on an H200 (kernels/README.md): bytes and FLOP per
# second of cuBLAS, of these kernels on tall blocks, and of the gathering of inputs
HBM, TENSOR, FP32 = 4.8e12, 790e12, 50e12
GATHER, OF_CUBLAS = 7e12, {2: 0.8, 4: 0.5}

# Rows of more numbers would take offsets within a tile of 256 rows past 32 bits
LONGEST_ROW = 1 << 23


@functools.lru_cache(4096)
def launch(
    op: str,
    dtype: torch.dtype,
    batch: int,
    values_shape: tuple[int, int, int],
    grid: tuple[int, int],
    device: torch.device,
    activation: str = "none",
) -> Launch | None:
    """How to run a call, or None if a dense product is to; remembered, to make a call cheap.

    values_shape: (nnz, C, R); grid: (block_rows, block_cols)
    """
    (nnz, C, R), (block_rows, block_cols) = values_shape, grid
    inputs = block_cols * C
    if max(inputs, block_rows * R) > LONGEST_ROW or max(inputs * R, batch) >= 1 << 31:
        return None
    call, found = case(op, dtype, batch, values_shape), device_of(device)
    across = block_cols if op == "grad_input" else block_rows

    def programs(tile: Tile) -> int:
        down = -(-inputs // tile.block_k) if op == "sddmm" else -(-batch // tile.block_m)
        return down * across * -(-call.height // tile.block_n)

    # the number of tiles of an `sddmm` does not grow with the batch, so a smaller batch has no say
    tile = of_case(call, found) if op == "sddmm" else choose(call, found, programs, activation)
    if nnz > crossover(call, batch, tile, found) * block_rows * block_cols:
        return None
    parts = 1
    if op == "linear":
        parts = splits(programs(tile), nnz * C // (block_rows * tile.block_k), found)
    elif op == "sddmm":  # of which only those with a kept block have work
        kept = -(-nnz * C // tile.block_k) * -(-R // tile.block_n)
        parts = splits(kept, batch // tile.block_m, found)
    return Launch(programs(tile), parts, constants(tile))


def case(op: str, dtype: torch.dtype, batch: int, values_shape: tuple[int, int, int]) -> Case:
    """Which line of the table a call falls under; the arguments are those of `launch`."""
    _, C, R = values_shape
    height, width = (C, R) if op == "grad_input" else (R, C)
    name = str(dtype).removeprefix("torch.")
    return Case(op, name, height, width, next(end for end in BATCHES if batch <= end))


def constants(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def choose(
    case: Case, device: Device, programs: Callable[[Tile], int], activation: str = "none"
) -> Tile:
    """The tile for a case, fitted to the block and the device.

    programs: how many a tile makes; where they are too few to fill the device, the layer is small
    and takes the tile of a smaller batch.
    """
    tile = of_case(case, device, activation)
    smaller = [batch for batch in (64, 512) if batch < case.batch]
    while smaller and programs(tile) < device.processors:
        tile = of_case(case._replace(batch=smaller.pop()), device, activation)
    return tile


def of_case(case: Case, device: Device, activation: str = "none") -> Tile:
    """The measured tile of a case if there is one, else that of the table."""
    measured = tuned(device.name).get(case.key())
    tile = measured.tile if measured else _from_table(case, device, activation)
    return fit(tile, case, device)


def _from_table(case: Case, device: Device, activation: str) -> Tile:
    if case.op == "sddmm":
        return TABLE["sddmm", case.itemsize]
    # the row of batch 1 is a sum, not a product of tiles; only `linear` has it
    batch = 16 if case.op == "grad_input" and case.batch == 1 else case.batch
    hopper = 90 <= device.capability < 120  # sm_120 has no wgmma: 256 rows spill there
    roomy = case.width >= 8 and activation != "gelu"  # else its registers spill
    fitting = HIGH if case.height >= 128 else LOW if case.height <= 32 else None
    if fitting and batch == BATCHES[-1] and case.itemsize == 2 and hopper and roomy:
        return fitting
    return TABLE["matmul", case.itemsize, batch]


def fit(tile: Tile, case: Case, device: Device) -> Tile:
    """`tile` no wider than the block, with as many stages as the shared memory holds.

    On a low block 8 warps would leave a thread less than 16 bytes of weights to load.
    """
    block_n = min(tile.block_n, max(16, 1 << (case.height - 1).bit_length()))
    if case.op == "sddmm":
        loaded = tile.block_m * (tile.block_k + block_n)
    else:
        loaded = tile.block_k * (tile.block_m + block_n)
    stages = max(1, min(tile.stages, device.shared_memory // (loaded * case.itemsize)))
    few = 64 if case.op != "sddmm" and case.width >= 8 else 32
    warps = min(4, tile.warps) if block_n <= few else tile.warps
    return tile._replace(block_n=block_n, warps=warps, stages=stages)


def crossover(case: Case, batch: int, tile: Tile, device: Device) -> float:
    """The density above which a dense product over the unpacked weight should be the faster.

    As measured if it was, else by a model. A kept weight costs the reading of `batch` inputs, a
    sector of 32 bytes at least, shared by the outputs of its block that the tile has; or its
    arithmetic, where that is longer. A dense one costs its share of cuBLAS, and of writing and
    reading the weight.
    """
    measured = tuned(device.name).get(case.key())
    if measured:
        return measured.crossover
    size = case.itemsize
    compute = 2 * batch / (FP32 if size == 4 else TENSOR)
    gather = batch * max(32 / case.width, size) / min(case.height, tile.block_n) / GATHER
    return (compute + 4 * size / HBM) / max(gather, compute / OF_CUBLAS[size])


def splits(programs: int, steps: int, device: Device) -> int:
    """Into how many parts to cut sums of `steps` steps, so that few programs fill the device."""
    parts = min(8, 2 * device.processors // max(1, programs), steps // 4)
    return 1 << (max(1, parts).bit_length() - 1)


@functools.cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":  # the interpreter
        return Device("interpreter", 80, 108, 166912)
    found = torch.cuda.get_device_properties(device)
    memory = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    capability = 0 if torch.version.hip else 10 * found.major + found.minor
    return Device(found.name, capability, found.multi_processor_count, memory)


def tuned_path(name: str) -> Path:
    """Where `python -m benchmarks.tune` leaves what it measured on the GPU of this name."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sparse_lth" / f"tiles-{name.replace(' ', '-')}.json"


@functools.cache
def tuned(name: str) -> dict[str, Tuned]:
    """What was measured on this GPU, by `Case.key`; read once."""
    path = tuned_path(name)
    try:
        return {key: _checked(*found) for key, found in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is not a table of tiles, going on without: {error}", stacklevel=2)
        return {}


def _checked(tile: list[int], crossover: float) -> Tuned:
    sizes = Tile(*tile)
    if not all(math.log2(size).is_integer() for size in sizes[:4]) or not 1 <= sizes.stages <= 8:
        raise ValueError(f"expected four powers of two and 1 to 8 stages, got {tile}")
    return Tuned(sizes, float(crossover))
