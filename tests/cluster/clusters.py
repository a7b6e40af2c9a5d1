"""Clusters on this machine, as several machines would be: no process of them is a child of the tests.

A *keeper* process starts the processes of a cluster and ends them: when the tests ask it to, or have ended.
Run as a script, this module is a keeper.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

DEADLINE = 60.0
# This process ends, so the one that it starts is no child of the tests.
START = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"


class Cluster:
    """The tests' end of a keeper.

    Parameters
    ----------
    engine : str
        "ray" or "dask".
    nodes : int
        How many nodes there are at first.

    Attributes
    ----------
    address : str
        Address of the cluster, for the engine.
    pid : int
        Process of the keeper.
    """

    def __init__(self, engine: str, nodes: int = 2) -> None:
        self.engine = engine
        self.directory = Path(tempfile.mkdtemp(prefix=f"c-{engine}-"))
        with Listener(str(self.directory / "s")) as listener:
            command = [sys.executable, __file__, engine, str(self.directory)]
            with (self.directory / "keeper.log").open("wb") as log:
                subprocess.run([sys.executable, "-c", START, *command], check=True, stdout=log, stderr=log)
            self._connection: Connection = listener.accept()
        self.pid: int = self._connection.recv()
        self.address: str = self._connection.recv()
        for _ in range(nodes):
            self.add_node()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of an executor on this cluster."""
        return {f"{self.engine}_address": self.address}

    def add_node(self) -> Any:
        """Start a node, and return its name when it is ready."""
        return self._ask("add_node")

    def client_address(self) -> str:
        """Return the address of Ray's client."""
        address: str = self._ask("client_address")
        return address

    def kill_node(self, name: Any) -> None:
        """End all processes of a node at once."""
        self._ask("signal_node", name, int(signal.SIGKILL))

    def stop_node(self, name: Any) -> None:
        """Stop all processes of a node, so that it answers nobody."""
        self._ask("signal_node", name, int(signal.SIGSTOP))

    def resume_node(self, name: Any) -> None:
        """Let a stopped node go on."""
        self._ask("signal_node", name, int(signal.SIGCONT))

    def close(self) -> None:
        """End the cluster."""
        self._ask("close")
        self._connection.close()
        shutil.rmtree(self.directory)

    def _ask(self, method: str, *args: object) -> Any:
        self._connection.send((method, args))
        assert self._connection.poll(2 * DEADLINE), f"no answer to {method}"
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


class DaskKeeper:
    """A Dask scheduler, and workers of which each is a host of its own: 127.0.0.2, 127.0.0.3 and so on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        port = free_port()
        self.address = f"tcp://127.0.0.1:{port}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        options = ["--host", "127.0.0.1", "--port", str(port), "--dashboard-address", "127.0.0.1:0"]
        self._scheduler = self._start("scheduler", *options)
        wait_for_port(port)

    def add_node(self) -> int:
        from distributed import Client as DaskClient

        number = len(self._nodes)
        host = f"127.0.0.{number + 2}"
        options = ["--host", host, "--nthreads", "2", "--no-nanny", "--dashboard-address", f"{host}:0"]
        self._nodes.append(self._start("worker", self.address, *options))
        with DaskClient(self.address, set_as_default=False) as client:
            end = time.monotonic() + DEADLINE
            while not any(
                f"//{host}:" in address for address in client.scheduler_info(n_workers=-1)["workers"]
            ):
                assert time.monotonic() < end, f"worker {host} does not come"
                time.sleep(0.05)
        return number

    def signal_node(self, number: int, signum: int) -> None:
        send_to_family(self._nodes[number].pid, signum)

    def close(self) -> None:
        for process in [*self._nodes, self._scheduler]:
            send_to_family(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self, kind: str, *args: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{kind}", *args],
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
        )


class RayKeeper:
    """A Ray cluster whose nodes are raylets of this machine."""

    def __init__(self, directory: Path) -> None:
        from ray.cluster_utils import Cluster as LocalCluster

        self._client_port = free_port()
        options = {"num_cpus": 0, "include_dashboard": False}  # so that the head runs no task
        if importlib.util.find_spec("grpc"):  # what Ray's client needs
            options["ray_client_server_port"] = self._client_port
        self._cluster = LocalCluster(initialize_head=True, head_node_args=options)
        self.address: str = self._cluster.address
        self._nodes: list[Any] = []

    def client_address(self) -> str:
        return f"ray://127.0.0.1:{self._client_port}"

    def add_node(self) -> int:
        self._nodes.append(self._cluster.add_node(num_cpus=2))
        return len(self._nodes) - 1

    def signal_node(self, number: int, signum: int) -> None:
        for infos in self._nodes[number].all_processes.values():
            for info in infos:
                send_to_family(info.process.pid, signum)

    def close(self) -> None:
        self._cluster.shutdown()


def send_to_family(pid: int, signum: int) -> None:
    """Send a signal to a process and all its descendants."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signum)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    end = time.monotonic() + DEADLINE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            assert time.monotonic() < end, f"nothing listens at port {port}"
            time.sleep(0.05)


def keep(engine: str, directory: Path) -> None:
    """Start a cluster, do what the tests ask for, and end it when they hang up."""
    connection = Client(str(directory / "s"))
    keeper = RayKeeper(directory) if engine == "ray" else DaskKeeper(directory)
    try:
        connection.send(os.getpid())
        connection.send(keeper.address)
        while True:
            method, args = connection.recv()
            if method == "close":
                break
            try:
                connection.send(getattr(keeper, method)(*args))
            except Exception as exc:
                connection.send(RuntimeError(repr(exc)))
    except (EOFError, OSError):
        connection.close()
    finally:
        keeper.close()
        if not connection.closed:
            connection.send(None)


if __name__ == "__main__":
    os.environ.pop("FEDEXEC_BACKEND", None)
    keep(sys.argv[1], Path(sys.argv[2]))
