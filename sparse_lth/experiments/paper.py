"""Recreate the paper's experiments on LeNet-300-100, and draw them beside its claims."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from ..files import FormatError, write
from ..program.config import DATASETS
from ..program.data import DataError, load
from ..program.lottery import State
from ..program.models import NARROW
from ..program.training import TrainingError
from ..saving import load_sparse
from . import results
from .chains import (
    NETWORKS,
    OF_NETWORK,
    ROW,
    TICKET,
    Chain,
    Plan,
    chain_path,
    grid,
    is_measured,
    network_path,
)
from .engine import EngineError, run_pool, run_ray
from .latency import latency
from .stack import run_stacked


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 wrong flags, 130 interrupted."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    try:
        flags.run(flags)
        return 0
    except results.ResultsError as error:
        parser.error(str(error))
    except (DataError, EngineError, FormatError, TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


def paper(flags: argparse.Namespace) -> None:
    """Trains what the results folder lacks, then measures and draws; on a GPU it only trains."""
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise EngineError("--device: expected cpu, since torch sees no GPU here, got cuda")
    folder = flags.results.resolve()  # workers elsewhere have working folders of their own
    data_dir = str(Path(flags.data_dir).expanduser().resolve())
    plan = (Plan.full if flags.full else Plan)(device=flags.device, data_dir=data_dir)
    if flags.iterations:
        late = f"{min(500, flags.iterations // 10)}it"
        plan = replace(plan, iterations=flags.iterations, rewind=late)
    data = load(flags.dataset, plan.data_dir, "cpu", notify=print)
    plan = replace(plan, dataset=data.name)
    for name in ("chains", "networks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    remember(plan, folder / "plan.json")
    plan = replace(plan, curves=find_spec("tensorboard") is not None)
    if not plan.curves:
        print("no TensorBoard curves: pip install tensorboard to have them")
    known = read_known(folder / "results.csv")
    wanted = grid(plan, flags.replicates, flags.networks)
    chains = [chain for chain in wanted if not known.keys() >= {*chain.networks}]
    print(f"{plan.iterations} iterations for each network, in {folder}", flush=True)
    try:
        if plan.device == "cuda":
            run_stacked(plan, chains, folder)
        elif flags.ray:
            run_ray(plan, chains, folder, flags.workers, flags.ray)
        else:
            run_pool(plan, chains, folder, flags.workers)
    finally:  # of a run that is broken off, too
        if rows := collect(grid(plan, flags.replicates), folder, known):
            results.write(rows, folder / "results.csv")
    if plan.device == "cuda":
        print(f"to time the networks on a CPU: python -m sparse_lth.experiments measure {folder}")
    else:
        measure(folder)
        draw(folder)


def remember(plan: Plan, path: Path) -> None:
    """Writes the plan, or raises ResultsError where the folder holds the results of another."""
    settings = asdict(plan)
    del settings["data_dir"], settings["curves"]
    text = json.dumps(settings, indent=1)
    if path.exists() and path.read_text() != text:
        raise results.ResultsError(
            f"--results: expected a folder whose plan is {json.dumps(settings)}, "
            f"got {path.parent} with {json.dumps(json.loads(path.read_text()))}"
        )
    write(path, text)


def read_known(path: Path) -> dict[tuple, list[dict]]:
    """The rows of an earlier results.csv by network, as `Chain.networks` has them: a folder may
    hold nothing else of what was trained elsewhere."""
    known = {}
    for row in results.read_rows(path, [*ROW]) if path.exists() else ():
        row = {name: int(v) if ROW[name] is int else v for name, v in row.items()}
        known.setdefault(tuple(row[name] for name in OF_NETWORK), []).append(row)
    return known


def collect(chains: Sequence[Chain], folder: Path, known: dict[tuple, list[dict]]) -> list[dict]:
    """The rows of all chains that were run here or are known, in the order of the chains."""
    rows = []
    for chain in chains:
        path = chain_path(folder, chain)
        if path.exists():
            rows += State.load(path, ROW).history
        else:
            rows += [row for network in chain.networks for row in known.get(network, ())]
    return rows


def measure(folder: Path, again: bool = False) -> None:
    """Times the kept tickets as block-sparse layers and the dense networks, and writes latency.csv,
    if it is not there or it is wanted again."""
    path, unpruned = folder / "latency.csv", (TICKET, "lenet-300-100", "1x1", 0)
    if path.exists() and not again:
        return
    tickets, dense = {}, {}
    for chain in filter(is_measured, grid(Plan.full(), 1)):
        for level in (0, *chain.levels):
            file = network_path(folder, chain, level)
            if file.exists():
                kept = dense if level == 0 else tickets
                kept[chain.method, chain.model, chain.shape, level] = load_sparse(file)
    if unpruned not in dense:
        print("no latency: the folder has the results of the networks, not the networks")
        return
    print("measuring the networks' latency", flush=True)
    for name, kind in NARROW.items():
        dense["dense", name, "1x1", 0] = kind.new(torch.Generator()).eval()
    timed = latency(tickets, dense, unpruned)
    networks = [dict(zip(results.NETWORK, key, strict=True)) for key in timed]
    results.write([n | t for n, t in zip(networks, timed.values(), strict=True)], path)


def draw(folder: Path) -> None:
    """Writes the figures and the page, from the files of results alone."""
    from .page import write_page  # matplotlib and statsmodels: a worker needs neither

    print(f"page: {write_page(results.read(folder), folder)}")


def tell(flags: argparse.Namespace) -> None:
    """Prints every verdict, derived anew from the files of results."""
    from .verdicts import judge

    for claim in judge(results.read(flags.results)):
        print(f"{claim.verdict}: {claim.text}\n    {claim.measured}")


def remeasure(flags: argparse.Namespace) -> None:
    measure(flags.results, again=True)
    draw(flags.results)


def blocks(flags: argparse.Namespace) -> None:
    """Trains what the results folder lacks, times the networks, and shows accuracy and speed."""
    from . import blocks as tickets
    from .blocks_table import report

    data_dir = str(Path(flags.data_dir).expanduser().resolve())
    dataset = load(flags.dataset, data_dir, "cpu", notify=print).name
    folder, recipes = flags.results, tickets.RECIPES
    tickets.run(folder, recipes, flags.replicates, flags.workers, dataset, data_dir)
    tickets.measure(folder, recipes, dataset)
    report(folder, recipes, dataset)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparse_lth.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("paper", help="train what the results folder lacks, measure, draw")
    train.set_defaults(run=paper)
    _add_training(train, "runs/paper")
    add = train.add_argument
    add("--full", action="store_true", help="the paper's 50,000 iterations and every round")
    add("--iterations", type=_positive, help="of each round (default: 5000, with --full 50000)")
    add(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=NETWORKS,
        metavar="NAME",
        help=f"train these alone; a control with its chain (default: {', '.join(NETWORKS)})",
    )
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster; local: on one started here")
    add(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="of the training; cuda: all networks of a round as one stack (default: cpu)",
    )
    tickets = commands.add_parser(
        "blocks", help="train what the results folder lacks, and compare tickets of blocks"
    )
    tickets.set_defaults(run=blocks)
    _add_training(tickets, "runs/blocks")
    for name, run, help in (
        ("measure", remeasure, "time the networks of a results folder on this machine, and draw"),
        ("plot", lambda flags: draw(flags.results), "draw the figures and the page again"),
        ("claims", tell, "print each claim, what was measured, and its verdict"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("results", type=Path, help="a folder that holds results.csv")
        command.set_defaults(run=run)
    return parser


def _add_training(command: argparse.ArgumentParser, folder: str) -> None:
    """The flags of what trains networks."""
    add = command.add_argument
    add("--replicates", type=_positive, default=5, help="seeds from 0 on (default: 5)")
    add(
        "--results",
        type=Path,
        default=Path(folder),
        help=f"folder to begin in, or to go on in (default: {folder})",
    )
    add(
        "--workers",
        type=_positive,
        default=os.cpu_count(),
        help="processes of one thread each (default: one for each processor)",
    )
    add(
        "--dataset",
        default="mnist",
        choices=DATASETS,
        help="auto: scikit-learn's digits where MNIST cannot be had (default: mnist)",
    )
    add(
        "--data_dir",
        default=os.environ.get("SPARSE_LTH_DATA", "data"),
        help="torchvision's root; $SPARSE_LTH_DATA gives another default",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)
