"""What the command line does: a search with its ticket, export and report, or a report alone."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..files import FormatError
from ..kernels import backends
from ..quantize import quantize_
from ..saving import save_sparse
from .config import RunConfig, SettingError
from .data import DataError, Dataset, load
from .flags import build_parser, build_report_parser, new_config, resumed_config
from .folder import (
    FolderError,
    can_go_on,
    new_folder,
    owned,
    resume_command,
    save_config,
)
from .lottery import Lottery, State
from .tickets import make_ticket, sparse_network
from .training import TrainingError


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 wrong flags, 130 interrupted, 141 nobody reads on."""
    argv = sys.argv[1:] if argv is None else argv
    report_only = argv[:1] == ["report"]
    parser = build_report_parser() if report_only else build_parser()
    flags = vars(parser.parse_args(argv[1:] if report_only else argv))
    resume, out_dir = flags.pop("resume", None), flags.pop("out_dir", None)
    folder = resume
    try:
        if report_only:
            report(**flags)
            return 0
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
    data = load(config.dataset, config.data_dir, config.device, notify=say)
    config = replace(config, dataset=data.name)
    say(describe(config))
    config.rewind_step(len(data.train.labels))
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
    from .results import Run, load_tickets

    console = Console()
    saved = folder / "state.safetensors"
    lottery = Lottery(config, data)
    start = State.load(saved) if saved.exists() else lottery.start()
    expect_settings(config, start, saved)
    if start.history:
        say(f"going on after {describe_epoch(start.history[-1])}")
    state = watch(lottery.states(start), lottery, start, folder, console)

    ticket = make_ticket(state)
    ticket.save(folder / "ticket.safetensors")
    tickets = load_tickets(folder, config.rounds)
    if config.export_blocksize:
        if config.device == "cpu" and not backends()["native"].startswith("available"):
            say(f"sparse layers run on torch, more slowly: native kernels {backends()['native']}")
        path = folder / "sparse_model.safetensors"
        network = sparse_network(ticket, config.export_blocksize)
        if config.quantize:
            quantize_(network, config.quantize)
        save_sparse(network, path, config.model)
        say("measuring, which takes up to a minute")
        summary = compare(tickets, path, data.test)
    else:
        summary = summarise(tickets, data.test)
    write_metrics(folder, [*state.history, summary])
    finished = Run.load(folder)
    write_page(folder / "report.html", finished)
    print_tables(console, finished)
    say(f"report: {folder / 'report.html'}")


def report(runs: Sequence[Path], out: Path | None) -> None:
    """Draws the page of a run from its folder alone, or one page of several runs."""
    from .comparison import print_comparison, write_comparison
    from .progress import Console
    from .report import print_tables, write_page
    from .results import Run

    found = [Run.load(folder) for folder in runs]
    if len(found) == 1:
        out = out or runs[0] / "report.html"
        write_page(out, found[0])
        print_tables(Console(), found[0])
    else:
        out = out or runs[0].parent / "comparison.html"
        write_comparison(out, found)
        print_comparison(Console(), found)
    say(f"report: {out}")


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
    if config.export_blocksize and config.prune_pc == 0.9:
        text += " (with --export-sparse 90% is the default of --prune_pc: at 20% nothing is faster)"
    return text
