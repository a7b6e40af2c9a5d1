"""What is said of a worker that died: a guess at the reason only where nobody has ended it on purpose."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from fedexec import WorkerDiedError, create_executor
from fedexec.testing.tasks import poll

BACKENDS = ("standby", "process", "pool", "loky")
GUESS = "the machine ran out of memory"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["kill_workers", "end"])
def test_who_was_ended_on_purpose_did_not_run_out_of_memory(backend, how):
    if backend == "loky":
        pytest.importorskip("loky", reason="needs loky: pip install 'fedexec[loky]'")
    with create_executor(backend, max_workers=1) as executor:
        future = executor.submit(time.sleep, 60)
        poll(lambda: [task.pid for task in executor.running() if task.pid], "it runs")
        executor.kill_workers() if how == "kill_workers" else executor.end(future)
        error = future.exception(30)
    assert isinstance(error, WorkerDiedError)
    assert error.is_deliberate
    for told in (str(error), str(pickle.loads(pickle.dumps(error)))):
        assert told.endswith("Its executor was told to end it.") and GUESS not in told


def ignore_sigterm(begun):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begun.touch()
    time.sleep(60)


def test_workers_are_ended_at_once_if_no_thread_can_wait_for_them(monkeypatch, tmp_path):
    def start(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")  # as in CPython 3.12

    with create_executor("standby", max_workers=1) as executor:
        future = executor.submit(ignore_sigterm, tmp_path / "begun")
        poll((tmp_path / "begun").exists, "it runs")
        monkeypatch.setattr(threading.Timer, "start", start)
        executor.terminate_workers()
        assert isinstance(future.exception(0), WorkerDiedError)


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def test_who_was_killed_by_somebody_else_may_have():
    with create_executor("standby", max_workers=1) as executor:
        error = executor.submit(kill_myself).exception(30)
    assert isinstance(error, WorkerDiedError)
    assert not error.is_deliberate
    assert GUESS in str(error)


SCRIPT = """
import time
from fedexec import create_executor
with create_executor({backend!r}, max_workers=2) as executor:
    futures = [executor.submit(time.sleep, 600) for _ in range(4)]
    while len([task for task in executor.running() if task.pid]) < 2:
        time.sleep(0.01)
    print("running", flush=True)
    futures[0].result()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_ctrl_c_ends_the_executor_of_a_script(backend):
    if backend == "loky":
        pytest.importorskip("loky", reason="needs loky: pip install 'fedexec[loky]'")
    command = [sys.executable, "-c", SCRIPT.format(backend=backend)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "running\n"
        family = psutil.Process(script.pid).children(recursive=True)
        os.killpg(script.pid, signal.SIGINT)
        _, errors = script.communicate(timeout=20)
    assert script.returncode == -signal.SIGINT
    assert errors.count("Traceback (most recent call last)") == 1  # its own, as of any script
    assert GUESS not in errors
    assert psutil.wait_procs(family, timeout=5)[1] == []
