"""What tasks that do nothing cost, against another revision: ``python bench/against.py REV``.

A burst of each in turns, so that a shared machine is as slow for one as for the other; each of them started
anew several times, because a process is as fast as its memory happens to lie.
"""

import argparse
import contextlib
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BACKENDS = ("standby", "process", "pool", "loky")
BURST, WORKERS = 20, 2
DRAWS = 1000


def main() -> None:
    """Print the ratio of this tree's seconds to the revision's for each backend."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision", help="a commit")
    parser.add_argument("--backend", nargs="+", default=BACKENDS, metavar="NAME")
    parser.add_argument(
        "--preload", default="fedexec._workload.training", metavar="MODULE", help="of workers"
    )
    parser.add_argument("--starts", type=int, default=10, metavar="N", help="new processes of each")
    parser.add_argument("--turns", type=int, default=40, metavar="N", help="bursts of each process")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedexec-") as scratch:
        archive = subprocess.run(
            ["git", "archive", arguments.revision, "fedexec", "backends"],
            cwd=ROOT, check=True, capture_output=True,
        ).stdout  # fmt: skip
        subprocess.run(["tar", "-x", "-C", scratch], input=archive, check=True)
        print(
            f"{BURST} tasks that do nothing, {WORKERS} workers, {arguments.starts} x {arguments.turns} turns"
        )
        for backend in arguments.backend:
            starts, how = [], (backend, arguments.preload)
            for _ in range(arguments.starts):
                with tree(ROOT, *how) as here, tree(Path(scratch), *how) as there:
                    starts.append(in_turns(here, there, arguments.turns))
            report(backend, starts)


def in_turns(here, there, turns: int) -> list[tuple[float, float]]:
    """Return the seconds of each pair of bursts; who is first changes."""
    pairs = []
    for turn in range(turns):
        first, second = (here, there) if turn % 2 else (there, here)
        seconds = {id(one): one() for one in (first, second)}
        pairs.append((seconds[id(here)], seconds[id(there)]))
    return pairs


def report(backend: str, starts: list[list[tuple[float, float]]]) -> None:
    """Print the median of the starts' median ratios, and where it lies in 95 of 100 draws of starts."""
    ratios = [statistics.median(one / other for one, other in pairs) for pairs in starts]
    rng = random.Random(0)
    drawn = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    low, high = drawn[DRAWS // 40], drawn[-DRAWS // 40]
    sides = zip(*itertools.chain.from_iterable(starts), strict=True)
    mine, yours = (statistics.median(side) / BURST * 1000 for side in sides)
    print(
        f"{backend:8} {statistics.median(ratios):.3f} (95 %: {low:.3f} to {high:.3f}); "
        f"a task {mine:.2f} ms, there {yours:.2f} ms",
        flush=True,
    )


@contextlib.contextmanager
def tree(root: Path, *how: str):
    """Start a process that imports fedexec from a tree; yield what has it run a burst."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--run", *how],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "backends")])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip

    def burst() -> float:
        process.stdin.write("go\n")
        return float(process.stdout.readline())

    try:
        source = process.stdout.readline().strip()
        assert Path(source).is_relative_to(root), f"{source} is not in {root}"
        yield burst
    finally:
        process.stdin.close()
        process.wait()


def run_here(backend: str, module: str) -> None:
    """Be that process."""
    import fedexec

    print(fedexec.__file__, flush=True)
    with fedexec.create_executor(backend, max_workers=WORKERS, preload=[module]) as executor:
        for _ in sys.stdin:
            began = time.perf_counter()
            for future in [executor.submit(os.getpid) for _ in range(BURST)]:
                future.result()
            print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_here(*sys.argv[2:])
    else:
        main()
