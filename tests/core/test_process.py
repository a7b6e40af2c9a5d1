"""``process``: its worker, or its Manager, is stopped while the other side writes much to it."""

import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Client

import psutil
import pytest

from fedexec._processes import popen
from fedexec.testing.leaks import new_children
from fedexec.testing.suite import AVAILABLE_START_METHODS
from fedexec.testing.tasks import DEADLINE, Gate
from fedexec_backends.process import _PatientConnection

needs_peers = pytest.mark.skipif(
    not hasattr(socket, "SO_PEERCRED"), reason="a socket does not tell which process is at its other end"
)


@pytest.mark.thorough
@pytest.mark.parametrize("start_method", AVAILABLE_START_METHODS)
def test_a_process_that_is_stopped_before_it_has_read_its_task_is_replaced(
    create_on, monkeypatch, start_method
):
    write = popen._write
    stopped: list[int] = []

    def stop_and_write(fd, data, pid):
        if len(data) > 1 << 20 and not stopped:
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        write(fd, data, pid)

    monkeypatch.setattr(popen, "_write", stop_and_write)
    executor = create_on("process", max_workers=1, start_method=start_method, retries=1)
    future = executor.submit(len, bytes(4 << 20))  # more than a pipe takes at once
    assert future.result(DEADLINE) == 4 << 20
    assert len(stopped) == 1


def wait_and_return_much(gate):
    return gate.enter(bytes(4 << 20))


@pytest.mark.thorough
@needs_peers
def test_a_manager_that_is_stopped_before_it_has_read_a_result_is_replaced(create_on, tmp_path):
    before = new_children()
    executor = create_on("process", max_workers=1, shared_memory=False, retries=1, learn=False)
    gate = Gate(tmp_path)
    future = executor.submit(wait_and_return_much, gate)
    gate.wait_for(1)
    (template,) = new_children(before) & set(psutil.Process().children())
    manager, _ = sorted(template.children(), key=lambda process: process.pid)
    manager.suspend()
    gate.open()
    assert len(future.result(DEADLINE)) == 4 << 20
    assert not manager.is_running()


ACCEPTS_AND_STOPS = """
import os, signal, sys
from multiprocessing.connection import Listener
listener = Listener(sys.argv[1])
print(flush=True)
connection = listener.accept()
os.kill(os.getpid(), signal.SIGSTOP)
"""


@needs_peers
def test_a_manager_that_is_stopped_while_much_is_written_to_it_is_killed(tmp_path):
    address = str(tmp_path / "socket")
    command = [sys.executable, "-c", ACCEPTS_AND_STOPS, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as manager:
        assert manager.stdout is not None
        manager.stdout.readline()
        with _PatientConnection.of(Client(address)) as connection, pytest.raises(OSError):
            connection.send(bytes(4 << 20))
        assert manager.wait(DEADLINE) == -signal.SIGKILL
