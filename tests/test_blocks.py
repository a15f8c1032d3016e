"""The comparison of block tickets with unstructured ones."""

import math

import pytest

from sparse_lth.experiments import blocks, results
from sparse_lth.experiments.blocks import BLOCK_RECIPE, KEPT, Recipe

SINGLE = Recipe((1, 1), 0.2, "alone", KEPT | {"epochs": 1, "prune_rounds": 1})
BLOCKS = Recipe((8, 4), 0.2, "with lasso", BLOCK_RECIPE | {"epochs": 1, "prune_rounds": 1})


def row(recipe, seed, accuracy):
    values = ("digits", recipe.name, seed, recipe.density, 0.5, accuracy)
    return dict(zip(blocks.COLUMNS, values, strict=True))


def test_differences_are_of_the_same_seed_and_have_students_interval():
    rows = [row(SINGLE, seed, a) for seed, a in enumerate((0.90, 0.92, 0.97))]
    rows += [row(BLOCKS, seed, a) for seed, a in ((2, 0.98), (1, 0.92), (0, 0.92), (7, 0.10))]
    single, block = blocks.compare(rows, [SINGLE, BLOCKS])
    # of 90, 92, 97: sd 3.606, t 4.303; of the differences 2, 0, 1: sd 1
    assert single == ("1x1", "20 %", "alone", "3", "93.00 ± 8.96", "")
    assert block[:4] == ("8x4", "20 %", "with lasso", "4")
    assert block[5] == f"+1.00 ± {4.303 / math.sqrt(3):.2f}"


def test_every_recipe_is_one_of_a_run_and_each_has_something_to_be_held_against():
    assert len({recipe.name for recipe in blocks.RECIPES}) == len(blocks.RECIPES)
    for recipe in blocks.RECIPES:
        assert recipe.config(seed=0).epochs == 4
        first = next(other for other in blocks.RECIPES if other.density == recipe.density)
        assert (first.blocksize, first.settings) == ((1, 1), KEPT)


@pytest.mark.slow
def test_what_is_trained_is_not_trained_again(tmp_path, capsys):
    path = tmp_path / "blocks.csv"
    blocks.run(path, [SINGLE], 1, 1, "digits", "data")
    before = results.read_rows(path, blocks.COLUMNS)
    blocks.run(path, [SINGLE, BLOCKS], 1, 1, "digits", "data")
    after = results.read_rows(path, blocks.COLUMNS)
    assert len(before) == 1
    assert before[0] in after
    assert capsys.readouterr().out.count("seed 0") == 2
    blocks.print_table(path, [SINGLE, BLOCKS], "digits")
    assert "with lasso" in capsys.readouterr().out
