"""The clients of one machine in one small process: one thread per client runs Flower's ``start_client``."""

import logging
import random
import socket
import threading
import time
from collections.abc import Sequence

import grpc
from flwr.client import NumPyClient, start_client

from fedexec.errors import FedexecError
from fedexec.flower.grpc.address import split_address
from fedexec.flower.grpc.client import ExecutorClient
from fedexec.flower.grpc.client_auth import ROOM, RefusedError

__all__ = ["ClientHost", "ServerUnreachableError", "wait_until_reachable"]

log = logging.getLogger("fedexec.flower")

FIRST_PAUSE = 0.2  # seconds until a client asks again after the server had no room
_NO_ROOM = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)


class ServerUnreachableError(FedexecError, ConnectionError):
    """No server answers at the address.

    Parameters
    ----------
    address : str
    seconds : float
        For how long the connection was tried.
    """

    def __init__(self, address: str, seconds: float) -> None:
        super().__init__(address, seconds)
        self.address, self.seconds = address, seconds

    def __str__(self) -> str:
        return (
            f"No server answers at {self.address} (tried for {self.seconds:g} s). "
            "Start it with `fedexec server`, or name its --address."
        )


def wait_until_reachable(address: str, timeout: float) -> None:
    """Return when a server listens at ``host:port``.

    Parameters
    ----------
    address : str
    timeout : float
        Seconds.

    Raises
    ------
    ServerUnreachableError
        No server has listened within `timeout`.
    """
    endpoint = split_address(address)
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(endpoint, timeout=1).close()
            return
        except OSError:
            if time.monotonic() >= deadline:
                raise ServerUnreachableError(address, timeout) from None
        time.sleep(0.1)  # A closed port refuses a connection at once.


class ClientHost:
    """Runs clients until the server disconnects them.

    Parameters
    ----------
    clients : sequence of NumPyClient
    server_address : str
        ``host:port``.
    root_certificates : bytes, optional
        PEM; if given, the connection uses TLS.
    connect_timeout : float
        Seconds to wait until the server answers and has room.
    """

    def __init__(
        self,
        clients: Sequence[NumPyClient],
        *,
        server_address: str,
        root_certificates: bytes | None = None,
        connect_timeout: float = 30.0,
    ) -> None:
        self._address = server_address
        self._root_certificates = root_certificates
        self._connect_timeout = connect_timeout
        self._failure: BaseException | None = None
        self._refusal = threading.Lock()  # acquired, and kept, by the first client that is refused
        # Daemon threads: a client waits in gRPC until the server answers, and must not keep the process
        # alive.
        self._threads = [
            threading.Thread(target=self._run, args=(client,), name=f"fedexec-client-{index}", daemon=True)
            for index, client in enumerate(clients)
        ]

    def start(self) -> None:
        """Connect every client.

        Raises
        ------
        ServerUnreachableError
            The server does not answer.
        """
        wait_until_reachable(self._address, self._connect_timeout)
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until the server has disconnected every client.

        Raises
        ------
        RefusedError, ConnectionError
            As for :meth:`check`.
        """
        for thread in self._threads:
            if thread.ident is not None:  # A thread that could not be started cannot be joined.
                thread.join()
        self.check()

    def kill(self) -> None:
        """Do nothing: the clients are threads of this process, and end with it."""

    def check(self) -> None:
        """Raise the error that has ended a client, if there is one.

        Raises
        ------
        RefusedError
            The server has refused a client.
        ConnectionError
            A client has lost its connection.
        """
        if isinstance(self._failure, RefusedError):
            raise self._failure
        if self._failure is not None:
            raise ConnectionError(f"a client lost the server at {self._address}: {_why(self._failure)}")

    def _run(self, client: NumPyClient) -> None:
        deadline, pause = time.monotonic() + self._connect_timeout, FIRST_PAUSE
        try:
            while not self._take_part(client):
                if time.monotonic() >= deadline:
                    raise RefusedError(ROOM, getattr(client, "index", None))
                # The random factor spreads the attempts of many clients.
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, 2.0)
        except BaseException as exc:
            self._failure = exc
            log.debug("a client ended", exc_info=exc)
            if isinstance(exc, RefusedError):
                self._tell(exc)

    def _tell(self, refusal: RefusedError) -> None:
        """Log the first refusal at once if :meth:`join` still waits for other clients."""
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        if any(thread.is_alive() for thread in others) and self._refusal.acquire(blocking=False):
            log.warning("%s", str(refusal))

    def _take_part(self, client: NumPyClient) -> bool:
        """Run a client until the server disconnects it; return False if the server had no room."""
        if isinstance(client, ExecutorClient):
            client.refusal = None
        try:
            start_client(
                server_address=self._address,
                client=client.to_client(),
                root_certificates=self._root_certificates,
            )
        except grpc.RpcError as exc:
            has_worked = isinstance(client, ExecutorClient) and client.has_worked
            if has_worked or exc.code() not in _NO_ROOM:
                raise
            return False
        if isinstance(client, ExecutorClient) and client.refusal is not None:
            if client.refusal == ROOM:
                return False
            raise RefusedError(client.refusal, client.index)
        return True


def _why(error: BaseException) -> str:
    """Describe a failure in one line, with advice."""
    if not isinstance(error, grpc.RpcError):
        return str(error) or type(error).__name__
    code, details = error.code(), " ".join(str(error.details()).split())
    advice = ""
    if code is grpc.StatusCode.UNAVAILABLE:
        advice = (
            ". It may have ended; or only one side uses TLS (server: --certificates, client: "
            "--root-certificates), or another authority has issued the server's certificate"
        )
    return f"{code.name}: {details}{advice}"
