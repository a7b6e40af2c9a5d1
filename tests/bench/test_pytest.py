"""`python -m pytest bench`: what it saves, pytest-benchmark compares with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(tmp_path):
    def run(*argv):
        command = [sys.executable, "-m", "pytest", "bench", "--mode", "smoke", "-q", "-p", "no:cacheprovider"]
        only = ["-k", "round and numpy and inline", f"--benchmark-storage={tmp_path.as_uri()}"]
        # pytest-benchmark measures nothing in a worker of xdist, which these would make it take itself for.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.run(
            [*command, *only, *argv], capture_output=True, text=True, cwd=ROOT, env=environ, timeout=120
        )

    return run


@pytest.mark.thorough
def test_a_run_is_compared_with_one_that_was_saved(bench, tmp_path):
    saved = bench("--benchmark-autosave")
    assert saved.returncode == 0, saved.stdout + saved.stderr
    (file,) = tmp_path.rglob("*.json")
    content = json.loads(file.read_text())
    assert "node" not in content["machine_info"], "the host's name"
    same = bench("--benchmark-compare", "--benchmark-compare-fail=median:100000%")
    assert same.returncode == 0, same.stdout + same.stderr
    assert "0001_" in same.stdout

    for benchmark in content["benchmarks"]:
        benchmark["stats"]["median"] /= 1e6
    file.write_text(json.dumps(content))
    worse = bench("--benchmark-compare", "--benchmark-compare-fail=median:100000%")
    assert worse.returncode != 0
    assert "Performance has regressed" in worse.stdout + worse.stderr
