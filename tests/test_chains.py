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
    ROW,
    TICKET,
    Chain,
    Plan,
    chain_path,
    grid,
    run_chain,
    scatter_masks,
    ticket_path,
)
from sparse_lth.experiments.engine import run_pool, run_ray
from sparse_lth.experiments.paper import collect
from sparse_lth.program import data
from sparse_lth.program.lottery import Lottery, State, begin_round, redraw, search_from
from sparse_lth.program.tickets import load_ticket
from sparse_lth.weights import masked

ROOT = Path(__file__).parent.parent
PLAN = Plan(60, every=20, test_every=40, rewind_step="20it", dataset="digits")
CHAINS = [
    Chain(TICKET, 0, (3, 15), controls=True),
    Chain("one-shot", 1, (7, 15)),
    Chain("late rewinding", 1, (7,)),
    Chain("dense", 2, (), model="lenet-15-5"),
]
NETWORKS = 7 + 3 + 2 + 1


@pytest.fixture(scope="module")
def dense(tiny):
    """A ticket chain's configuration for its third round, and its trained dense network."""
    config = Chain(TICKET, 0, (3,)).config(PLAN, 0)
    lottery = Lottery(config, tiny)
    start = lottery.start()
    *_, state = lottery.train(start.model(), start)
    return config, state


def _third_round(dense, rewind="init"):
    config, state = dense
    search = search_from(config, state, trained=True, levels=(3,), rewind=rewind)
    next(iter(search))
    return begin_round(state, search)


def _same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def _counts(masks):
    return [int(mask.sum()) for mask in masks.values()]


def test_a_reinit_has_the_masks_of_the_ticket_and_other_weights(dense):
    ticket = _third_round(dense)
    control = redraw(ticket)
    assert _same(control.masks, ticket.masks)
    assert not torch.equal(control.init["fc1.weight"], ticket.init["fc1.weight"])
    deviations = [float(s.init["fc1.weight"].std()) for s in (control, ticket)]
    assert deviations[0] == pytest.approx(deviations[1], rel=0.01)
    assert _same(control.weights, masked(control.init, ticket.masks))


def test_a_random_mask_has_the_weights_of_the_ticket_and_its_count_in_each_layer(dense):
    ticket = _third_round(dense)
    control = scatter_masks(ticket)
    assert _same(control.init, ticket.init)
    assert _same(control.weights, masked(ticket.init, control.masks))
    assert _counts(control.masks) == _counts(ticket.masks)
    assert not torch.equal(control.masks["fc1"], ticket.masks["fc1"])
    assert _same(scatter_masks(ticket).masks, control.masks)


def test_without_rewinding_the_trained_weights_stay(dense):
    kept, rewound = _third_round(dense, "weights"), _third_round(dense)
    assert _same(kept.masks, rewound.masks)
    assert _same(kept.weights, masked(dense[1].weights, kept.masks))
    assert not torch.equal(kept.weights["fc1.weight"], rewound.weights["fc1.weight"])


def _folder(path):
    for name in ("chains", "tickets"):
        (path / name).mkdir(parents=True)
    return path


@pytest.mark.slow
def test_one_shot_prunes_the_dense_network_each_time(tiny, dense, tmp_path):
    chain = Chain("one-shot", 0, (3, 15))
    lines = list(run_chain(PLAN, chain, tiny, _folder(tmp_path)))
    assert len(lines) == 3
    state = State.load(chain_path(tmp_path, chain), ROW)
    assert _same(state.weights, dense[1].weights)
    densities = {row["round"]: row["density"] for row in state.history}
    iterative = Chain(TICKET, 0, (3, 15))
    list(run_chain(PLAN, iterative, tiny, tmp_path))
    rows = State.load(chain_path(tmp_path, iterative), ROW).history
    assert densities == {row["round"]: row["density"] for row in rows}
    ticket = load_ticket(ticket_path(tmp_path, iterative, 15))
    assert ticket.density == densities[15]


def test_every_evaluation_is_a_row_and_the_early_stop_is_tested(tiny, tmp_path):
    chain = CHAINS[0]
    assert len(list(run_chain(PLAN, chain, tiny, _folder(tmp_path)))) == 7
    rows = State.load(chain_path(tmp_path, chain), ROW).history
    assert len(rows) == 7 * 4
    for n in range(0, len(rows), 4):
        training = rows[n : n + 4]
        assert [row["iteration"] for row in training] == [0, 20, 40, 60]
        assert len({(row["method"], row["round"], row["density"]) for row in training}) == 1
        early = min(training, key=lambda row: row["validation_loss"])
        for row in (training[0], training[2], training[3], early):
            assert row["test_accuracy"] is not None
    assert {row["method"] for row in rows} == {TICKET, "random reinit", "random mask"}


def test_the_grid_has_every_method_once_for_each_replicate():
    chains = grid(Plan(), 3)
    assert len({chain.name for chain in chains}) == len(chains)
    assert {chain.method for chain in chains} == METHODS.keys()
    assert {chain.replicate for chain in chains} == {0, 1, 2}
    assert Plan().levels[-1] == Plan.full().levels[-1] == LAST
    assert Plan.full().levels == tuple(range(1, 16))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The rows of CHAINS, run one after the other without a break."""
    folder = _folder(tmp_path_factory.mktemp("expected"))
    digits, threads = data.load("digits", "", "cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    for chain in CHAINS:
        list(run_chain(PLAN, chain, digits, folder))
    torch.set_num_threads(threads)
    return collect(CHAINS, folder)


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
    assert collect(CHAINS, folder) == expected


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
    assert 0 < networks < NETWORKS
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == NETWORKS - networks
    assert collect(CHAINS, folder) == expected


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
    assert collect(CHAINS, folder) == expected
