"""Runs chains in parallel, on this machine or on a Ray cluster, to the same results.

A chain that loses its process or its machine is run again, and goes on after its last saved round.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

import torch

from ..program.data import Dataset, load
from .chains import Chain, Plan, run_chain

ATTEMPTS = 5  # a chain that kills its process as often is given up


class EngineError(RuntimeError):
    """The chains cannot be run; the message says why and what to do."""


def work(plan: Plan, chain: Chain, folder: Path) -> str:
    """One chain to its end, in a process of its own with one thread; returns its name."""
    torch.set_num_threads(1)
    data = _dataset(plan.dataset, plan.data_dir, plan.device)
    for line in run_chain(plan, chain, data, folder):
        print(line, flush=True)
    return chain.name


@cache
def _dataset(name: str, data_dir: str, device: str) -> Dataset:
    """Loaded once by each process."""
    return load(name, data_dir, device)


def run_pool(plan: Plan, chains: Sequence[Chain], folder: Path, workers: int) -> None:
    """All chains, `workers` at a time, in processes of this machine."""
    context = multiprocessing.get_context("spawn")
    for _ in range(ATTEMPTS):
        with ProcessPoolExecutor(workers, context, _follow_parent) as pool:
            futures = {pool.submit(work, plan, chain, folder): chain for chain in chains}
            try:
                for future in as_completed(futures):
                    future.result()
                return
            except BrokenProcessPool:
                print("a worker died: its chains go on after their last saved round", flush=True)
            except BaseException:
                for worker in multiprocessing.active_children():
                    worker.terminate()  # a round may take an hour
                raise
    raise EngineError(f"expected the chains to end, but {ATTEMPTS} times a worker died")


def _follow_parent() -> None:
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
        while pending:
            (done,), pending = ray.wait(pending)
            ray.get(done)
    finally:
        ray.shutdown()
