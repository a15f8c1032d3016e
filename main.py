"""Find a lottery ticket, convert it to block-sparse layers, and measure whether it is faster."""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from sparse_lth.files import FormatError, write
from sparse_lth.kernels import backends
from sparse_lth.program.config import DATASETS, SCOPES, TRAIN_SPARSE, RunConfig
from sparse_lth.program.data import DataError, load
from sparse_lth.program.lottery import Lottery, State
from sparse_lth.program.measure import compare, summarise
from sparse_lth.program.models import MODELS
from sparse_lth.program.progress import describe as describe_epoch
from sparse_lth.program.progress import watch, write_metrics
from sparse_lth.program.report import print_tables, write_page
from sparse_lth.program.tickets import make_ticket, sparse_network
from sparse_lth.program.training import TrainingError
from sparse_lth.ticket import save_sparse

console = Console()


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 wrong flags, 130 interrupted."""
    parser = build_parser()
    flags = vars(parser.parse_args(argv))
    resume, out_dir = flags.pop("resume", None), flags.pop("out_dir", None)
    try:
        if resume and out_dir:
            raise ValueError("--out_dir: expected none with --resume, which goes on in its folder")
        config = resumed_config(resume, flags) if resume else new_config(flags)
        run_dir = resume or new_run_dir(out_dir)
    except ValueError as error:
        parser.error(str(error))
    try:
        run(config, run_dir)
        return 0
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (DataError, FormatError, TrainingError, OSError) as error:
        message, status = error, 1
    print(f"error: {message}", file=sys.stderr)
    if (run_dir / "config.json").exists():
        print(f"to go on: python main.py --resume {run_dir}", file=sys.stderr)
    return status


def run(config: RunConfig, run_dir: Path) -> None:
    """Search, ticket, export, measurement, report; goes on from the state in run_dir, if any."""
    say(describe(config))
    data = load(config.dataset, config.data_dir, config.device, notify=say)
    config = replace(config, dataset=data.name)
    run_dir.mkdir(parents=True, exist_ok=True)
    write(run_dir / "config.json", json.dumps(asdict(config), indent=1))
    lottery, saved = Lottery(config, data), run_dir / "state.safetensors"
    start = State.load(saved) if saved.exists() else lottery.start()
    expect_settings(config, start, saved)
    if start.history:
        say(f"going on after {describe_epoch(start.history[-1])}")
    state = watch(lottery.states(start), config, start, run_dir, console)

    ticket = make_ticket(state)
    ticket.save(run_dir / "ticket.safetensors")
    if config.export_blocksize:
        if config.device == "cpu" and not backends()["native"].startswith("available"):
            say(f"sparse layers run on torch, more slowly: native kernels {backends()['native']}")
        path = run_dir / "sparse_model.safetensors"
        save_sparse(path, sparse_network(ticket, config.export_blocksize), ticket)
        summary = compare(ticket, path, data.test)
    else:
        summary = summarise(ticket, config.device)
    write_metrics(run_dir, [*state.history, summary])
    write_page(run_dir / "report.html", ticket, summary)
    print_tables(console, ticket, summary)
    say(f"report: {run_dir / 'report.html'}")


def expect_settings(config: RunConfig, state: State, path: Path) -> None:
    """Raises FormatError where the state is of a search with other settings."""
    settings = json.loads(json.dumps(config.search_settings()))
    for name, was in json.loads(json.dumps(state.settings)).items():
        if settings[name] != was:
            raise FormatError(
                f"{path}: expected a search with {name} {settings[name]}, as config.json has it, "
                f"got the state of one with {was}"
            )


def say(line: str) -> None:
    """A line as it is: unwrapped, for pipes, and with no markup in it."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def new_config(flags: dict) -> RunConfig:
    """The settings of these flags; with --export-sparse the defaults are ones that can be fast."""
    flags = dict(flags)
    if "export_blocksize" in flags:
        flags.setdefault("prune_pc", 0.9)
        flags.setdefault("blocksize", (16, 16))
        flags["export_blocksize"] = flags["export_blocksize"] or flags["blocksize"]
    flags.setdefault("data_dir", os.environ.get("SPARSE_LTH_DATA", RunConfig.data_dir))
    if flags.get("device", "auto") == "auto":
        flags["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return RunConfig(**flags)


def resumed_config(run_dir: Path, flags: dict) -> RunConfig:
    """The settings of the run in run_dir; flags may repeat them, and may move the data."""
    try:
        saved = RunConfig.from_dict(json.loads((run_dir / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--resume: expected the folder of a run, got {run_dir}: {error}"
        ) from error
    given = new_config(flags)
    for name in flags.keys() - {"data_dir"}:
        was, now = getattr(saved, name), getattr(given, name)
        found_out = name in ("dataset", "device") and flags[name] == "auto"
        if was != now and not found_out:
            raise ValueError(f"--{name}: expected {was}, as the run to resume has it, got {now}")
    return replace(saved, data_dir=given.data_dir) if "data_dir" in flags else saved


def new_run_dir(out_dir: Path | None) -> Path:
    """out_dir, or by default a new folder under runs/; never one that holds something."""
    if out_dir is None:
        return Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(
            f"--out_dir: expected a new or empty folder, got {out_dir}; "
            f"to go on with the run in it: --resume {out_dir}"
        )
    return out_dir


def describe(config: RunConfig) -> str:
    """The first line of a run."""
    count = "1 round" if config.prune_rounds == 1 else f"{config.prune_rounds} rounds"
    pace = f"{count}, {config.rate:.1%} of what is left in each"
    text = (
        f"{config.model} on {config.dataset}: pruning {config.prune_pc:.0%} of the weights in "
        f"{'one shot' if config.one_shot else pace}, "
        f"{config.blocksize[0]}x{config.blocksize[1]} blocks, {config.scope}, "
        f"seed {config.seed}, {config.device}"
    )
    if config.export_blocksize:
        text += " (with --export-sparse 90% is the default of --prune_pc: at 20% nothing is faster)"
    return text


def build_parser() -> argparse.ArgumentParser:
    """The flags; a flag that is not given is absent from the namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )

    def add(name: str, help: str, **options) -> None:
        """The flag with underscores, and with dashes."""
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        default = getattr(RunConfig, options.get("dest", name), None)
        default = "x".join(map(str, default)) if isinstance(default, tuple) else default
        help = help if default is None or default is False else f"{help} (default: {default})"
        parser.add_argument(*names, help=help.replace("%", "%%"), **options)

    add("lr", "learning rate of Adam", type=float)
    add("bs", "batch size", type=int)
    add("epochs", "epochs of each round", type=int)
    add("prune_pc", "fraction of weights pruned in total; with --export-sparse 0.9", type=float)
    add("prune_rounds", "rounds of pruning, after the dense round 0", type=int)
    add("model", "network", choices=MODELS)
    add(
        "blocksize",
        "prune blocks of R outputs x C inputs; 1x1 is single weights; with --export-sparse 16x16",
        type=blocksize,
        metavar="RxC",
    )
    add("scope", "where magnitudes compete", choices=SCOPES)
    add("rewind_step", "rewind to the weights at this step of round 0, as in 500it or 1ep")
    add("reinit", "control: start each round from newly drawn weights", action="store_true")
    add("one_shot", "prune in one round what prune_rounds rounds would", action="store_true")
    add(
        "train_sparse",
        "train pruned layers block-sparse instead of under masks; auto: where that is faster",
        choices=TRAIN_SPARSE,
    )
    add("dataset", "auto: mnist where it can be had, else scikit-learn's digits", choices=DATASETS)
    add("data_dir", "torchvision's root; $SPARSE_LTH_DATA gives another default")
    add("seed", "seed of the weights and of the order of the batches", type=int)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="(default: auto)")
    add("out_dir", "folder of the run (default: a new one under runs/)", type=Path)
    add(
        "export_sparse",
        "write the block-sparse model and measure it; RxC: in blocks of another size",
        dest="export_blocksize",
        nargs="?",
        const=None,
        type=blocksize,
        metavar="RxC",
    )
    add("resume", "go on with the run in this folder", type=Path, metavar="RUN_DIR")
    return parser


def blocksize(text: str) -> tuple[int, int]:
    """RxC, as in 16x16"""
    try:
        rows, cols = text.split("x")
        return int(rows), int(cols)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected RxC, as in 16x16, got {text}") from None


if __name__ == "__main__":
    sys.exit(main())
