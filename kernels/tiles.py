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
    capability: int  # 80 for 8.0
    processors: int
    shared_memory: int  # bytes a program can have


class Case(NamedTuple):
    """What tiles are chosen and tuned by; batch and density are buckets, by their upper ends."""

    op: str  # "linear", "grad_input" or "sddmm"
    dtype: str  # "float16", "bfloat16" or "float32"
    height: int
    width: int
    batch: int
    density: float

    def key(self) -> str:
        return "/".join(str(field) for field in self)


class Launch(NamedTuple):
    """How a call runs: its grid is programs x splits, `constants` are the kernel's for the tile."""

    programs: int
    splits: int  # parts that each sum is cut into
    constants: dict[str, int]


BATCHES = (1, 16, 64, 512, 1 << 62)
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)

# (kind of op, bytes of a number, batch) -> Tile; `matmul` is linear and grad_input
TABLE = {
    ("matmul", 2, 1): Tile(1, 16, 512, 4, 1),
    ("matmul", 2, 16): Tile(16, 16, 128, 4, 4),
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
HOPPER = {("matmul", 2, BATCHES[-1]): Tile(256, 128, 64, 8, 4)}  # reads the weight half as often

# Rates that set where a dense product wins: an H200's, in bytes and FLOP per second
L2, HBM, TENSOR, FP32 = 5.5e12, 4.8e12, 700e12, 50e12

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
    call, found = case(op, dtype, batch, values_shape, grid), device_of(device)
    across = block_cols if op == "grad_input" else block_rows

    def programs(tile: Tile) -> int:
        down = -(-inputs // tile.block_k) if op == "sddmm" else -(-batch // tile.block_m)
        return down * across * -(-call.height // tile.block_n)

    # the number of tiles of an `sddmm` does not grow with the batch, so a smaller batch has no say
    tile = of_case(call, found) if op == "sddmm" else choose(call, found, programs, activation)
    if tile is None:
        return None
    parts = 1
    if op == "linear":
        parts = splits(programs(tile), nnz * C // (block_rows * tile.block_k), found)
    elif op == "sddmm":  # of which only those with a kept block have work
        kept = -(-nnz * C // tile.block_k) * -(-R // tile.block_n)
        parts = splits(kept, batch // tile.block_m, found)
    return Launch(programs(tile), parts, constants(tile))


def case(
    op: str,
    dtype: torch.dtype,
    batch: int,
    values_shape: tuple[int, int, int],
    grid: tuple[int, int],
) -> Case:
    """Which line of the table a call falls under; the arguments are those of `launch`."""
    nnz, C, R = values_shape
    height, width = (C, R) if op == "grad_input" else (R, C)
    density = 0.99 * nnz / (grid[0] * grid[1])  # whole blocks round a density up
    name = str(dtype).removeprefix("torch.")
    return Case(op, name, height, width, bucket(batch, BATCHES), bucket(density, DENSITIES))


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
) -> Tile | None:
    """The tile for a case, fitted to the block and the device; None if dense is faster.

    programs: how many a tile makes; where they are too few to fill the device, the layer is small
    and takes the tile of a smaller batch.
    """
    tile = of_case(case, device, activation)
    smaller = [batch for batch in (64, 512) if batch < case.batch]
    while tile and smaller and programs(tile) < device.processors:
        tile = of_case(case._replace(batch=smaller.pop()), device, activation) or tile
    return tile


def of_case(case: Case, device: Device, activation: str = "none") -> Tile | None:
    """The measured tile of a case if there is one, else that of the table."""
    tile = tuned(device.name).get(case.key(), "table")
    if tile == "table":
        tile = None if dense_pays(case) else _from_table(case, device, activation)
    return None if tile is None else fit(tile, case, device)


def _from_table(case: Case, device: Device, activation: str) -> Tile:
    size = 4 if case.dtype == "float32" else 2
    if case.op == "sddmm":
        return TABLE["sddmm", size]
    # the row of batch 1 is a sum, not a product of tiles; only `linear` has it
    batch = 16 if case.op == "grad_input" and case.batch == 1 else case.batch
    key = ("matmul", size, batch)
    tall = case.height >= 128 and 90 <= device.capability < 120  # sm_120 has no wgmma: it spills
    roomy = case.width >= 8 and activation != "gelu"  # else its registers spill
    return HOPPER.get(key, TABLE[key]) if tall and roomy else TABLE[key]


def fit(tile: Tile, case: Case, device: Device) -> Tile:
    """`tile` no wider than the block, with as many stages as the shared memory holds.

    On a narrow block 8 warps would leave a thread less than 16 bytes of weights to load.
    """
    block_n = min(tile.block_n, max(16, 1 << (case.height - 1).bit_length()))
    if case.op == "sddmm":
        loaded = tile.block_m * (tile.block_k + block_n)
    else:
        loaded = tile.block_k * (tile.block_m + block_n)
    size = 4 if case.dtype == "float32" else 2
    stages = max(1, min(tile.stages, device.shared_memory // (loaded * size)))
    warps = tile.warps if block_n > 32 else min(4, tile.warps)
    return tile._replace(block_n=block_n, warps=warps, stages=stages)


def dense_pays(case: Case) -> bool:
    """Whether a dense product over the unpacked weight should be the faster, by its limits.

    Per weight: a kept one costs `batch` reads from L2 of an input, 32 bytes of a row at least,
    over the height of its block, and of itself, over 256 rows; a dense one its share of cuBLAS,
    and of writing and reading the weight.
    """
    size = 4 if case.dtype == "float32" else 2
    batch = min(case.batch, 4096)
    read = max(32 / case.width, size) / case.height + size / 256
    gather = batch * case.density * read / L2
    compute = 2 * batch / (FP32 if size == 4 else TENSOR)
    rate = 2 if size == 4 else 1  # without tensor cores, about half of cuBLAS
    return max(gather, rate * case.density * compute) > compute + 4 * size / HBM


def bucket(amount: float, ends: tuple) -> float:
    return next((end for end in ends if amount <= end), ends[-1])


def splits(programs: int, steps: int, device: Device) -> int:
    """Into how many parts to cut sums of `steps` steps, so that few programs fill the device."""
    parts = min(8, 2 * device.processors // max(1, programs), steps // 4)
    return 1 << (max(1, parts).bit_length() - 1)


@functools.cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":  # the interpreter
        return Device("interpreter", 80, 108, 166912)
    found = torch.cuda.get_device_properties(device)
    memory = getattr(found, "shared_memory_per_block_optin", 101376)
    capability = 10 * found.major + found.minor
    return Device(found.name, capability, found.multi_processor_count, memory)


def tuned_path(name: str) -> Path:
    """Where `python -m benchmarks.tune` leaves what it measured on the GPU of this name."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sparse_lth" / f"tiles-{name.replace(' ', '-')}.json"


@functools.cache
def tuned(name: str) -> dict[str, Tile | None]:
    """The measured tiles of this GPU by `Case.key`, read once; None where dense was faster."""
    path = tuned_path(name)
    try:
        found = json.loads(path.read_text())
        return {key: tile and _checked(tile) for key, tile in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is not a table of tiles, going on without: {error}", stacklevel=2)
        return {}


def _checked(tile: list[int]) -> Tile:
    sizes = Tile(*tile)
    if not all(math.log2(size).is_integer() for size in sizes[:4]) or not 1 <= sizes.stages <= 8:
        raise ValueError(f"expected four powers of two and 1 to 8 stages, got {tile}")
    return sizes
