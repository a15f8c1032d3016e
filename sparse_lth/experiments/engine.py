"""Runs chains to their ends, one network at a time in each of several processes, on this machine or
on a Ray cluster, to the same results.

A chain that loses its process or its machine is run again, and goes on after its last saved round.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

import torch

from ..masks import density
from ..program.data import Dataset, load
from ..program.lottery import Lottery
from ..program.training import evaluate
from ..weights import Tensors, snapshot, write_
from .chains import ACCURACIES, LOSSES, Chain, Job, Plan, Trained, early_stop, record_of, run_chain
from .progress import Watch

LOOK = 0.1  # seconds between two looks at how far the chains are
ATTEMPTS = 5  # a chain that kills its process as often is given up


class EngineError(RuntimeError):
    """The chains cannot be run; the message says why and what to do."""


def work(plan: Plan, chain: Chain, folder: Path) -> str:
    """One chain to its end, in a process of its own with one thread; returns its name."""
    torch.set_num_threads(1)
    data = load_once(plan.dataset, plan.data_dir, plan.device)
    run_one_by_one(plan, chain, data, folder)
    return chain.name


def run_one_by_one(plan: Plan, chain: Chain, data: Dataset, folder: Path) -> None:
    """One chain to its end, each network after the other."""
    rounds, trained = run_chain(plan, chain, data, folder), None
    while True:
        try:
            jobs = rounds.send(trained)
        except StopIteration:
            return
        trained = [train(job, data, plan.test_every) for job in jobs]


def train(job: Job, data: Dataset, test_every: int) -> Trained:
    """The whole round of one network."""
    model, other = job.start.model(), job.start.model().to(job.config.device)
    kept = density(job.start.masks)

    def accuracies(weights: Tensors, *splits: str) -> dict[str, float]:
        write_(other, weights, {})
        return {f"{name}_accuracy": evaluate(other, getattr(data, name))[1] for name in splits}

    loss, accuracy = evaluate(other, data.validation)
    tested = {"validation_accuracy": accuracy, **accuracies(job.start.weights, "test")}
    records = [record_of(kept, job.start.step, {"validation_loss": loss}, tested)]
    early_weights = job.start.weights
    for state in Lottery(job.config, data).train(model, job.start):
        last = state.history[-1]
        losses = {name: last[name] for name in LOSSES}
        tested = {name: last[name] for name in ACCURACIES if name in last}
        if state.step % test_every == 0 and "test_accuracy" not in tested:
            tested |= accuracies(state.weights, "test")
        records.append(record_of(kept, state.step, losses, tested))
        if early_stop(records) is records[-1]:
            early_weights = {name: weight.clone() for name, weight in state.weights.items()}
    records[-1] |= accuracies(state.weights, "train")
    early_stop(records).update(accuracies(early_weights, "test", "train"))
    state = replace(state, weights=snapshot(model), sparse=(), optimizer={}, history=())
    return Trained(state, records)


@cache
def load_once(name: str, data_dir: str, device: str) -> Dataset:
    """Loaded once by each process."""
    return load(name, data_dir, device)


def run_pool(plan: Plan, chains: Sequence[Chain], folder: Path, workers: int) -> None:
    """All chains, `workers` at a time, in processes of this machine."""
    context = multiprocessing.get_context("spawn")
    with Watch(chains, folder) as watch:
        for _ in range(ATTEMPTS):
            with ProcessPoolExecutor(workers, context, follow_parent) as pool:
                pending = {pool.submit(work, plan, chain, folder) for chain in chains}
                try:
                    while pending:
                        done, pending = futures.wait(pending, LOOK, futures.FIRST_COMPLETED)
                        for future in done:
                            future.result()
                        watch.update()
                    return
                except BrokenProcessPool:
                    watch.say("a worker died: its chains go on after their last saved round")
                except BaseException:
                    for worker in multiprocessing.active_children():
                        worker.terminate()  # a round may take an hour
                    raise
    raise EngineError(f"expected the chains to end, but {ATTEMPTS} times a worker died")


def follow_parent() -> None:
    """Ends this worker with the process that started it, whose successor would run its chain."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for that process to answer
    parent = multiprocessing.parent_process()

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_ray(plan: Plan, chains: Sequence[Chain], folder: Path, workers: int, address: str) -> None:
    """All chains as tasks of the cluster at `address`; "local" starts one here.

    Every node needs this package and, at the same paths, the results folder, on a shared disk,
    and the data.
    """
    try:
        import ray
    except ImportError:
        raise EngineError(
            "expected Ray for --ray, which is not installed: pip install 'sparse_lth[cluster]'"
        ) from None
    local = {"num_cpus": workers} if address == "local" else {}
    ray.init(address=address, **local)
    try:
        task = ray.remote(num_cpus=1, max_retries=ATTEMPTS)(work)
        pending = [task.remote(plan, chain, folder) for chain in chains]
        with Watch(chains, folder) as watch:
            while pending:
                done, pending = ray.wait(pending, timeout=LOOK)
                ray.get(done)
                watch.update()
    finally:
        ray.shutdown()
