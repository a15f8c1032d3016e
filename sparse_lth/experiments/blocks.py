"""Block tickets beside unstructured ones of the same density, trained alike from the same seeds."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from ..program.config import BLOCK_RECIPE, RunConfig
from ..program.flags import plain
from ..program.lottery import Lottery
from ..program.models import MODELS
from ..program.tickets import make_ticket, sparse_network
from ..saving import load_sparse, save_sparse
from . import results
from .engine import follow_parent, load_once
from .latency import latency

COLUMNS = (
    *("dataset", "recipe", "seed", "kept"),  # kept: of all weights, also those that stay dense
    *("validation_accuracy", "test_accuracy", "dense_accuracy"),
)
DENSE, MODEL = "dense", "lenet-300-100"
# the same of single weights
KEPT = {name: BLOCK_RECIPE[name] for name in BLOCK_RECIPE if name != "block_lasso"}
LAYERWISE = {"scope": "layerwise"}


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
    def shape(self) -> str:
        """Of its blocks, as in 16x4."""
        return plain(self.blocksize)

    @property
    def name(self) -> str:
        """In the files of results."""
        return f"{self.shape} at {self.density}, {self.text}"

    def config(self, **data) -> RunConfig:
        settings = {"blocksize": self.blocksize, "prune_pc": 1 - self.density, "epochs": 4}
        return RunConfig(**settings | self.settings, **data)


def _recipes() -> list[Recipe]:
    """Those of the table; the first of each density is what the others are held against."""
    recipes = []
    for part in (0.1, 0.05, 0.036):
        recipes += [Recipe((1, 1), part, "ERK, weights kept", KEPT)]
        recipes += [Recipe((1, 1), part, "weights kept", KEPT | LAYERWISE)]
        sizes = ((16, 16), (64, 16), (32, 32), (128, 16)) if part == 0.1 else ((16, 16), (64, 16))
        recipes += [Recipe(size, part, "ERK, lasso, weights kept", BLOCK_RECIPE) for size in sizes]
    for size in ((16, 16), (64, 16)):
        recipes += [Recipe(size, 0.1, "lasso, weights kept", BLOCK_RECIPE | LAYERWISE)]
    recipes += [Recipe((16, 16), 0.1, "weights kept", KEPT | LAYERWISE)]
    return [*recipes, *(Recipe(size, 0.1, "rewound to θ₀", {}) for size in ((16, 16), (1, 1)))]


RECIPES = _recipes()


def run(
    folder: Path, recipes: Sequence[Recipe], seeds: int, workers: int, dataset: str, data_dir: str
) -> None:
    """Trains what blocks.csv in the folder lacks, a row for each training, and keeps it up to date;
    the networks of seed 0 are kept there, too, to be timed."""
    path = folder / "blocks.csv"
    (folder / "networks").mkdir(parents=True, exist_ok=True)
    rows = read_rows(path) if path.exists() else []
    done = {(row["dataset"], row["recipe"], row["seed"]) for row in rows}
    wanted = [(recipe, seed) for recipe in recipes for seed in range(seeds)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, follow_parent) as pool:
        futures = [
            pool.submit(train, recipe, seed, dataset, data_dir, folder)
            for recipe, seed in wanted
            if (dataset, recipe.name, seed) not in done
        ]
        for future in as_completed(futures):
            rows.append(future.result())
            results.write(sorted(rows, key=lambda row: (row["recipe"], row["seed"])), path)
            print("{recipe}, seed {seed}: {test_accuracy:.2%}".format(**rows[-1]), flush=True)


def read_rows(path: Path) -> list[dict]:
    return [row | {"seed": int(row["seed"])} for row in results.read_rows(path, COLUMNS)]


def train(recipe: Recipe, seed: int, dataset: str, data_dir: str, folder: Path) -> dict:
    """One search to its end, on one thread -> a row of the results"""
    torch.set_num_threads(1)
    data = load_once(dataset, data_dir, "cpu")
    *_, state = Lottery(recipe.config(seed=seed, dataset=dataset), data).states()
    ticket = make_ticket(state)
    if seed == 0:
        network = sparse_network(ticket, recipe.blocksize)
        save_sparse(network, network_path(folder, recipe, dataset), MODEL)
    dense, *_, last = ticket.rounds
    pruned = sum(mask.numel() - int(mask.sum()) for mask in ticket.masks.values())
    weights = sum(tensor.numel() for tensor in ticket.trained.values() if tensor.dim() > 1)
    values = (dataset, recipe.name, seed, 1 - pruned / weights)
    accuracies = last["validation_accuracy"], last["test_accuracy"], dense["test_accuracy"]
    return dict(zip(COLUMNS, (*values, *accuracies), strict=True))


def network_path(folder: Path, recipe: Recipe, dataset: str) -> Path:
    name = recipe.name.replace(" ", "_").replace(",", "").replace("₀", "0")
    return folder / "networks" / f"{dataset}-{name}.safetensors"


def measure(folder: Path, recipes: Sequence[Recipe], dataset: str) -> None:
    """Times the networks of seed 0 beside the dense one, and writes latency.csv."""
    paths = {recipe.name: network_path(folder, recipe, dataset) for recipe in recipes}
    tickets = {name: load_sparse(path) for name, path in paths.items() if path.exists()}
    dense = {DENSE: MODELS[MODEL].new(torch.Generator()).eval()}
    rows = latency(tickets, dense, DENSE)
    results.write([{"recipe": name} | row for name, row in rows.items()], folder / "latency.csv")
