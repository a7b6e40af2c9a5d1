"""Device memory of each strategy: ``python bench/footprint.py [--json FILE]``.

The tutorial's federation has 100 clients, samples 10 per round, and trains for 10 rounds, on an EMULATED
device of 24 GiB unless ``FEDEXEC_DEVICE`` names another one. The first row shows the problem that the
tutorial solves: one process per client, which keeps its CUDA context as long as the client exists.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fedexec
from fedexec._system.sizes import format_size, parse_size
from fedexec._worker.setup import environment
from fedexec._workload import jobs
from fedexec._workload.data import DataSpec
from fedexec.devices.device import Device
from fedexec.devices.discovery import find_devices
from fedexec.memory.timeline import Timeline
from fedexec.settings import resolve

CLIENTS, SAMPLED, ROUNDS, WORKERS = 100, 10, 10, 4
LIMIT = "600MiB"
CONFIG = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02}
PERSISTENT = "one process per client"
STRATEGIES = (PERSISTENT, "process", "pool", "standby", "loky")

Submit = Callable[..., "Future[Any]"]


@dataclass(frozen=True)
class Row:
    """The results of one strategy; None means not measured.

    Attributes
    ----------
    strategy : str
    peak_bytes : int or None
        The highest use of the device above the baseline, as the timeline or a task has seen it.
    residual_bytes, end_bytes : int or None
        The highest use after a round, and the use after shutdown.
    footprint_bytes : int or None
        The highest peak of one worker.
    out_of_memory, tasks : int
        Number of tasks that ran out of memory, and of all tasks.
    """

    strategy: str
    peak_bytes: int | None
    residual_bytes: int | None
    end_bytes: int | None
    footprint_bytes: int | None
    out_of_memory: int
    tasks: int


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    arguments = parser.parse_args()
    os.environ.setdefault("FEDEXEC_DEVICE", "emulated:24GiB")
    (device, *_) = find_devices()
    print(f"{device.name}; {CLIENTS} clients, {SAMPLED} per round, {ROUNDS} rounds, {WORKERS} at once")
    print(
        f"{'strategy':<24}{'peak':>12}{'after a round':>16}{'at the end':>12}{'a worker':>16}{'failed':>12}"
    )
    rows = []
    for strategy in STRATEGIES:
        rows.append(row := measure(strategy, device))
        sizes = (row.peak_bytes, row.residual_bytes, row.end_bytes, row.footprint_bytes)
        peak, residual, end, footprint = map(format_size, sizes)
        failed = f"{row.out_of_memory} of {row.tasks}"
        print(f"{strategy:<24}{peak:>12}{residual:>16}{end:>12}{footprint:>16}{failed:>12}", flush=True)
    print(f"\nFailed: out of memory. `loky` ran with device_memory_limit={LIMIT}.")
    if arguments.json:
        report = {
            "device": device.name,
            "limit_bytes": parse_size(LIMIT),
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(strategy: str, device: Device) -> Row:
    """Run the federation once.

    Parameters
    ----------
    strategy : str
    device : Device

    Returns
    -------
    Row
    """
    data = DataSpec(clients=CLIENTS)
    rng = random.Random(0)
    weights = jobs.prepare(data)
    usages, failures, tasks = [], 0, 0
    with Timeline([device]) as timeline:
        with _persistent(data) if strategy == PERSISTENT else _with_fedexec(strategy, data) as submit:
            for server_round in range(1, ROUNDS + 1):
                config = CONFIG | {"server_round": server_round}
                clients = rng.sample(range(CLIENTS), SAMPLED)
                futures = [
                    submit(client, functools.partial(jobs.train, data=data, client=client), weights, config)
                    for client in clients
                ]
                for future in futures:
                    error = future.exception()
                    failures += "out of memory" in str(error)
                    if error is not None and "out of memory" not in str(error):
                        raise error
                    usages.append(getattr(future, "usage", None))
                tasks += len(futures)
                timeline.mark("round", server_round)
        end = timeline.mark("shutdown").device_bytes[device.uuid]
    footprints = [usage.peak_device_bytes for usage in usages if usage and usage.peak_device_bytes]
    residual = timeline.residual_bytes(device.uuid, "round")
    peak = timeline.devices[device.uuid].peak
    return Row(strategy, peak, residual, end, max(footprints, default=None), failures, tasks)


@contextlib.contextmanager
def _with_fedexec(backend: str, data: DataSpec) -> Iterator[Submit]:
    warm_up = functools.partial(jobs.warm_up, data)
    limit = LIMIT if backend == "loky" else None
    with fedexec.create_executor(
        backend, max_workers=WORKERS, preload=jobs.PRELOAD, warmup=warm_up, device_memory_limit=limit
    ) as executor:
        yield lambda client, fn, *args: executor.submit(fn, *args)


@contextlib.contextmanager
def _persistent(data: DataSpec) -> Iterator[Submit]:
    """Make one process per client, which lasts as long as the federation."""
    os.environ.update(environment(resolve({"max_workers": WORKERS})))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(jobs.PRELOAD))
    pools: dict[int, ProcessPoolExecutor] = {}

    def submit(client: int, fn: Callable[..., Any], *args: Any) -> "Future[Any]":
        if client not in pools:
            pools[client] = ProcessPoolExecutor(1, context)
        return pools[client].submit(fn, *args)

    try:
        yield submit
    finally:
        for pool in pools.values():
            pool.shutdown()


if __name__ == "__main__":
    main()
