"""Damaged files and odd command lines: documented errors, and nothing that fails later."""

import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import main
from sparse_lth import Ticket, TicketError, load_sparse, save_sparse
from sparse_lth.lottery import search
from sparse_lth.program import data, measure
from sparse_lth.program.config import RunConfig, SettingError
from sparse_lth.program.folder import CONFIG, load_config
from tests.fuzz import Target, attack
from tests.test_data import idx

IMAGES = torch.zeros(2, 1, 28, 28)
SETTINGS = {"model": "lenet-15-5", "dataset": "digits", "epochs": 1, "bs": 100, "prune_rounds": 1}


def use_ticket(ticket):
    for weights in ("init", "trained"):
        ticket.network(weights)(IMAGES)
    ticket.dense_network()(IMAGES)
    ticket.sparse_network((4, 4))(IMAGES)


def use_config(config):
    config.layer_densities(config.rounds)
    assert RunConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.fixture(scope="module")
def folder():
    """In memory where there is such a folder: a file for every attempt is many."""
    root = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=root) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def targets(tiny, folder):
    """What the program reads, by name."""
    config = RunConfig(**SETTINGS, prune_pc=0.9, blocksize=(2, 2), export_blocksize=(2, 2))
    *_, state = search(config, tiny)
    ticket = Ticket.from_state(config, state)
    ticket.save(folder / "ticket")
    save_sparse(ticket.sparse_network((2, 2)), folder / "model", ticket.model)
    read = {name: (folder / name).read_bytes() for name in ("ticket", "model")}
    settings = json.dumps(asdict(config)).encode()
    found = [
        Target("ticket", read["ticket"], Ticket.load, (TicketError,), use_ticket),
        Target("model", read["model"], load_sparse, (TicketError,), lambda m: m(IMAGES)),
        Target(CONFIG, settings, lambda p: load_config(p.parent), (SettingError,), use_config),
    ]
    return {target.name: target for target in found}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("ticket", 3500), ("model", 3500), (CONFIG, 2000)])
def test_a_damaged_file_is_refused_or_serves(targets, folder, name, count):
    accepted = attack(targets[name], folder, count, random.randrange(10**6))
    assert accepted < count / 2


@pytest.mark.slow
def test_a_damaged_data_set_is_refused(folder, monkeypatch):
    images = torch.zeros(60, 28, 28, dtype=torch.uint8)
    whole = {
        f"{part}-{kind}": idx(content)
        for part in ("train", "t10k")
        for kind, content in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", images[:, 0, 0]))
    }
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in whole.items():
        (raw / name).write_bytes(content)
    sizes = {name: (len(content), data._md5(content)) for name, content in whole.items()}
    monkeypatch.setattr(data, "FILES", sizes)
    monkeypatch.setattr(data, "VALIDATION", 5)
    for name, content in whole.items():
        target = Target(
            name,
            content,
            lambda path: data.load("mnist", folder, "cpu"),
            (data.DataError,),
            lambda loaded: len(loaded.train.labels),
        )
        assert attack(target, raw, 250, random.randrange(10**6)) < 250 / 2
        (raw / name).write_bytes(content)


NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "1e-30",
    "1e300",
    "nan",
    "inf",
    "9" * 20,
    "9" * 400,
    "0x10",
    "",
    "½",
]
NUMBERS += ["1.5", "0.9", "0_1", "٣", " 1 ", "True"]
SIZES = ["1x1", "2x2", "0x1", "16", "1x1x1", "-1x1", "999x999", "100000x100000", "x", "1x", "1X1"]
PATHS = [
    "~nosuchuser",
    "a" * 300,
    "caf\udce9",
    "a\0b",
    "/proc/x",
    "/dev/null",
    ".",
    "--",
    "-x",
    "é b",
]
VALUES = {
    **dict.fromkeys(
        ("--lr", "--bs", "--epochs", "--prune_pc", "--prune_rounds", "--seed"), NUMBERS
    ),
    **dict.fromkeys(("--blocksize", "--export-sparse"), SIZES),
    **dict.fromkeys(("--out_dir", "--resume", "--data_dir"), PATHS),
    "--rewind_step": ["0it", "1ep", "99999it", "-1it", "1.5ep", "9" * 30 + "ep", "ep", "٣it"],
    "--model": ["lenet-5", "lenet-30-10", "", "\udcff", "resnet"],
    "--scope": ["global", "layerwise", "everywhere"],
    "--dataset": ["digits", "", "cifar"],
    "--device": ["cpu", "cuda", "tpu"],
    "--train-sparse": ["on", "off", "maybe"],
    "--reinit": [None],
    "--one-shot": [None],
    "--nonsense": [None, "1"],
}


@pytest.mark.slow
def test_an_odd_command_line_runs_or_ends_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "latencies", lambda models, x: {m: [1, 2] for m in models})
    chance, statuses = random.Random(), []
    for _ in range(100):
        line = [f"--{name}={value}" for name, value in SETTINGS.items()]
        for flag in chance.sample(list(VALUES), chance.choice([1, 1, 2, 3])):
            value = chance.choice(VALUES[flag])
            line += [flag] if value is None else [f"{flag}={value}"]
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        try:
            status = main.main(line)
        except SystemExit as exit:
            status = exit.code
        except BaseException as error:
            raise AssertionError(f"{line} ended in {error!r}") from error
        error = capfd.readouterr().err
        assert status in (0, 1, 2), line
        if status:
            said = [text for text in error.splitlines() if "error: " in text]
            assert len(said) == 1, (line, error)
        if status == 2:
            assert sorted(tmp_path.rglob("*")) == before, line
        statuses.append(status)
    assert {0, 2} <= {*statuses}
