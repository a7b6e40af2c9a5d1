"""Run many tasks in one ``standby`` executor and watch what stays: ``python bench/flat.py [TASKS]``."""

import os
import sys

import psutil

import fedexec
from fedexec.workload import jobs

ROUND = 500


def main() -> None:
    """Print a line every 500 tasks; end with an error if anything has grown."""
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    pids: set[int] = set()
    rows = []
    with fedexec.create_executor("standby", preload=jobs.PRELOAD) as executor:
        template = next(child for child in psutil.Process().children() if "_template" in str(child.cmdline()))
        for done in range(ROUND, total + 1, ROUND):
            futures = [executor.submit(os.getpid) for _ in range(ROUND)]
            pids.update(future.result() for future in futures)
            del futures
            caller = psutil.Process()
            rows.append((caller.memory_info().rss, template.memory_info().rss))
            print(
                f"{done:>6} tasks, {len(pids)} pids; caller {rows[-1][0] >> 10} KiB, "
                f"template {rows[-1][1] >> 10} KiB, {caller.num_fds()} descriptors, {_zombies()} zombies",
                flush=True,
            )
    base = rows[min(1, len(rows) - 1)]  # after the first 1,000
    growth = [last / first - 1 for first, last in zip(base, rows[-1], strict=True)]
    segments = sum("memfd:fedexec" in file.path for file in psutil.Process().open_files())
    print(f"growth since the first 1,000: caller {growth[0]:+.2%}, template {growth[1]:+.2%}")
    if len(pids) != total or max(growth) > 0.02 or segments:
        sys.exit("not flat")


def _zombies() -> int:
    family = psutil.Process().children(recursive=True)
    return sum(1 for process in family if process.is_running() and process.status() == psutil.STATUS_ZOMBIE)


if __name__ == "__main__":
    main()
