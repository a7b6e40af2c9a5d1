"""Pickles come from our own processes alone: nothing listens on a network, another user is not heard."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

import fedexec
from fedexec.testing.suite import AVAILABLE_START_METHODS
from fedexec.testing.tasks import DEADLINE, poll
from fedexec_backends.process import ProcessBackend

needs_peers = pytest.mark.skipif(
    not hasattr(socket, "SO_PEERCRED"), reason="a socket does not tell who is at its other end"
)

INTRUDER = """
import os, sys
from multiprocessing.connection import Client
from multiprocessing.managers import dispatch
os.setuid(int(sys.argv[3]))
connection = Client(sys.argv[1].replace("@", chr(0), 1), authkey=bytes.fromhex(sys.argv[2]))
print(dispatch(connection, None, "number_of_objects"))
"""

IMPOSTOR = """
import os, socket, sys
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1].replace("@", chr(0), 1))
    listener.listen()
    print("listening", flush=True)
    while True:
        connection, _ = listener.accept()
        heard = connection.recv(1000)
        print(f"heard {len(heard)} bytes", flush=True)
"""


def manager_of(executor):
    backend = executor._scheduler._backend
    assert isinstance(backend, ProcessBackend)
    return backend._manager


@needs_peers
def test_the_managers_socket_hears_no_other_user():
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    with fedexec.create_executor("process", max_workers=1) as executor:
        executor.submit(abs, -1).result()
        address = manager_of(executor).address.decode()
        key = bytes(multiprocessing.current_process().authkey).hex()

        def call(user):
            command = [sys.executable, "-c", INTRUDER, address.replace("\0", "@", 1), key, str(user)]
            return subprocess.run(command, capture_output=True, text=True, timeout=30)

        own, other = call(os.geteuid()), call(65534)
        assert (own.returncode, own.stdout.strip()) == (0, "0")
        assert other.returncode != 0 and other.stdout == ""
        assert executor.submit(abs, -2).result() == 2


@needs_peers
@pytest.mark.parametrize("start_method", AVAILABLE_START_METHODS)
def test_who_takes_a_dead_managers_address_is_told_nothing(start_method, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    started, go_on = tmp_path / "started", tmp_path / "go on"

    def wait_for_leave():
        started.touch()
        deadline = time.monotonic() + 60  # so that a failure of this test does not wait for the task
        while not go_on.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return "an answer"

    with fedexec.create_executor("process", max_workers=1, start_method=start_method) as executor:
        future = executor.submit(wait_for_leave)
        poll(started.exists, "the task runs")
        manager = manager_of(executor)
        address = manager.address.decode().replace("\0", "@", 1)
        manager._process.kill()
        manager._process.join()
        command = [sys.executable, "-c", IMPOSTOR, address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as impostor:
            assert impostor.stdout is not None
            try:
                assert impostor.stdout.readline() == "listening\n"
                go_on.touch()
                with pytest.raises(fedexec.WorkerDiedError):
                    future.result(DEADLINE)
                heard = [impostor.stdout.readline() for _ in ("worker", "caller")]
            finally:
                impostor.kill()
        assert heard == ["heard 0 bytes\n"] * 2
        assert executor.submit(abs, -2).result(DEADLINE) == 2


@pytest.mark.parametrize("backend", ["process", "pool", "loky", "standby"])
def test_nothing_listens_on_a_network(backend):
    pytest.importorskip("loky" if backend == "loky" else "fedexec")
    with fedexec.create_executor(backend, max_workers=2) as executor:
        executor.submit(abs, -1).result()
        family = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
        sockets = [each for each in psutil.net_connections("inet") if each.pid in family]
        assert [each for each in sockets if each.status == psutil.CONN_LISTEN] == []
