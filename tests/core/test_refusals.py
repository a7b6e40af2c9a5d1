"""What a kernel, a sandbox or a container refuses: it is tried once, done without, and said once."""

import json
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from fedexec.testing import refusals
from fedexec.testing.suite import AVAILABLE_START_METHODS

RUN = """
import json, logging, sys
import numpy as np
import fedexec

class Kept(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

said, results, errors = [], [], []
logging.getLogger("fedexec").addHandler(Kept())
for backend in sys.argv[1:]:
    try:
        with fedexec.create_executor(backend, max_workers=2) as executor:
            tiny = [future.result(60) for future in [executor.submit(abs, -n) for n in range(3)]]
            large = executor.submit(np.negative, np.ones(10_000_000 // 8)).result(60)
        results.append([backend, tiny, large.sum()])
    except fedexec.FedexecError as exc:
        errors.append(f"{type(exc).__name__}: {exc}")
print(json.dumps([results, said, errors]))
"""
REFUSED = "from fedexec.testing import refusals; refusals.refuse({!r}, {!r})\n"
BACKENDS = ("standby", "process", "pool", "loky")


def run(script, *arguments, before=()):
    command = [*before, sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout), done.stderr


def ran(*backends):
    return [[backend, [0, 1, 2], -1_250_000.0] for backend in backends]


needs_seccomp = pytest.mark.skipif(not refusals.AVAILABLE, reason="the filter is one of Linux on x86_64")


@pytest.mark.thorough_but("memfd_create")
@needs_seccomp
@pytest.mark.parametrize(
    ("call", "error", "warning"),
    [
        ("F_SETSIG", "EPERM", "refuses F_SETSIG"),
        ("F_SETOWN", "EPERM", "refuses F_SETSIG"),
        ("memfd_create", "ENOSYS", "arrays are copied"),
        ("pidfd_open", "ENOSYS", None),
    ],
)
def test_a_call_that_is_refused_is_done_without(call, error, warning):
    pytest.importorskip("loky")
    results, said, errors, stderr = run(REFUSED.format(call, error) + RUN, *BACKENDS)
    assert results == ran(*BACKENDS)
    assert errors == []
    assert [warning in line for line in said] == ([True] if warning else [])
    assert stderr.count("Traceback") == 0


KILLED = """
import os, signal, time, fedexec, psutil
executor = fedexec.create_executor("standby", max_workers=1, start_method={!r})
executor.submit(os.getpid).result()
future = executor.submit(time.sleep, 600)
while not future.running():
    time.sleep(0.01)
print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
input()
os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_seccomp
@pytest.mark.parametrize("start_method", AVAILABLE_START_METHODS)
def test_workers_end_with_a_killed_caller_although_the_kernel_sends_them_no_signal(start_method):
    script = REFUSED.format("F_SETSIG", "EPERM") + KILLED.format(start_method)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        started = list(map(psutil.Process, map(int, caller.stdout.readline().split())))
        caller.communicate("\n", timeout=60)
        assert caller.returncode == -signal.SIGKILL
    _, left = psutil.wait_procs(started, timeout=20)
    left = [each for each in left if each.status() != psutil.STATUS_ZOMBIE]
    for each in left:
        each.kill()
    assert left == []


# ---------------------------------------------------------------- file systems


def _in_namespace(mount):
    """Return how to run a command where something is mounted that others do not see."""
    return ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")


def _may_mount():
    if shutil.which("unshare") is None:
        return False
    trial = [*_in_namespace("mount -t tmpfs none /dev/shm"), "true"]
    return subprocess.run(trial, capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(not _may_mount(), reason="needs namespaces of its own: root, on Linux")


@needs_namespaces
@pytest.mark.parametrize(
    "mount", ["-o ro none /dev/shm", "-o size=4k none /dev/shm && cat /dev/zero >/dev/shm/full"]
)
def test_without_semaphores_pools_say_so_and_the_others_run(mount):
    pytest.importorskip("loky")
    mount = f"mount -t tmpfs {mount} 2>/dev/null; true"
    results, said, errors, _ = run(RUN, *BACKENDS, before=_in_namespace(mount))
    assert results == ran("standby", "process")
    assert said == []
    assert [error.partition(":")[0] for error in errors] == ["BackendUnavailableError"] * 2
    assert all("/dev/shm" in error and "use standby" in error for error in errors)


@needs_namespaces
def test_without_proc_tasks_run_and_arrays_are_copied():
    backends = ("standby", "process", "pool")  # loky itself asks /proc how much its worker holds
    without = _in_namespace("mount -t tmpfs none /proc")
    *_, of_psutil = run("import psutil; print([])", before=without)  # psutil 5.9 prints what it lacks
    results, said, errors, stderr = run(RUN, *backends, before=without)
    assert results == ran(*backends)
    assert errors == []
    assert ["arrays are copied" in line for line in said] == [True]
    assert "Traceback" not in stderr.replace(of_psutil, "")
