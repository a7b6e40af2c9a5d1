"""Check the benchmarks against the promised ratios: ``python bench/ratios.py [FILE]``.

FILE is written by `fedexec bench --full` or pytest-benchmark; without it, the necessary benchmarks are run
first. A ratio compares the medians of one run. Its noise is the sum of both sides' relative noise, which is
half the interquartile range divided by the median.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedexec._bench.plan import missing


@dataclass(frozen=True)
class Promise:
    """A promise: ``numerator / denominator`` is at least `least`, or at most `most`.

    Attributes
    ----------
    says : str
        Description.
    numerator, denominator : str
        Names of benchmarks, whose medians are divided.
    least, most : float or None
        The limit; one of the two is None.
    """

    says: str
    numerator: str
    denominator: str
    least: float | None = None
    most: float | None = None


PROMISES = (
    Promise(
        "no-op: the tutorial / standby",
        "test_start_up[tutorial/cnn/warm]",
        "test_start_up[standby/cnn/warm]",
        least=500,
    ),
    Promise(
        "no-op, with pauses: PPE forkserver / standby",
        "test_start_up[ppe-forkserver/cnn/warm]",
        "test_start_up[standby/cnn/warm]",
        least=6,
    ),
    Promise(
        "back to back: PPE forkserver / standby",
        "test_overhead[ppe-forkserver]",
        "test_overhead[standby]",
        least=6,
    ),
    Promise(
        "no-op: standby / warm loky",
        "test_start_up[standby/cnn/warm]",
        "test_start_up[plain-loky/cnn/warm]",
        most=5,
    ),
    Promise("back to back: bare fork / standby", "test_overhead[fork]", "test_overhead[standby]", least=1.5),
    Promise(
        "100 MB: Ray warm / standby",
        "test_transport[ray-warm/there-and-back]",
        "test_transport[standby/there-and-back]",
        least=3,
    ),
    Promise(
        "100 MB: PPE forkserver / standby",
        "test_transport[ppe-forkserver/there-and-back]",
        "test_transport[standby/there-and-back]",
        least=10,
    ),
    Promise(
        "100 MB: standby / bare copy",
        "test_transport[standby/there-and-back]",
        "test_transport[copy/there-and-back]",
        most=2.5,
    ),
    Promise(
        "100 MB to 8 clients / to 1",
        "test_transport[standby/8-readers]",
        "test_transport[standby/1-readers]",
        most=4,
    ),
    Promise(
        "ten fits: the tutorial / standby",
        "test_round[tutorial/cnn-short]",
        "test_round[standby/cnn-short]",
        least=15,
    ),
    Promise(
        "half-second fits: standby / warm loky",
        "test_round[standby/cnn]",
        "test_round[plain-loky/cnn]",
        most=1.1,
    ),
)


def main() -> None:
    """Print one line per promise."""
    if len(sys.argv) > 1:
        content = json.loads(Path(sys.argv[1]).read_text())
    else:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "run.json"
            _measure(file)
            content = json.loads(file.read_text())
    stats = {benchmark["name"]: benchmark["stats"] for benchmark in content["benchmarks"]}
    print(f"{'promise':<44} {'ratio':>8} {'noise':>7}  {'limit':>8}  kept")
    for promise in PROMISES:
        print(_line(promise, stats))


def _measure(file: Path) -> None:
    here = Path(__file__).parent
    names = dict.fromkeys(name for promise in PROMISES for name in (promise.numerator, promise.denominator))
    absent = [f"[{name}/" for name in missing("full")] + [f"[{name}]" for name in missing("full")]
    available = [name for name in names if not any(part in name for part in absent)]
    tests = [f"{here / 'test_bench.py'}::{name}" for name in available]
    subprocess.run([sys.executable, "-m", "pytest", *tests, "-q", f"--benchmark-json={file}"], check=True)


def _line(promise: Promise, stats: dict[str, Any]) -> str:
    limit = f">= {promise.least:g}" if promise.least is not None else f"<= {promise.most:g}"
    try:
        upper, lower = stats[promise.numerator], stats[promise.denominator]
    except KeyError as exc:
        return f"{promise.says:<44} {'not measured':>16}  {limit:>8}  ({exc.args[0]} did not run)"
    ratio = upper["median"] / lower["median"]
    noise = sum(side["iqr"] / 2 / side["median"] for side in (upper, lower))
    kept = ratio >= promise.least if promise.least is not None else ratio <= promise.most
    return f"{promise.says:<44} {ratio:>8.2f} {noise:>6.0%}  {limit:>8}  {'yes' if kept else 'NO'}"


if __name__ == "__main__":
    main()
