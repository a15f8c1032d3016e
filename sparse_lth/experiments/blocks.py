"""Block tickets beside unstructured ones of the same density, trained alike from the same seeds."""

import multiprocessing
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..masks import density
from ..program.config import BLOCK_RECIPE, RunConfig
from ..program.lottery import Lottery
from ..program.means import Mean
from . import results
from .engine import follow_parent, load_once

COLUMNS = ("dataset", "recipe", "seed", "density", "validation_accuracy", "test_accuracy")
KEPT = {"rewind": "weights", "last_lr": "linear"}  # what is best for single weights, too


@dataclass(frozen=True)
class Recipe:
    """A way to a ticket of this density: 5 rounds after the dense one, 4 epochs each.

    text: what it does, in words; settings: of `RunConfig`, where they are not its defaults
    """

    blocksize: tuple[int, int]
    density: float
    text: str
    settings: dict

    @property
    def name(self) -> str:
        """In the file of results."""
        return f"{'x'.join(map(str, self.blocksize))} at {self.density}, {self.text}"

    def config(self, **data) -> RunConfig:
        settings = {"blocksize": self.blocksize, "prune_pc": 1 - self.density, "epochs": 4}
        return RunConfig(**settings | self.settings, **data)


def _recipes() -> list[Recipe]:
    """Those of the table; the first of each density is what the others are held against."""
    rewound, kept, lasso = "rewound to θ₀", "weights kept", "lasso, weights kept"
    recipes = []
    for part in (0.1, 0.05, 0.036):
        recipes += [Recipe((1, 1), part, kept, KEPT)]
        recipes += [Recipe(size, part, lasso, BLOCK_RECIPE) for size in ((16, 16), (64, 16))]
    recipes += [Recipe(size, 0.1, lasso, BLOCK_RECIPE) for size in ((32, 32), (128, 16))]
    recipes += [Recipe((16, 16), 0.1, rewound, {}), Recipe((16, 16), 0.1, kept, KEPT)]
    return [*recipes, Recipe((1, 1), 0.1, rewound, {})]


RECIPES = _recipes()


def run(
    path: Path, recipes: Sequence[Recipe], seeds: int, workers: int, dataset: str, data_dir: str
) -> None:
    """Trains what the CSV at `path` lacks, a row for each training, and keeps it up to date."""
    rows = results.read_rows(path, COLUMNS) if path.exists() else []
    for row in rows:
        row["seed"] = int(row["seed"])
    done = {(row["dataset"], row["recipe"], row["seed"]) for row in rows}
    wanted = [(recipe, seed) for recipe in recipes for seed in range(seeds)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, follow_parent) as pool:
        futures = [
            pool.submit(train, recipe, seed, dataset, data_dir)
            for recipe, seed in wanted
            if (dataset, recipe.name, seed) not in done
        ]
        for future in as_completed(futures):
            rows.append(future.result())
            results.write(sorted(rows, key=lambda row: (row["recipe"], row["seed"])), path)
            print("{recipe}, seed {seed}: {test_accuracy:.2%}".format(**rows[-1]), flush=True)


def train(recipe: Recipe, seed: int, dataset: str, data_dir: str) -> dict:
    """One search to its end, on one thread -> a row of the results"""
    torch.set_num_threads(1)
    data = load_once(dataset, data_dir, "cpu")
    *_, state = Lottery(recipe.config(seed=seed, dataset=dataset), data).states()
    values = (dataset, recipe.name, seed, density(state.masks))
    accuracies = {name: state.history[-1][name] for name in COLUMNS[len(values) :]}
    return dict(zip(COLUMNS, values, strict=False)) | accuracies


def compare(rows: Sequence[dict], recipes: Sequence[Recipe]) -> Iterator[tuple[str, ...]]:
    """A line of the table for each recipe that has results: means over seeds, with 95 % intervals,
    and those of the differences, seed by seed, to the first recipe of this density."""
    found = defaultdict(dict)
    for row in rows:
        found[row["recipe"]][row["seed"]] = 100 * row["test_accuracy"]
    for recipe in sorted(recipes, key=lambda recipe: -recipe.density):
        first = next(other for other in recipes if other.density == recipe.density)
        own, others = found[recipe.name], found[first.name]
        differences = [own[seed] - others[seed] for seed in own if seed in others]
        if own:
            size, part = "x".join(map(str, recipe.blocksize)), f"{100 * recipe.density:g} %"
            row = size, part, recipe.text, str(len(own)), Mean.of([*own.values()]).text(".2f")
            beside = recipe is not first and differences
            yield *row, Mean.of(differences).text(".2f", sign="+") if beside else ""


def print_table(path: Path, recipes: Sequence[Recipe], dataset: str) -> None:
    table = Table(title="Test accuracy of tickets in %, mean and 95 % interval", box=None)
    for name in ("blocks", "density", "training", "seeds", "accuracy", "minus unstructured"):
        table.add_column(name)
    rows = [row for row in results.read_rows(path, COLUMNS) if row["dataset"] == dataset]
    for line in compare(rows, recipes):
        table.add_row(*line)
    Console().print(table)
