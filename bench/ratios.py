"""Run the benchmarks and read them as promises: ``python bench/ratios.py [FILE]``.

Without a file (pytest-benchmark's JSON) the benchmarks are run first. Ratios are of medians from one run; the
noise is half the distance between the quartiles, as a share of the median, of both sides added.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Promise:
    """``slower / faster`` is to be at least `least`, or at most `most`."""

    says: str
    numerator: str
    denominator: str
    least: float | None = None
    most: float | None = None


PROMISES = (
    Promise("no-op: the tutorial / standby", "test_latency[tutorial]", "test_latency[standby]", least=500),
    Promise(
        "no-op: PPE forkserver / standby", "test_latency[ppe-forkserver]", "test_latency[standby]", least=6
    ),
    Promise("no-op: standby / warm loky", "test_latency[standby]", "test_latency[plain-loky]", most=5),
    Promise(
        "back to back: bare fork / standby", "test_throughput[fork]", "test_throughput[standby]", least=1.5
    ),
    Promise(
        "100 MB: Ray warm / standby", "test_there_and_back[ray-warm]", "test_there_and_back[standby]", least=3
    ),
    Promise(
        "100 MB: PPE forkserver / standby",
        "test_there_and_back[ppe-forkserver]",
        "test_there_and_back[standby]",
        least=10,
    ),
    Promise("100 MB: standby / bare copy", "test_there_and_back[standby]", "test_bare_copy", most=2.5),
    Promise(
        "100 MB to 8 clients / to 1",
        "test_clients_that_read[standby-8]",
        "test_clients_that_read[standby-1]",
        most=4,
    ),
    Promise(
        "ten fits: the tutorial / standby", "test_short_fits[tutorial]", "test_short_fits[standby]", least=15
    ),
    Promise(
        "half-second fits: standby / warm loky",
        "test_half_second_fits[standby]",
        "test_half_second_fits[plain-loky]",
        most=1.1,
    ),
)


def main() -> None:
    """Print one line a promise."""
    if len(sys.argv) > 1:
        content = json.loads(Path(sys.argv[1]).read_text())
    else:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "run.json"
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    str(Path(__file__).parent),
                    "-q",
                    f"--benchmark-json={file}",
                ],
                check=True,
            )
            content = json.loads(file.read_text())
    stats = {benchmark["name"]: benchmark["stats"] for benchmark in content["benchmarks"]}
    print(f"{'promise':<40} {'ratio':>8} {'noise':>7}  {'asked':>8}  kept")
    for promise in PROMISES:
        print(_line(promise, stats))


def _line(promise: Promise, stats: dict[str, Any]) -> str:
    asked = f">= {promise.least:g}" if promise.least is not None else f"<= {promise.most:g}"
    try:
        upper, lower = stats[promise.numerator], stats[promise.denominator]
    except KeyError as exc:
        return f"{promise.says:<40} {'not measured':>16}  {asked:>8}  ({exc.args[0]} did not run)"
    ratio = upper["median"] / lower["median"]
    noise = sum(side["iqr"] / 2 / side["median"] for side in (upper, lower))
    kept = ratio >= promise.least if promise.least is not None else ratio <= promise.most
    return f"{promise.says:<40} {ratio:>8.2f} {noise:>6.0%}  {asked:>8}  {'yes' if kept else 'NO'}"


if __name__ == "__main__":
    main()
