import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from sparse_lth.experiments.chains import (
    LAST,
    METHODS,
    NETWORKS,
    ROW,
    TICKET,
    Chain,
    Plan,
    chain_path,
    grid,
    network_path,
)
from sparse_lth.experiments.controls import CONTROLS
from sparse_lth.experiments.engine import run_one_by_one, run_pool, run_ray
from sparse_lth.experiments.paper import collect
from sparse_lth.program import data
from sparse_lth.program.lottery import Lottery, State, search_from
from sparse_lth.saving import load_sparse
from sparse_lth.weights import masked, weight_name

ROOT = Path(__file__).parent.parent
PLAN = Plan(60, every=20, test_every=40, rewind="20it", dataset="digits")
CHAINS = [
    Chain(TICKET, 0, (3, 15), controls=("random reinit", "random mask")),
    Chain("one-shot", 1, (7, 15)),
    Chain("late rewinding", 1, (7,)),
    Chain("dense", 2, (), model="lenet-15-5"),
]
TRAINED = 7 + 3 + 2 + 1


@pytest.fixture(scope="module")
def dense(tiny):
    """A ticket chain's configuration for its third round, and its trained dense network."""
    lottery = Lottery(Chain(TICKET, 0, (3,)).config(PLAN, METHODS[TICKET], 0), tiny)
    start = lottery.start()
    *_, state = lottery.train(start.model(), start)
    return lottery, state


def _third_round(dense, rewind="init"):
    lottery, state = dense
    search = search_from(lottery.config, state, trained=True, levels=(3,), rewind=rewind)
    next(iter(search))
    return lottery.begin_round(state, search)


def _same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def _counts(masks):
    return [int(mask.sum()) for mask in masks.values()]


def test_a_reinit_has_the_masks_of_the_ticket_and_other_weights(dense):
    ticket = _third_round(dense)
    control = CONTROLS["random reinit"](ticket)
    assert _same(control.masks, ticket.masks)
    kept = ticket.masks["fc1"]
    drawn, first = (s.weights["fc1.weight"] for s in (control, ticket))
    assert not drawn[~kept].any()
    deviations = [float(weight[kept].std()) for weight in (drawn, ticket.init["fc1.weight"])]
    glorot = (2 / (784 + 300)) ** 0.5
    assert deviations[0] == pytest.approx(glorot, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([drawn[kept], first[kept]]))[0, 1])) < 0.02


def test_a_random_mask_has_the_weights_of_the_ticket_and_its_count_in_each_layer(dense):
    ticket = _third_round(dense)
    control = CONTROLS["random mask"](ticket)
    assert _same(control.weights, masked(ticket.init, control.masks))
    assert _counts(control.masks) == _counts(ticket.masks)
    shared = float((control.masks["fc1"] & ticket.masks["fc1"]).float().mean())
    density = float(ticket.masks["fc1"].float().mean())
    assert shared == pytest.approx(density**2, rel=0.02)  # as of two that have nothing to do
    assert _same(CONTROLS["random mask"](ticket).masks, control.masks)


def test_what_is_pruned_before_training_keeps_the_largest_first_weights(dense):
    ticket = _third_round(dense)
    control = CONTROLS["pruned before training"](ticket)
    assert _counts(control.masks) == _counts(ticket.masks)
    for name, mask in control.masks.items():
        first = ticket.init[weight_name(name)].abs()
        assert first[mask].min() >= first[~mask].max()
    assert _same(control.weights, masked(ticket.init, control.masks))


def test_weights_drawn_from_the_ticket_are_some_of_those_that_it_keeps_in_the_layer(dense):
    ticket = _third_round(dense)
    control = CONTROLS["reinit from the ticket"](ticket)
    assert _same(control.masks, ticket.masks)
    for name, mask in ticket.masks.items():
        drawn, kept = control.weights[weight_name(name)], ticket.init[weight_name(name)][mask]
        assert torch.isin(drawn[mask], kept).all()
        assert not torch.equal(drawn[mask], kept)
        assert not drawn[~mask].any()


@pytest.mark.parametrize("factor", [0.5, 3])
def test_noise_is_so_many_standard_deviations_of_the_layers_first_weights(dense, factor):
    ticket = _third_round(dense)
    control = CONTROLS[f"noise of {factor} std"](ticket)
    assert _same(control.masks, ticket.masks)
    for name, mask in ticket.masks.items():
        noise = (control.weights[weight_name(name)] - ticket.init[weight_name(name)])[mask]
        deviation = ticket.init[weight_name(name)].std()
        # of n numbers the deviation is known to 1 / sqrt(2 n), here to four times as much
        assert float(noise.std() / deviation) == pytest.approx(
            factor, rel=4 / (2 * len(noise)) ** 0.5
        )
        assert not control.weights[weight_name(name)][~mask].any()


def test_continued_training_resets_its_masks_to_the_first_weights(dense):
    state = _third_round(dense, "weights")
    control = CONTROLS["continued training"](state)
    assert _same(control.masks, state.masks)
    assert _same(control.weights, masked(dense[0].start().init, state.masks))
    assert not torch.equal(control.weights["fc1.weight"], state.weights["fc1.weight"])
    assert (control.epoch, control.step) == (0, 0)


def test_without_rewinding_the_trained_weights_stay(dense):
    kept, rewound = _third_round(dense, "weights"), _third_round(dense)
    assert _same(kept.masks, rewound.masks)
    assert _same(kept.weights, masked(dense[1].weights, kept.masks))
    assert not torch.equal(kept.weights["fc1.weight"], rewound.weights["fc1.weight"])


def _folder(path):
    for name in ("chains", "networks"):
        (path / name).mkdir(parents=True)
    return path


def _run(chain, tiny, folder):
    run_one_by_one(PLAN, chain, tiny, folder)
    return State.load(chain_path(folder, chain), ROW)


@pytest.mark.slow
def test_one_shot_prunes_the_dense_network_each_time(tiny, dense, tmp_path):
    state = _run(Chain("one-shot", 0, (3, 15)), tiny, _folder(tmp_path))
    assert _same(state.weights, dense[1].weights)
    found = {row["round"]: (row["density"], row["prunings"]) for row in state.history}
    iterative = Chain(TICKET, 0, (3, 15))
    rows = _run(iterative, tiny, tmp_path).history
    assert found.keys() == {0, 3, 15}
    assert {n: density for n, (density, _) in found.items()} == {
        row["round"]: row["density"] for row in rows
    }
    assert {n: prunings for n, (_, prunings) in found.items()} == {0: 0, 3: 1, 15: 1}
    assert {row["round"]: row["prunings"] for row in rows} == {0: 0, 3: 1, 15: 2}
    network = load_sparse(network_path(tmp_path, iterative, 15))
    state = State.load(chain_path(tmp_path, iterative), ROW)
    assert torch.equal(network.fc1.to_dense().weight, state.weights["fc1.weight"])


def test_what_is_tested_is_a_row_and_the_early_stop_and_the_end_have_every_accuracy(tiny, tmp_path):
    rows = _run(CHAINS[0], tiny, _folder(tmp_path)).history
    trainings = {}
    for row in rows:
        trainings.setdefault((row["method"], row["round"]), []).append(row)
    assert len(trainings) == 7
    assert {method for method, _ in trainings} == {TICKET, "random reinit", "random mask"}
    for training in trainings.values():
        steps = [row["iteration"] for row in training]
        early = min(training, key=lambda row: row["validation_loss"])
        assert set(steps) == {0, 40, 60, early["iteration"]}  # evaluated at 20, too
        assert steps == sorted(steps)
        assert len({(row["density"], row["prunings"]) for row in training}) == 1
        assert all(row["test_accuracy"] is not None for row in training)
        for row in (early, training[-1]):
            assert row["train_accuracy"] is not None


def test_late_rounds_are_trained_from_step_k_to_the_end(tiny, tmp_path):
    rows = _run(CHAINS[2], tiny, _folder(tmp_path)).history
    steps = {n: [row["iteration"] for row in rows if row["round"] == n] for n in (0, 7)}
    assert (steps[0][0], steps[7][0]) == (0, 20)
    assert steps[0][-1] == steps[7][-1] == 60


def test_the_grid_has_every_network_once_for_each_replicate():
    chains = grid(Plan(), 5)
    assert len({chain.name for chain in chains}) == len(chains)
    assert {chain.method for chain in chains} == METHODS.keys()
    assert {chain.replicate for chain in chains} == {0, 1, 2, 3, 4}
    assert sorted(name for chain in chains[:10] for name in chain.controls) == sorted(
        5 * [*CONTROLS]
    )
    assert {chain.levels for chain in chains} == {Plan().levels, ()}  # one ladder for all
    assert Plan().levels[-1] == Plan.full().levels[-1] == LAST
    assert Plan.full().levels == tuple(range(1, 16))
    assert {*METHODS, *CONTROLS} < {*NETWORKS}


def test_a_part_of_the_grid_is_the_networks_that_were_asked_for():
    chains = grid(Plan(), 1, [TICKET, "random reinit"])
    assert [(chain.method, chain.blocksize, chain.controls) for chain in chains] == [
        (TICKET, (1, 1), ("random reinit",))
    ]
    assert {chain.blocksize for chain in grid(Plan(), 1, ["blocks"])} == {
        (16, 16),
        (16, 4),
        (16, 1),
    }
    assert len(grid(Plan(), 1, ["dense"])) == 4
    (chain,) = grid(Plan(), 1, ["continued training"])
    assert (chain.method, chain.controls) == ("learning-rate rewinding", ("continued training",))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The rows of CHAINS, run one after the other without a break."""
    folder = _folder(tmp_path_factory.mktemp("expected"))
    digits, threads = data.load("digits", "", "cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    for chain in CHAINS:
        run_one_by_one(PLAN, chain, digits, folder)
    torch.set_num_threads(threads)
    return collect(CHAINS, folder, {})


def _await(folder, files):
    deadline = time.monotonic() + 60
    while len(list((folder / "chains").glob("*.safetensors"))) < files:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_worker_loses_and_repeats_nothing(expected, tmp_path, capfd):
    folder = _folder(tmp_path)

    def kill():
        _await(folder, 1)
        active_children()[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    run_pool(PLAN, CHAINS, folder, workers=2)
    killer.join()
    assert "a worker died" in capfd.readouterr().out
    assert collect(CHAINS, folder, {}) == expected


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(expected, tmp_path):
    folder = _folder(tmp_path)
    script = (
        "from pathlib import Path; from sparse_lth.experiments.engine import run_pool; "
        "from sparse_lth.experiments.chains import Chain, Plan; "
        f"run_pool({PLAN}, {CHAINS}, Path({str(folder)!r}), 2)"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(4):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # ends with the last of the workers
    saved = [State.load(path, ROW).history for path in (folder / "chains").glob("*.safetensors")]
    networks = sum(len({(row["method"], row["round"]) for row in rows}) for rows in saved)
    assert 0 < networks < TRAINED
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == TRAINED - networks
    assert collect(CHAINS, folder, {}) == expected


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_has_the_results_of_the_pool(
    expected, tmp_path, monkeypatch
):
    pytest.importorskip("ray", reason="needs Ray: pip install '.[cluster]'")
    from ray.cluster_utils import Cluster

    folder = _folder(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)

    def kill():
        _await(folder, 2)  # two chains are under way, one on each node
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run_ray(PLAN, CHAINS, folder, 2, cluster.address)
        killer.join()
    finally:
        cluster.shutdown()
    assert collect(CHAINS, folder, {}) == expected
