"""The command line: from flags to the settings of a run, and back."""

import argparse
import os
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .config import (
    BLOCK_RECIPE,
    DATASETS,
    EPOCHS,
    LAST_LR,
    SCOPES,
    STEPS,
    TRAIN_SPARSE,
    RunConfig,
    SettingError,
)
from .data import SOURCES
from .folder import load_config
from .models import MODELS

WHERE = {"dataset", "data_dir", "device", "seed"}  # flags that leave open what to search for
TRAINED = {name: getattr(RunConfig, name) for name in (*BLOCK_RECIPE, "reinit")}  # and how


def new_config(flags: dict) -> RunConfig:
    """The settings of these flags."""
    config = RunConfig(**with_defaults(flags))
    sources = [SOURCES[config.dataset]] if config.dataset in SOURCES else SOURCES.values()
    config.rewind_step(max(source.train_images for source in sources))
    return config


def with_defaults(flags: dict) -> dict:
    """The flags, and all the defaults that are not RunConfig's.

    Those of --export-sparse make a network that can be fast, and in blocks train it as was best for
    blocks, unless flags say how to train. Flags that leave open what to search for get a search
    worth seeing: that of --export-sparse.
    """
    flags = dict(flags)
    if flags.keys() <= WHERE:
        flags["export_blocksize"] = None
    if "export_blocksize" in flags:
        flags.setdefault("prune_pc", 0.9)
        model = MODELS[flags.get("model", RunConfig.model)]
        flags.setdefault("blocksize", model.blocksize)
        flags["export_blocksize"] = flags["export_blocksize"] or flags["blocksize"]
        if flags["blocksize"] != (1, 1) and not flags.keys() & TRAINED.keys():
            flags |= BLOCK_RECIPE
    flags.setdefault("data_dir", os.environ.get("SPARSE_LTH_DATA", RunConfig.data_dir))
    if flags.get("device", "auto") == "auto":
        flags["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return flags


def resumed_config(folder: Path, flags: dict) -> RunConfig:
    """The settings of the run in the folder; flags may repeat them, and may move the data."""
    saved = load_config(folder)
    for name in flags.keys() - {"data_dir"}:
        was, now = getattr(saved, name), flags[name]
        if name == "export_blocksize":
            now = now or flags.get("blocksize", saved.blocksize)
        found_out = name in ("dataset", "device") and now == "auto"
        if was != now and not found_out:
            expected = "it left out" if was is None else plain(was)
            raise SettingError(
                f"--{name}: expected {expected}, as in the run to resume, got {plain(now)}"
            )
    return replace(saved, data_dir=flags.get("data_dir", saved.data_dir))


def flags_of(config: RunConfig) -> dict[str, str]:
    """The inverse of `new_config`: the flags that differ from the defaults, with their values."""
    exported = config.export_blocksize is not None
    given = {"model": config.model} | ({"export_blocksize": None} if exported else {})
    default = with_defaults(given | {"blocksize": config.blocksize})
    default |= {
        "model": RunConfig.model,
        "blocksize": with_defaults(given).get("blocksize", RunConfig.blocksize),
    }
    always = {"dataset"} if exported else {"dataset", "prune_pc"}  # without it, all is exported
    if any(getattr(config, name) != default.get(name, own) for name, own in TRAINED.items()):
        default |= TRAINED
        always |= {"rewind"} if exported else set()
    flags = {}
    for name, value in asdict(config).items():
        if name == "export_blocksize":
            if exported:
                flags["--export-sparse"] = "" if value == config.blocksize else plain(value)
        elif name in always or value != default.get(name, getattr(RunConfig, name)):
            flags[f"--{name}"] = "" if value is True else plain(value)
    return flags


def command_of(flags: dict[str, str]) -> str:
    """What to type into a shell."""
    words = [word for flag, value in flags.items() for word in (flag, value) if word]
    return shlex.join(["python", "main.py", *words])


def plain(value: object) -> str:
    """A setting as a flag has it: (16, 16) as 16x16."""
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def build_parser() -> argparse.ArgumentParser:
    """The flags; a flag that is not given is absent from the namespace."""
    parser = argparse.ArgumentParser(
        description="Find a lottery ticket, convert it to block-sparse layers, and measure "
        "whether it is faster. Without flags: --export-sparse.",
        epilog="python main.py report RUN_DIR [RUN_DIR ...] draws one page of several runs.",
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
    add(
        "epochs",
        f"epochs of each round (default: {EPOCHS}, or as many as make {STEPS:,} steps where the "
        "data are few)",
        type=int,
    )
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
    add(
        "rewind",
        "where rounds begin: init: every weight and bias put back to its first value; as in 500it "
        "or 1ep: to its value at this step of round 0, and trained from there; weights: nothing is "
        "put back",
    )
    add(
        "block_lasso",
        "strength of a group lasso that shrinks whole blocks, in every round between the dense one "
        "and the last",
        type=float,
    )
    add(
        "last_lr",
        "learning rate of the last round: constant, or linear: it falls to 0",
        choices=LAST_LR,
    )
    add(
        "reinit",
        "control: train the masks of each round over newly drawn weights, too",
        action="store_true",
    )
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


def build_report_parser() -> argparse.ArgumentParser:
    """Of `python main.py report`."""
    parser = argparse.ArgumentParser(
        prog="main.py report",
        description="Draw the report of a run again, or several runs on one page: those that "
        "differ in their seed alone as a mean and its 95% interval.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="(default: report.html in the run's folder, comparison.html beside several)",
    )
    return parser


def blocksize(text: str) -> tuple[int, int]:
    """RxC, as in 16x16"""
    try:
        rows, cols = text.split("x")
        return int(rows), int(cols)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected RxC, as in 16x16, got {text}") from None
