"""Recreate the paper's experiments on LeNet-300-100, and draw them beside its claims."""

import argparse
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from ..files import FormatError, write
from ..kernels import backend
from ..program.config import DATASETS
from ..program.data import DataError, load
from ..program.lottery import State
from ..program.measure import summarise
from ..program.models import NARROW
from ..program.tickets import dense_network, load_ticket, sparse_network
from ..program.training import TrainingError
from ..sequential import SparseSequential
from ..timing import in_turn
from . import results
from .chains import ROW, TICKET, Chain, Plan, chain_path, grid, is_measured, ticket_path
from .engine import EngineError, run_pool, run_ray
from .page import write_page


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 wrong flags, 130 interrupted."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    try:
        if flags.command == "paper":
            paper(flags)
        trainings = results.read(flags.results / "results.csv")
        print(f"page: {write_page(trainings, flags.results)}")
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
    """Runs what the results folder lacks, and leaves results.csv there."""
    folder = flags.results.resolve()  # workers elsewhere have working folders of their own
    data_dir = str(Path(flags.data_dir).expanduser().resolve())
    plan = (Plan.full if flags.full else Plan)(device=flags.device, data_dir=data_dir)
    if flags.iterations:
        late = f"{min(500, flags.iterations // 10)}it"
        plan = replace(plan, iterations=flags.iterations, rewind_step=late)
    data = load(flags.dataset, plan.data_dir, "cpu", notify=print)
    plan = replace(plan, dataset=data.name)
    for name in ("chains", "tickets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    remember(plan, folder / "plan.json")
    plan = replace(plan, curves=find_spec("tensorboard") is not None)
    if not plan.curves:
        print("no TensorBoard curves: pip install tensorboard to have them")
    chains = grid(plan, flags.replicates)
    print(f"{len(chains)} chains of {plan.iterations} iterations a round in {folder}", flush=True)
    if flags.ray:
        run_ray(plan, chains, folder, flags.workers, flags.ray)
    else:
        run_pool(plan, chains, folder, flags.workers)
    rows = collect(chains, folder)
    results.write(rows, folder / "results.csv")
    print("measuring the tickets' latency", flush=True)
    measured = measure(chains, folder, data.test.images[:1])
    for row in rows:
        if row["replicate"] == 0 and row["iteration"] == plan.iterations:
            row |= measured.get((row["method"], row["model"], row["blocksize"], row["round"]), {})
    results.write(rows, folder / "results.csv")


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


def collect(chains: Sequence[Chain], folder: Path) -> list[dict]:
    """The rows of all chains, in the order of the chains."""
    return [row for chain in chains for row in State.load(chain_path(folder, chain), ROW).history]


def measure(chains: Sequence[Chain], folder: Path, image: torch.Tensor) -> dict[tuple, dict]:
    """The speed of the kept tickets as block-sparse layers and of the dense networks, one thread.

    A dense network is run as plain layers and in one call, as tickets are, and the faster counts:
    what is compared is sparsity.

    image: (1, 1, 28, 28) -> results.SPEED by (method, model, blocksize, round), once for a folder
    """
    path = folder / "latency.json"
    if path.exists():
        return {tuple(key): speed for key, speed in json.loads(path.read_text())}
    networks, dense = {}, {}
    for chain in filter(is_measured, chains):
        for level in (0, *chain.levels):
            ticket = load_ticket(ticket_path(folder, chain, level))
            key = (chain.method, chain.model, "x".join(map(str, chain.blocksize)), level)
            if level == 0:
                dense[key] = dense_network(ticket)
            else:
                networks[key, "one call"] = sparse_network(ticket, chain.blocksize)
    for name, kind in NARROW.items():
        dense["dense", name, "1x1", 0] = kind.new(torch.Generator()).eval()
    for key, network in dense.items():
        networks[key, "layers"] = network
        networks[key, "one call"] = SparseSequential(OrderedDict(network.named_children())).eval()
    threads, times = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            measured = in_turn({key: partial(network, image) for key, network in networks.items()})
        for (key, _), form in measured.items():
            times[key] = min(times.get(key, form), form, key=lambda form: form.p50)
        machine = summarise(ticket, "cpu")
    finally:
        torch.set_num_threads(threads)
    context = (machine["device"], machine["threads"], backend(image).name)
    unpruned = times[TICKET, "lenet-300-100", "1x1", 0].p50
    speeds = {}
    for key, form in times.items():
        values = (1e6 * form.p50, 1e6 * form.p20, 1e6 * form.p80, unpruned / form.p50)
        speeds[key] = dict(zip(results.SPEED, (*values, *context), strict=True))
    write(path, json.dumps([[list(key), speed] for key, speed in speeds.items()], indent=1))
    return speeds


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparse_lth.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "paper", help="train what the results folder lacks, measure, and draw"
    ).add_argument
    add("--full", action="store_true", help="the paper's 50,000 iterations and every round")
    add("--iterations", type=_positive, help="of each round (default: 5000, with --full 50000)")
    add("--replicates", type=_positive, default=3, help="seeds from 0 on (default: 3)")
    add(
        "--results",
        type=Path,
        default=Path("runs/paper"),
        help="folder to begin in, or to go on in (default: runs/paper)",
    )
    add(
        "--workers",
        type=_positive,
        default=os.cpu_count(),
        help="processes of one thread each (default: one for each processor)",
    )
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster; local: on one started here")
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
    add("--device", default="cpu", choices=("cpu", "cuda"), help="of the training (default: cpu)")
    plot = commands.add_parser("plot", help="draw the figures and the page again, without training")
    plot.add_argument("results", type=Path, help="a folder that holds results.csv")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)
