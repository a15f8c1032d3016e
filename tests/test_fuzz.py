"""Damaged files and odd command lines: documented errors, and nothing that fails later."""

import json
import random
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import main
from sparse_lth import Search, Ticket, TicketError, load_sparse, save_sparse
from sparse_lth.files import FormatError
from sparse_lth.program import data, measure
from sparse_lth.program.command import expect_settings
from sparse_lth.program.config import RunConfig, SettingError
from sparse_lth.program.folder import CONFIG, load_config
from sparse_lth.program.lottery import Lottery, State
from sparse_lth.program.models import MODELS
from sparse_lth.program.tickets import (
    dense_network,
    load_ticket,
    make_ticket,
    network,
    sparse_network,
)
from sparse_lth.program.training import TrainingError
from sparse_lth.timing import Benchmark, Times
from tests.fuzz import Target, attack
from tests.test_data import idx

IMAGES = torch.zeros(2, 1, 28, 28)
SETTINGS = {"model": "lenet-15-5", "dataset": "digits", "epochs": 1, "bs": 100, "prune_rounds": 1}
CONFIG_OF_RUN = RunConfig(**SETTINGS, prune_pc=0.9, blocksize=(2, 2), export_blocksize=(2, 2))


def general():
    """A model that the program does not know."""
    body = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(36, 36), nn.Linear(36, 10)).eval()


def use_ticket(ticket):
    for weights in ("init", "trained"):
        network(ticket, weights)(IMAGES)
    dense_network(ticket)(IMAGES)
    sparse_network(ticket, (4, 4))(IMAGES)


def use_config(config):
    assert config.search(MODELS[config.model].fresh()).schedule
    assert RunConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.fixture(scope="module")
def folder():
    """In memory where there is such a folder: a file for every attempt is many."""
    root = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=root) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def targets(tiny, folder):
    """What the program and the library read, by name."""
    lottery = Lottery(CONFIG_OF_RUN, tiny)
    first, last = lottery.states()
    first.save(folder / "state")
    ticket = make_ticket(last)
    ticket.save(folder / "ticket")
    save_sparse(sparse_network(ticket, (2, 2)), folder / "model", SETTINGS["model"])
    search = Search(general(), 0.2, 1, (2, 2))
    for _ in search:
        search.record(score=1)
    search.ticket().save(folder / "general ticket")
    save_sparse(search.ticket().sparse_network(general()), folder / "general model")

    def load_state(path):
        state = State.load(path)
        expect_settings(CONFIG_OF_RUN, state, path)
        return state

    def go_on(state):
        with suppress(FormatError, TrainingError):  # no such step, or weights that diverge
            next(lottery.states(state), None)

    def load_general_ticket(path):
        ticket = Ticket.load(path)
        ticket.sparse_network(general(), (2, 2))
        return ticket

    def load_general(path):
        return load_sparse(path, general())

    damaged = (TicketError,)
    settings = json.dumps(asdict(CONFIG_OF_RUN)).encode()
    read = {path.name: path.read_bytes() for path in folder.iterdir()} | {CONFIG: settings}
    found = [
        Target("ticket", read["ticket"], load_ticket, damaged, use_ticket),
        Target("model", read["model"], load_sparse, damaged, lambda model: model(IMAGES)),
        Target("state", read["state"], load_state, (FormatError,), go_on),
        Target("general ticket", read["general ticket"], load_general_ticket, (ValueError,), repr),
        Target("general model", read["general model"], load_general, damaged, lambda m: m(IMAGES)),
        Target(CONFIG, settings, lambda p: load_config(p.parent), (SettingError,), use_config),
    ]
    return {target.name: target for target in found}


COUNTS = {
    "ticket": 2500,
    "model": 2500,
    "state": 1500,
    "general ticket": 2500,
    "general model": 2500,
    CONFIG: 2000,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.filterwarnings("ignore:sparsify_ converted no layer")
def test_a_damaged_file_is_refused_or_serves(targets, folder, name):
    accepted = attack(targets[name], folder, COUNTS[name], random.randrange(10**6))
    assert accepted < COUNTS[name] / 2


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
    "--rewind": [
        "init",
        "weights",
        "0it",
        "1ep",
        "99999it",
        "-1it",
        "1.5ep",
        "9" * 30 + "ep",
        "ep",
        "٣it",
    ],
    "--model": ["lenet-5", "lenet-30-10", "", "\udcff", "resnet"],
    "--scope": ["global", "layerwise", "everywhere"],
    "--dataset": ["digits", "", "cifar"],
    "--device": ["cpu", "cuda", "tpu"],
    "--train-sparse": ["on", "off", "maybe"],
    "--reinit": [None],
    "--one-shot": [None],
    "--nonsense": [None, "1"],
}


def quick(models, inputs, rivals):
    """Runs each model once; the times are made up."""
    for model in models.values():
        model(inputs)
    return Benchmark({name: Times((1.0, 2.0)) for name in models}, "dense", {})


@pytest.mark.slow
def test_an_odd_command_line_runs_or_ends_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "benchmark", quick)
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
