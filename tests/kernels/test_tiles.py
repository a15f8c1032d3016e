import json

import pytest
import torch

from sparse_lth.kernels import tiles

H200 = tiles.Device("H200", 90, 132, 232448)
SMALL = tiles.Device("RTX", 86, 82, 101376)
LARGE_BATCH = tiles.BATCHES[-1]


def _case(**changes):
    case = tiles.Case("linear", "bfloat16", 128, 16, LARGE_BATCH, 0.1)
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
    case = _case(op=op, dtype=dtype, batch=batch, height=height, density=0.0)
    tile = tiles.of_case(case, device)
    size = 4 if dtype == "float32" else 2
    rows, cols = tile.block_m, tile.block_k
    if op == "sddmm":
        rows, cols = cols, rows
    if rows > 1:  # one row is summed in registers
        assert tile.stages * cols * (rows + tile.block_n) * size <= device.shared_memory


def test_dense_takes_over_at_high_density_low_blocks_and_large_batches():
    assert not tiles.dense_pays(_case())
    assert not tiles.dense_pays(_case(density=0.5))
    assert tiles.dense_pays(_case(density=1.0))
    assert tiles.dense_pays(_case(height=16, density=0.3))
    assert tiles.dense_pays(_case(height=1, width=1))
    assert not tiles.dense_pays(_case(height=1, width=1, batch=1))


def test_what_was_measured_comes_before_the_table():
    _write(json.dumps({_case().key(): [64, 64, 32, 4, 2], _case(density=0.2).key(): None}))
    assert tiles.of_case(_case(), H200) == (64, 64, 32, 4, 2)
    assert tiles.of_case(_case(density=0.2), H200) is None
    assert tiles.of_case(_case(density=0.05), H200) == tiles.HOPPER["matmul", 2, LARGE_BATCH]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": [1]}', '{"a": [3, 16, 16, 4, 2]}'])
def test_a_broken_file_of_tiles_is_left_aside(text):
    _write(text)
    with pytest.warns(UserWarning, match="not a table of tiles"):
        assert tiles.tuned("H200") == {}


@pytest.mark.parametrize(("programs", "steps", "parts"), [(1000, 100, 1), (8, 100, 8), (8, 9, 2)])
def test_splits(programs, steps, parts):
    assert tiles.splits(programs, steps, H200) == parts


def test_a_small_layer_takes_a_smaller_tile():
    many, few = (tiles.choose(_case(), H200, lambda tile, n=n: n) for n in (1000, 1))
    assert many == tiles.HOPPER["matmul", 2, LARGE_BATCH]
    assert few == tiles.fit(tiles.TABLE["matmul", 2, 64], _case(), H200)


def test_layers_past_32_bit_offsets_are_left_to_the_dense_product():
    def launch(values_shape, grid):
        args = torch.bfloat16, 64, values_shape, grid, torch.device("cpu")
        return tiles.launch("linear", *args)

    assert launch((1, 64, 64), (8, 1 << 10))
    assert launch((1, 64, 64), (8, 1 << 20)) is None  # a row of 2^26 inputs
    assert launch((1, 1 << 16, 1 << 16), (1, 1)) is None  # a block of 2^32 weights
