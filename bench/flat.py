"""Run many tasks in one ``standby`` executor and watch what stays: ``python bench/flat.py [TASKS]``."""

import os
import sys
from pathlib import Path

import psutil

import fedexec
from fedexec._workload import jobs

ROUND = 500
PID_MAX = int(Path("/proc/sys/kernel/pid_max").read_text())


def main() -> None:
    """Print a line every 500 tasks; end with an error that says what is not as promised."""
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seen = bytearray(PID_MAX)  # a set of pids would grow, and be measured, itself
    caller = psutil.Process()
    rows = []
    with fedexec.create_executor("standby", preload=jobs.PRELOAD) as executor:
        template = psutil.Process(executor.submit(os.getppid).result())
        for done in range(ROUND, total + 1, ROUND):
            futures = [executor.submit(os.getpid) for _ in range(ROUND)]
            for future in futures:
                seen[future.result()] = 1
            del futures, future
            rows.append((caller.memory_info().rss, template.memory_info().rss, caller.num_fds()))
            print(
                f"{done:>6} tasks, {seen.count(1)} pids; caller {rows[-1][0] >> 10} KiB, "
                f"template {rows[-1][1] >> 10} KiB, {rows[-1][2]} descriptors, {_zombies()} zombies",
                flush=True,
            )
        descriptors = caller.num_fds()
    base = rows[min(1, len(rows) - 1)]  # after the first 1,000
    wrong = []
    for name, first, last in zip(("caller", "template"), base, rows[-1], strict=False):
        print(f"{name}: {last / first - 1:+.2%} memory since the first 1,000 tasks")
        if last > 1.02 * first:
            wrong.append(f"the {name} grew")
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    segments = sum("memfd:fedexec" in str(link.readlink()) for link in links)
    left = [
        child for child in caller.children(recursive=True) if "resource_tracker" not in str(child.cmdline())
    ]
    print(f"after shutdown: {caller.num_fds()} descriptors ({descriptors} before it), {segments} segments")
    if seen.count(1) != total:
        wrong.append("a pid came twice")
    if segments:
        wrong.append("segments stay open")
    if left:
        wrong.append(f"processes stay: {left}")
    if wrong:
        sys.exit(f"not as promised: {'; '.join(wrong)}")


def _zombies() -> int:
    family = psutil.Process().children(recursive=True)
    return sum(1 for process in family if process.is_running() and process.status() == psutil.STATUS_ZOMBIE)


if __name__ == "__main__":
    main()
