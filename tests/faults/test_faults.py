"""Every kind of fault once, among innocent tasks, on every isolating backend; `soak.py` does it at length."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS, KILL, STOP, plan_of, run_plan
from kills import kill_callers

from fedexec.testing import refusals

pytestmark = pytest.mark.thorough_but("standby")


@pytest.mark.parametrize("backend", ["process", "pool", "loky", "standby"])
def test_nothing_is_lost_wrong_or_left(backend, capfd):
    pytest.importorskip("loky" if backend == "loky" else "fedexec")
    plan = [*FAULTS, *[None] * 60]
    random.Random(backend).shuffle(plan)
    report = run_plan(backend, plan, seed=0)
    assert (report.lost, report.wrong, report.left) == (0, [], [])
    assert report.faults == dict.fromkeys(FAULTS, 1)


@pytest.mark.parametrize("backend", ["process", "pool", "loky", "standby"])
def test_no_task_is_lost_when_any_process_is_killed(backend):
    pytest.importorskip("loky" if backend == "loky" else "fedexec")
    report = run_plan(backend, plan_of(60, 0.1, len(backend), [KILL]), seed=len(backend), retries=60)
    assert (report.lost, report.wrong, report.left) == (0, [], [])


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["process", "pool", "loky", "standby"])
def test_no_task_is_lost_when_any_process_is_stopped(backend):
    pytest.importorskip("loky" if backend == "loky" else "fedexec")
    report = run_plan(backend, plan_of(40, 0.1, len(backend), [STOP]), seed=len(backend), retries=40)
    assert (report.lost, report.wrong, report.left) == (0, [], [])


@pytest.mark.timeout(900)  # a future that is lost costs 300 s: which one it was is to be heard
@pytest.mark.thorough
@pytest.mark.skipif(not refusals.AVAILABLE, reason="the filter is one of Linux on x86_64")
def test_so_it_is_where_the_kernel_refuses_and_thousands_of_files_are_open():
    soak = Path(__file__).with_name("soak.py")
    refused = [argument for name in refusals.REFUSALS for argument in ("--refuse", name)]
    numbers = ["--tasks", "320", "--descriptors", "5000", "--limit", "780"]
    command = [sys.executable, str(soak), *numbers, *refused]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=840)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("backend", ["process", "pool", "loky", "standby"])
def test_a_killed_caller_leaves_nothing(backend):
    pytest.importorskip("loky" if backend == "loky" else "fedexec")
    assert kill_callers(backend, times=2, seed=len(backend)) == []
