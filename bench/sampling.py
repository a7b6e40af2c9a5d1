"""What a :class:`~fedexec.memory.timeline.Timeline` costs a busy worker: ``python bench/sampling.py``.

One worker trains over and over, with the timeline open and without it in turn; the CPU time of the same work
is compared too, which other programs disturb less than the clock on the wall.
"""

import os
import statistics
import time

import fedexec
from fedexec._workload import jobs
from fedexec._workload.data import DataSpec
from fedexec.memory.timeline import Timeline

PAIRS = 15


def work(data: DataSpec) -> tuple[float, float]:
    """Train for some seconds; return the seconds by the clock, and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    config = {"epochs": 6, "batch_size": 32, "learning_rate": 0.02, "server_round": 1}
    jobs.train(jobs.prepare(data), config, data=data, client=0)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Print the ratios."""
    os.environ.setdefault("FEDEXEC_DEVICE", "emulated:24GiB")
    ratios = []
    with fedexec.create_executor(
        "loky", max_workers=1, threads_per_worker=1, preload=jobs.PRELOAD
    ) as executor:
        executor.submit(work, DataSpec()).result()
        for _ in range(PAIRS):
            plain = executor.submit(work, DataSpec()).result()
            with Timeline(executor.devices) as timeline:
                watched = executor.submit(work, DataSpec()).result()
            ratios.append([with_ / without for with_, without in zip(watched, plain, strict=True)])
    samples = len(next(iter(timeline.devices.values())).seconds)
    print(f"{PAIRS} pairs of {plain[0]:.1f} s; the last was sampled {samples} times")
    for name, column in zip(("wall", "CPU"), zip(*ratios, strict=True), strict=True):
        low, middle, high = statistics.quantiles(column, n=4)
        print(f"{name}: watched / not watched: median {middle:.4f} (quartiles {low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
