"""Thirty rounds in which each client fails with probability 0.2; the same, killed and resumed: ``make soak``.

Ends with 1 if the accuracy is more than three points below that of a run in which none fails, or if the run
that was killed ends with other weights than the one that was not.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from faulty_run import PROBABILITY

from fedexec.testing.tasks import poll

CLEAN, FAULTY = ["-m", "fedexec"], [str(Path(__file__).with_name("faulty_run.py"))]
CLIENTS, ROUNDS, POINTS = 10, 30, 0.03
QUIET = os.environ | {"FEDEXEC_LOG_LEVEL": "ERROR"}  # each client that fails is a warning


def run(program: list[str], directory: Path, *options: str) -> dict[str, Any]:
    """Run to the end, and return what it has to say."""
    file = directory / "run.json"
    subprocess.run(_command(program, *options, "--json", str(file)), env=QUIET, check=True)
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def run_killed_and_resumed(
    program: list[str], directory: Path, kill_after: int, *options: str
) -> dict[str, Any]:
    """Kill the run when so many rounds are done, and go on from its state."""
    state = directory / "state"
    with subprocess.Popen(_command(program, *options, "--checkpoint", str(state)), env=QUIET) as killed:
        poll(lambda: list(state.glob(f"round-{kill_after:06}.npz")), f"{kill_after} rounds are done", 300)
        killed.kill()
    return run(program, directory, *options, "--checkpoint", str(state), "--resume")


def _command(program: list[str], *options: str) -> list[str]:
    return [sys.executable, *program, "run", "--threads-per-worker", "1", "--quiet", *options]


def accuracy(result: dict[str, Any]) -> float:
    return float(result["rounds"][-1]["metrics"]["accuracy"])


def failures(result: dict[str, Any]) -> Counter[str]:
    reasons = [failure["reason"] for round_ in result["rounds"] for failure in round_["failures"]]
    return Counter(reason.partition(":")[0] for reason in reasons)


def main() -> int:
    options = ("--clients", str(CLIENTS), "--rounds", str(ROUNDS), "--epochs", "1")
    kill_after = random.randrange(3, ROUNDS - 3)
    with tempfile.TemporaryDirectory() as name:
        clean, faulty = run(CLEAN, Path(name), *options), run(FAULTY, Path(name), *options)
        resumed = run_killed_and_resumed(FAULTY, Path(name), kill_after, *options)
    same = resumed["weights_sha256"] == faulty["weights_sha256"]
    print(f"{ROUNDS} rounds of {CLIENTS} clients: accuracy {accuracy(clean):.3f}, "
          f"{failures(clean).total()} failures")  # fmt: skip
    print(f"each fails with probability {PROBABILITY}: accuracy {accuracy(faulty):.3f}, "
          f"{failures(faulty).total()} failures: {dict(failures(faulty))}")  # fmt: skip
    print(f"killed after round {kill_after} or the next, resumed from {resumed['resumed_from']}: "
          f"{'the same' if same else 'OTHER'} weights")  # fmt: skip
    close = accuracy(clean) - accuracy(faulty) <= POINTS
    return 0 if close and same and not failures(clean) and failures(faulty) else 1


if __name__ == "__main__":
    sys.exit(main())
