"""The tutorial's claim, on an EMULATED device of 24 GiB: the table that bench/footprint.py prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One table, of 500 tasks, many of which import torch anew: minutes, and more of them on a busy machine.
LIMIT = 1800
pytestmark = [pytest.mark.thorough, pytest.mark.torch, pytest.mark.timeout(LIMIT + 60)]

COMMAND = Path(__file__).parents[2] / "bench" / "footprint.py"
GIB, MIB = 1 << 30, 1 << 20
AT_ONCE = 4


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    file = tmp_path_factory.mktemp("footprint") / "table.json"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FEDEXEC_")}
    done = subprocess.run(
        [sys.executable, COMMAND, "--json", file], capture_output=True, text=True, timeout=LIMIT, env=environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "EMULATED GPU 0, 24.0 GiB" in done.stdout
    report = json.loads(file.read_text())
    assert report["device"].startswith("EMULATED")
    return {row["strategy"]: row for row in report["rows"]} | {"limit": report["limit_bytes"]}


def test_a_process_per_client_runs_out_of_memory(table):
    row = table["one process per client"]
    assert row["out_of_memory"] > 0
    assert 23 * GIB < row["residual_bytes"] <= 24 * GIB


@pytest.mark.parametrize("backend", ["process", "pool", "standby"])
def test_a_fresh_process_per_task_leaves_nothing_after_any_round(table, backend):
    row = table[backend]
    assert (row["out_of_memory"], row["residual_bytes"], row["end_bytes"]) == (0, 0, 0)
    footprint = row["footprint_bytes"]
    assert 450 * MIB < footprint < 600 * MIB
    assert row["peak_bytes"] <= AT_ONCE * footprint
    assert row["peak_bytes"] > (AT_ONCE - 1) * footprint, "so many did run at once"


def test_loky_stays_under_its_limit(table):
    row = table["loky"]
    assert (row["out_of_memory"], row["end_bytes"]) == (0, 0)
    assert 0 < row["residual_bytes"] <= row["peak_bytes"] <= AT_ONCE * table["limit"]
    assert row["footprint_bytes"] <= table["limit"]
