import json

import pytest
import torch

from sparse_lth.kernels import tiles

H200 = tiles.Device("H200", 90, 132, 232448)
SMALL = tiles.Device("RTX", 86, 82, 101376)
LARGE_BATCH = tiles.BATCHES[-1]


def _case(**changes):
    case = tiles.Case("linear", "bfloat16", 128, 16, LARGE_BATCH)
    return case._replace(**changes)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (tiles.tuned, tiles.launch):
        cached.cache_clear()
    yield
    for cached in (tiles.tuned, tiles.launch):
        cached.cache_clear()


def _write(text):
    path = tiles.tuned_path("H200")
    path.parent.mkdir(parents=True)
    path.write_text(text)


@pytest.mark.parametrize("op", ["linear", "grad_input", "sddmm"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("batch", tiles.BATCHES)
@pytest.mark.parametrize("height", [1, 16, 48, 128, 500])
@pytest.mark.parametrize("device", [H200, SMALL])
def test_every_case_has_a_tile_that_fits(op, dtype, batch, height, device):
    case = _case(op=op, dtype=dtype, batch=batch, height=height)
    tile = tiles.of_case(case, device)
    size = 4 if dtype == "float32" else 2
    rows, cols = tile.block_m, tile.block_k
    if op == "sddmm":
        rows, cols = cols, rows
    if rows > 1:  # one row is summed in registers
        assert tile.stages * cols * (rows + tile.block_n) * size <= device.shared_memory


@pytest.mark.parametrize(
    ("height", "width", "dtype", "batch", "crossover"),
    [
        (16, 16, "bfloat16", 4096, 0.16),
        (32, 32, "bfloat16", 4096, 0.32),
        (64, 64, "bfloat16", 4096, 0.64),
        (64, 16, "bfloat16", 4096, 0.64),
        (128, 16, "bfloat16", 4096, 0.93),
        (128, 64, "float16", 4096, 0.93),
        (16, 1, "bfloat16", 4096, 0.010),  # a sector of 32 bytes for 2
        (1, 1, "bfloat16", 4096, 0.00064),
        (16, 16, "bfloat16", 1 << 20, 0.14),  # the weight is unpacked once for all rows
        (16, 16, "bfloat16", 256, 0.50),
        (16, 16, "float32", 4096, 0.52),
        (128, 64, "float32", 4096, 0.52),  # no tensor cores: cuBLAS takes half the time
    ],
)
def test_density_above_which_dense_takes_over(height, width, dtype, batch, crossover):
    case = tiles.case("linear", getattr(torch, dtype), batch, (1, width, height))
    found = tiles.crossover(case, batch, tiles.of_case(case, H200), H200)
    assert found == pytest.approx(crossover, rel=0.05)


@pytest.mark.parametrize("op", ["linear", "grad_input"])
def test_a_layer_is_dense_from_its_own_crossover_on(op, monkeypatch):
    """At its own density and its own batch, not at the ends of their buckets."""
    asked = []
    monkeypatch.setattr(tiles, "crossover", lambda case, batch, *_: asked.append(batch) or 0.31)
    args = op, torch.bfloat16, 700
    grid, device = (10, 10), torch.device("cpu")
    assert tiles.launch(*args, (31, 16, 16), grid, device)
    assert tiles.launch(*args, (32, 16, 16), grid, device) is None
    assert asked == [700, 700]


def test_what_was_measured_comes_before_the_table():
    _write(json.dumps({_case().key(): [[64, 64, 32, 4, 2], 0.42]}))
    assert tiles.of_case(_case(), H200) == (64, 64, 32, 4, 2)
    assert tiles.crossover(_case(), 4096, tiles.of_case(_case(), H200), H200) == 0.42
    assert tiles.of_case(_case(width=64), H200) == tiles.HIGH


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": [1]}', '{"a": null}', '{"a": [[3, 16, 16, 4, 2], 0.5]}']
)
def test_a_broken_file_of_tiles_is_left_aside(text):
    _write(text)
    with pytest.warns(UserWarning, match="not a table of tiles"):
        assert tiles.tuned("H200") == {}


@pytest.mark.parametrize(
    ("programs", "steps", "parts"), [(1000, 100, 1), (8, 100, 8), (8, 9, 2), (1, 15, 2)]
)
def test_splits(programs, steps, parts):
    assert tiles.splits(programs, steps, H200) == parts


def test_a_tile_is_of_powers_of_two():
    for tile in (*tiles.TABLE.values(), tiles.HIGH, tiles.LOW):
        assert all(size & (size - 1) == 0 for size in tile[:4]), tile


@pytest.mark.parametrize(
    ("height", "block_n"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (128, 128), (500, 128)]
)
def test_a_tile_is_as_wide_as_the_block_or_the_next_power_of_two(height, block_n):
    assert tiles.fit(tiles.HIGH, _case(height=height), H200).block_n == block_n


def test_only_linear_sums_single_rows():
    assert tiles.of_case(_case(batch=1), H200).block_m == 1
    assert tiles.of_case(_case(op="grad_input", batch=1), H200).block_m == 16


def test_a_small_layer_takes_a_smaller_tile():
    many, few = (tiles.choose(_case(), H200, lambda tile, n=n: n) for n in (1000, 1))
    assert many == tiles.HIGH
    assert few == tiles.fit(tiles.TABLE["matmul", 2, 64], _case(), H200)


def test_layers_past_32_bit_offsets_are_left_to_the_dense_product():
    def launch(values_shape, grid):
        args = torch.bfloat16, 64, values_shape, grid, torch.device("cpu")
        return tiles.launch("linear", *args)

    assert launch((1, 64, 64), (8, 1 << 10))
    assert launch((1, 64, 64), (8, 1 << 20)) is None  # a row of 2^26 inputs
    assert launch((1, 1 << 16, 1 << 16), (1, 1)) is None  # a block of 2^32 weights
