"""The command line: from flags to the settings of a run, and what the run does with them."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..files import FormatError
from ..kernels import backends
from ..quantize import quantize_
from ..saving import save_sparse
from .config import DATASETS, SCOPES, TRAIN_SPARSE, RunConfig, SettingError
from .data import SOURCES, DataError, Dataset, load
from .folder import (
    FolderError,
    can_go_on,
    load_config,
    new_folder,
    owned,
    resume_command,
    save_config,
)
from .lottery import Lottery, State
from .models import MODELS
from .tickets import make_ticket, sparse_network
from .training import TrainingError


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 wrong flags, 130 interrupted, 141 nobody reads on."""
    parser = build_parser()
    flags = vars(parser.parse_args(argv))
    resume, out_dir = flags.pop("resume", None), flags.pop("out_dir", None)
    folder = resume
    try:
        if resume and out_dir:
            raise SettingError(
                "--out_dir: expected none with --resume, which goes on in its folder"
            )
        config = resumed_config(resume, flags) if resume else new_config(flags)
        folder = resume or new_folder(out_dir)
        run(config, folder, new=not resume)
        return 0
    except SettingError as error:
        parser.error(str(error))
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        message, status = "nobody reads the output any more", 141
    except (DataError, FormatError, TrainingError, OSError) as error:
        message, status = error, 1
    print(f"error: {message}", file=sys.stderr)
    if folder and can_go_on(folder):
        print(f"to go on: {resume_command(folder)}", file=sys.stderr)
    return status


def run(config: RunConfig, folder: Path, new: bool) -> None:
    """Carries out the settings in the folder, where nothing is written before they are checked."""
    say(describe(config))
    data = load(config.dataset, config.data_dir, config.device, notify=say)
    config = replace(config, dataset=data.name)
    config.expect_rewind_step_within(len(data.train.labels))
    with owned(folder, new):
        save_config(folder, config)
        carry_out(config, data, folder)


def carry_out(config: RunConfig, data: Dataset, folder: Path) -> None:
    """Search, ticket, export, measurement, report; goes on from the state in the folder, if any."""
    # rich and matplotlib are slow to import: --help and a wrong flag need neither
    from .measure import compare, summarise
    from .progress import Console, watch, write_metrics
    from .progress import describe as describe_epoch
    from .report import print_tables, write_page

    console = Console()
    saved = folder / "state.safetensors"
    lottery = Lottery(config, data)
    start = State.load(saved) if saved.exists() else lottery.start()
    expect_settings(config, start, saved)
    if start.history:
        say(f"going on after {describe_epoch(start.history[-1])}")
    state = watch(lottery.states(start), config, start, folder, console)

    ticket = make_ticket(state)
    ticket.save(folder / "ticket.safetensors")
    if config.export_blocksize:
        if config.device == "cpu" and not backends()["native"].startswith("available"):
            say(f"sparse layers run on torch, more slowly: native kernels {backends()['native']}")
        path = folder / "sparse_model.safetensors"
        network = sparse_network(ticket, config.export_blocksize)
        if config.quantize:
            quantize_(network, config.quantize)
        save_sparse(network, path, config.model)
        summary = compare(ticket, path, data.test)
    else:
        summary = summarise(ticket, config.device)
    write_metrics(folder, [*state.history, summary])
    write_page(folder / "report.html", ticket, summary)
    print_tables(console, ticket, summary)
    say(f"report: {folder / 'report.html'}")


def expect_settings(config: RunConfig, state: State, path: Path) -> None:
    """Raises FormatError where the state is of a search with other settings."""
    settings, were = (json.loads(json.dumps(s)) for s in (config.search_settings(), state.settings))
    for name, was in were.items():
        if settings[name] != was:
            raise FormatError(
                f"{path}: expected a search with {name} {settings[name]}, as config.json has it, "
                f"got the state of one with {was}"
            )


def say(line: str) -> None:
    print(line, flush=True)


def new_config(flags: dict) -> RunConfig:
    """The settings of these flags; with --export-sparse the defaults are ones that can be fast."""
    flags = dict(flags)
    if "export_blocksize" in flags:
        flags.setdefault("prune_pc", 0.9)
        model = MODELS[flags.get("model", RunConfig.model)]
        flags.setdefault("blocksize", model.blocksize)
        flags["export_blocksize"] = flags["export_blocksize"] or flags["blocksize"]
    flags.setdefault("data_dir", os.environ.get("SPARSE_LTH_DATA", RunConfig.data_dir))
    if flags.get("device", "auto") == "auto":
        flags["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    config = RunConfig(**flags)
    sources = [SOURCES[config.dataset]] if config.dataset in SOURCES else SOURCES.values()
    config.expect_rewind_step_within(max(source.train_images for source in sources))
    return config


def resumed_config(folder: Path, flags: dict) -> RunConfig:
    """The settings of the run in the folder; flags may repeat them, and may move the data."""
    saved = load_config(folder)
    for name in flags.keys() - {"data_dir"}:
        was, now = getattr(saved, name), flags[name]
        if name == "export_blocksize":
            now = now or flags.get("blocksize", saved.blocksize)
        found_out = name in ("dataset", "device") and now == "auto"
        if was != now and not found_out:
            raise SettingError(f"--{name}: expected {was}, as the run to resume has it, got {now}")
    return replace(saved, data_dir=flags.get("data_dir", saved.data_dir))


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
        description="Find a lottery ticket, convert it to block-sparse layers, and measure "
        "whether it is faster.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
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
        "prune blocks of R outputs x C inputs; 1x1 is single weights; with --export-sparse "
        "16x16, but 1x1 for lenet-5",
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
    add("quantize", "with --export-sparse: sparse linear layers in int8", choices=("int8",))
    add("resume", "go on with the run in this folder", type=Path, metavar="RUN_DIR")
    return parser


def blocksize(text: str) -> tuple[int, int]:
    """RxC, as in 16x16"""
    try:
        rows, cols = text.split("x")
        return int(rows), int(cols)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected RxC, as in 16x16, got {text}") from None
