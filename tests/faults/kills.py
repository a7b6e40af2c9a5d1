"""Kill a process that runs tasks, at a random moment, again and again: what is alive two seconds later?

``make soak`` does it 200 times. Each caller carries a mark in its environment, which everything it starts,
and that those start, inherits: so nothing that is left can hide.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

from fedexec.testing.leaks import memory_of, still_named

GRACE_SECONDS = 2.0
LONGEST_SECONDS = 2.5  # from the start of a caller to its end: imports, template, tasks
CALLER = """
import sys, threading, numpy, fedexec
from fedexec.testing import bad_tasks, tasks
with fedexec.create_executor(sys.argv[1], max_workers=2) as executor:
    while True:
        futures = [executor.submit(numpy.sort, numpy.arange(100_000)) for _ in range(20)]
        futures.append(executor.submit(bad_tasks.leave_behind, 2))
        for future in futures:
            future.result()
"""


def kill_callers(backend: str, times: int, seed: int) -> list[str]:
    """Return what was left alive, or of shared memory, two seconds after each kill."""
    moments, left = random.Random(seed), []
    for number in range(times):
        mark = str(uuid.uuid4())
        caller = subprocess.Popen(
            [sys.executable, "-c", CALLER, backend],
            env=os.environ | {"FEDEXEC_TEST_MARK": mark},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        moment = moments.uniform(0, LONGEST_SECONDS)
        time.sleep(moment)
        assert caller.poll() is None, "the caller ended by itself"
        segments = memory_of(
            [psutil.Process(caller.pid), *psutil.Process(caller.pid).children(recursive=True)]
        )
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        end = time.monotonic() + GRACE_SECONDS
        while (alive := _marked(mark)) and time.monotonic() < end:
            time.sleep(0.01)
        left += [f"kill {number} after {moment:.3f} s: {process}" for process in alive]
        left += [f"kill {number}: {path}" for path in still_named(segments)]
        for process in alive:
            process.kill()
    return left


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():
        try:
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(psutil.Process(pid))
        except (OSError, psutil.NoSuchProcess):
            continue  # it has ended, or is not ours to look into
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=50, help="of each backend (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    clean = True
    print(f"{'backend':10}{'kills':>7}{'left':>6}{'seconds':>9}")
    for backend in arguments.backend or ["process", "pool", "loky", "standby"]:
        begun = time.monotonic()
        left = kill_callers(backend, arguments.times, arguments.seed)
        clean &= not left
        print(f"{backend:10}{arguments.times:7}{len(left):6}{time.monotonic() - begun:9.0f}", flush=True)
        for line in left[:10]:
            print(f"    {line}")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
