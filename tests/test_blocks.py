"""The comparison of block tickets with unstructured ones."""

import math
from dataclasses import replace

import pytest

from sparse_lth.experiments import blocks
from sparse_lth.experiments.blocks import BLOCK_RECIPE, KEPT, Recipe
from sparse_lth.experiments.blocks_table import compare, draw, report
from sparse_lth.program.means import Mean

SINGLE = Recipe((1, 1), 0.2, "alone", KEPT | {"epochs": 1, "prune_rounds": 1})
BLOCKS = Recipe((16, 16), 0.2, "with lasso", BLOCK_RECIPE | {"epochs": 1, "prune_rounds": 1})


def row(recipe, seed, accuracy):
    values = ("digits", recipe.name, seed, recipe.density, 0.5, accuracy, 0.99)
    return dict(zip(blocks.COLUMNS, values, strict=True))


def test_differences_are_of_the_same_seed_and_have_students_interval():
    rows = [row(SINGLE, seed, a) for seed, a in enumerate((0.90, 0.92, 0.97))]
    rows += [row(BLOCKS, seed, a) for seed, a in ((2, 0.98), (1, 0.92), (0, 0.92), (7, 0.10))]
    single, block = compare(rows, [SINGLE, BLOCKS])
    # of 90, 92, 97: sd 3.606, t 4.303; of the differences 2, 0, 1: sd 1
    assert single.accuracy.text(".2f") == "93.00 ± 8.96"
    assert (single.seeds, single.difference) == (3, None)
    assert single.kept == pytest.approx(20)
    assert block.seeds == 4
    assert block.difference.text(".2f", sign="+") == f"+1.00 ± {4.303 / math.sqrt(3):.2f}"


def test_the_picture_has_a_line_for_each_way_through_its_densities_and_the_dense_network():
    sparser = replace(SINGLE, density=0.1)
    rows = [row(SINGLE, 0, 0.9), row(SINGLE, 1, 0.92), row(sparser, 0, 0.8), row(BLOCKS, 0, 0.7)]
    times = {SINGLE.name: 4.0, sparser.name: 2.0, BLOCKS.name: 3.0, blocks.DENSE: 30.0}
    times = {name: {"latency_us": time} for name, time in times.items()}
    lines = [*compare(rows, [SINGLE, sparser, BLOCKS])]
    (axes,) = draw(lines, times, Mean.of([99.0])).axes
    drawn = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert drawn == {
        "1x1, alone": [[4, 91], [2, 80]],
        "16x16, with lasso": [[3, 70]],
        "dense": [[30, 99]],
    }
    assert axes.get_ylim() == (97, 100)
    assert axes.get_title() == "not shown, below 97.0 %: 1x1 at 20 %, 16x16 at 20 %, 1x1 at 10 %"


def test_every_recipe_is_one_of_a_run_and_each_has_something_to_be_held_against():
    assert len({recipe.name for recipe in blocks.RECIPES}) == len(blocks.RECIPES)
    for recipe in blocks.RECIPES:
        assert recipe.config(seed=0).epochs == 4
        first = next(other for other in blocks.RECIPES if other.density == recipe.density)
        assert (first.blocksize, first.settings) == ((1, 1), KEPT)


@pytest.mark.slow
def test_what_is_trained_is_not_trained_again_and_all_of_it_is_timed(tmp_path, capsys):
    blocks.run(tmp_path, [SINGLE], 1, 1, "digits", "data")
    before = blocks.read_rows(tmp_path / "blocks.csv")
    blocks.run(tmp_path, [SINGLE, BLOCKS], 1, 1, "digits", "data")
    after = blocks.read_rows(tmp_path / "blocks.csv")
    assert len(before) == 1
    assert before[0] in after
    kept = {row["recipe"]: row["kept"] for row in after}
    assert kept[SINGLE.name] == pytest.approx(0.2, abs=1e-3)
    # the last layer, of 1,000 weights, is smaller than a block; a block more or less is 1e-3
    assert kept[BLOCKS.name] == pytest.approx((0.2 * 265_200 + 1000) / 266_200, abs=1.5e-3)
    blocks.measure(tmp_path, [SINGLE, BLOCKS], "digits")
    report(tmp_path, [SINGLE, BLOCKS], "digits")
    shown = capsys.readouterr().out
    assert "with lasso" in shown
    assert shown.count("x") >= 3
    assert (tmp_path / "blocks.png").exists()
