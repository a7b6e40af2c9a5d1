"""One task in twenty meets a fault, then an executor's process is killed, then stopped: ``make soak``.

Prints what became of the tasks and what is left; ends with 1 if anything is lost, wrong or left.
"""

import argparse
import faulthandler
import os
import resource
import sys
import tempfile
from collections import Counter

from faults import KILL, STOP, Report, plan_of, run_plan

import fedexec
from fedexec.interface import Capability
from fedexec.testing import refusals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=5000, help="of each backend (default 5000)")
    parser.add_argument("--share", type=float, default=0.05, help="that meets a fault (default 0.05)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", action="append", help="only this one; may be repeated")
    parser.add_argument("--descriptors", type=int, default=0, help="to have open meanwhile")
    parser.add_argument("--limit", type=float, help="seconds; then it prints where it is, and ends with 1")
    refusals.add_option(parser.add_argument)
    arguments = parser.parse_args()
    for name in arguments.refuse:
        refusals.refuse(name)
    if arguments.limit:
        faulthandler.dump_traceback_later(arguments.limit, exit=True, file=sys.stdout)
    _open(arguments.descriptors)
    isolating = [
        info.name for info in fedexec.backends()
        if info.available and info.capabilities
        and Capability.ISOLATED in info.capabilities and Capability.REMOTE not in info.capabilities
    ]  # fmt: skip
    faults = plan_of(arguments.tasks, arguments.share, arguments.seed)
    kills = plan_of(arguments.tasks // 5, arguments.share, arguments.seed, [KILL])
    stops = plan_of(arguments.tasks // 10, arguments.share, arguments.seed, [STOP])
    clean = True
    print(
        f"{'backend':10}{'tasks':>7}{'faults':>8}{'lost':>6}{'wrong':>7}{'left':>6}{'learnt':>8}{'seconds':>9}"
    )
    for backend in arguments.backend or isolating:
        for plan, retries in ((faults, 0), (kills, len(kills)), (stops, len(stops))):
            report = _quietly(backend, plan, arguments.seed, retries)
            clean = clean and report.is_clean
            print(
                f"{backend:10}{report.tasks:7}{report.faults.total():8}{report.lost:6}{len(report.wrong):7}"
                f"{len(report.left):6}{report.learnt:8}{report.seconds:9.0f}", flush=True,
            )  # fmt: skip
            for line in (*report.wrong[:10], *report.left[:10]):
                print(f"    {line}")
    kinds = Counter(name for name in (*faults, *kills, *stops) if name is not None)
    print("faults of each backend: " + ", ".join(f"{count} {name}" for name, count in sorted(kinds.items())))
    return 0 if clean else 1


def _open(number: int) -> None:
    """Open so many descriptors, and leave them open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number + 1024), hard))
    for _ in range(number):
        os.open(os.devnull, os.O_RDONLY)


def _quietly(backend: str, plan: list[str | None], seed: int, retries: int) -> Report:
    """Run it with stderr set aside: one of the faults is a flood of it."""
    with tempfile.TemporaryFile() as stderr:
        before = os.dup(2)
        os.dup2(stderr.fileno(), 2)
        try:
            return run_plan(backend, plan, seed, retries)
        finally:
            os.dup2(before, 2)
            os.close(before)


if __name__ == "__main__":
    sys.exit(main())
