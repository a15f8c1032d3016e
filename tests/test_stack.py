"""A stack trains each of its networks as it would be trained alone."""

from dataclasses import replace

import pytest
import torch

from sparse_lth.experiments.chains import METHODS, ROW, TICKET, Chain, Job, Plan, chain_path
from sparse_lth.experiments.engine import run_one_by_one, train
from sparse_lth.experiments.stack import run_stacked, train_stack
from sparse_lth.program.data import Dataset, Split, load
from sparse_lth.program.lottery import Lottery, State, search_from

# of `tiny`, four batches an epoch, the last one smaller; step 7 is in the second, at no evaluation
PLAN = Plan(12, every=5, test_every=10, rewind="7it", dataset="digits")
CHAINS = [
    Chain(TICKET, 0, (3, 15), controls=("random reinit", "random mask")),
    Chain(TICKET, 0, (3, 15), blocksize=(16, 16)),
    Chain("one-shot", 1, (7, 15)),
    Chain("fine-tuning", 1, (7,)),
    Chain("learning-rate rewinding", 0, (7,), controls=("continued training",)),
    Chain("dense", 2, (), model="lenet-15-5"),
]


def _jobs(chain, data, plan):
    """The dense network of a chain, and its first pruned one, as if the dense one had not moved."""
    method = METHODS[chain.method]
    lottery = Lottery(chain.config(plan, method, 0), data)
    start = lottery.start()
    yield Job(chain, chain.method, 0, 0, lottery.config, start)
    if chain.levels:
        search = search_from(lottery.config, start, trained=True, levels=chain.levels[:1])
        next(iter(search))
        config = chain.config(plan, method, chain.levels[0])
        start = lottery.begin_round(start, search)
        yield Job(chain, chain.method, chain.levels[0], 1, config, start)


def _assert_alike(a, b, rtol):
    """Two records, or rows: the same but for rounding of the losses."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name.endswith("loss") and value is not None:
            assert b[name] == pytest.approx(value, rel=rtol), name
        else:
            assert b[name] == value, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_stack_trains_each_network_as_it_would_be_trained_alone(tiny, device):
    parts = [getattr(tiny, name) for name in ("train", "validation", "test")]
    tiny = Dataset("digits", *(Split(s.images.to(device), s.labels.to(device)) for s in parts))
    plan = replace(PLAN, device=device)
    jobs = [job for chain in CHAINS for job in _jobs(chain, tiny, plan)]
    assert len({(job.start.step, job.config.lr) for job in jobs}) == 3  # as many groups
    for job, stacked in zip(jobs, train_stack(jobs, tiny, PLAN.test_every), strict=True):
        alone = train(job, tiny, PLAN.test_every)
        for a, b in zip(alone.records, stacked.records, strict=True):
            _assert_alike(a, b, rtol=1e-5)
        for name in ("round", "epoch", "step", "sparse", "history", "settings"):
            assert getattr(stacked.state, name) == getattr(alone.state, name), name
        assert torch.equal(stacked.state.generator, alone.state.generator)
        for name, mask in job.start.masks.items():
            assert torch.equal(stacked.state.masks[name], mask)
            assert not stacked.state.weights[f"{name}.weight"][~mask].any()
        for name, start in job.start.weights.items():
            for group in ("weights", "init"):
                a, b = getattr(alone.state, group)[name], getattr(stacked.state, group)[name]
                # a step of Adam is lr * m / (sqrt(v) + 1e-8): rounding shows where v is nearly 0
                apart = (a - b).abs() > 1e-2 * job.config.lr
                assert apart.float().mean() < 1e-3, (job.name, group, name)
            assert not torch.equal(alone.state.weights[name], start)


def _histories(folder):
    return [State.load(chain_path(folder, chain), ROW).history for chain in CHAINS]


def _folder(path):
    for name in ("chains", "networks"):
        (path / name).mkdir(parents=True)
    return path


def test_stacked_chains_leave_the_files_of_chains_run_alone_and_go_on(tmp_path):
    alone, stacked = _folder(tmp_path / "alone"), _folder(tmp_path / "stacked")
    digits = load("digits", "", "cpu")
    for chain in CHAINS:
        run_one_by_one(PLAN, chain, digits, alone)
    run_stacked(PLAN, CHAINS, stacked)
    files = [{p.relative_to(f) for p in f.rglob("*.*")} for f in (alone, stacked)]
    assert files[0] == files[1]
    networks = 0
    for a, b in zip(_histories(alone), _histories(stacked), strict=True):
        assert len(a) == len(b)
        networks += sum(row["iteration"] == 12 for row in a)
        for row, other in zip(a, b, strict=True):
            _assert_alike(row, other, rtol=1e-5)
    assert networks == 7 + 3 + 3 + 2 + 3 + 1
    lost, before = chain_path(stacked, CHAINS[3]), _histories(stacked)
    others = {path: path.read_bytes() for path in stacked.rglob("*.*") if path != lost}
    lost.unlink()
    run_stacked(PLAN, CHAINS, stacked)
    for row, other in zip(before[3], _histories(stacked)[3], strict=True):
        _assert_alike(row, other, rtol=1e-5)  # in a stack of one, so to rounding
    assert {p: p.read_bytes() for p in stacked.rglob("*.*") if p != lost} == others
