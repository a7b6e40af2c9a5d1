"""The gRPC service of the server: Flower's own, with limits of time and size.

Flower's service waits for ever if a client stops reading, and reads as far ahead as a client sends.
"""

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from flwr.server.client_manager import ClientManager

from fedexec.flower.flower_internals import (
    FlowerServiceServicer,
    GrpcBridge,
    GrpcBridgeClosed,
    InsWrapper,
    add_FlowerServiceServicer_to_server,
)
from fedexec.flower.grpc.address import AddressError

__all__ = ["Connection", "start_service"]

log = logging.getLogger("fedexec.flower")

STRANGER_BYTES = 64 << 10  # largest first answer of a client that is not admitted yet
# After this time without traffic, the client is asked for a sign of life, and has the same time to answer.
KEEPALIVE_SECONDS = 60


class Connection(GrpcBridge):
    """Flower's connection to one client, with a time limit for each question.

    Parameters
    ----------
    context : grpc.ServicerContext

    Attributes
    ----------
    is_admitted : bool
        Whether the client may send long messages.
    forget : callable
        Called when the connection ends, before a thread that waits for an answer learns of the end: that
        thread may begin the next round at once, which must not count on this client.
    """

    def __init__(self, context: grpc.ServicerContext) -> None:
        super().__init__()
        self._context = context
        self.is_admitted = False
        self.forget: Callable[[], None] = lambda: None

    def request(self, ins_wrapper: InsWrapper) -> Any:
        """Ask the client, and wait for the answer.

        Parameters
        ----------
        ins_wrapper : InsWrapper
            Flower's message, and its timeout in seconds.

        Returns
        -------
        Flower's ResWrapper

        Raises
        ------
        TimeoutError
            The answer is late.
        ConnectionError
            There will be no answer.
        """
        late = threading.Event()

        def end() -> None:
            late.set()
            self.end()

        seconds = ins_wrapper.timeout
        timer = threading.Timer(seconds, end) if seconds is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            return super().request(InsWrapper(ins_wrapper.server_message, timeout=None))
        except GrpcBridgeClosed as exc:
            if late.is_set():
                raise TimeoutError(f"no answer within {seconds:g} s") from exc
            raise ConnectionError("the connection has ended") from exc
        finally:
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Note that the connection has ended; called by Flower."""
        self.forget()
        super().close()

    def end(self) -> None:
        """End the connection, whether or not the client cooperates."""
        self.close()
        self._context.cancel()


class _Service(FlowerServiceServicer):
    """Flower's service; it reads one message for each that it sends, and only short ones before admission."""

    def __init__(self, clients: ClientManager) -> None:
        super().__init__(clients, grpc_bridge_factory=self._connection)
        self._of_thread = threading.local()

    def Join(  # noqa: N802  # The name is Flower's.
        self, request_iterator: Iterator[Any], context: grpc.ServicerContext
    ) -> Iterator[Any]:
        """Serve one client, in a thread of its own.

        Parameters
        ----------
        request_iterator : iterator
            Messages of the client.
        context : grpc.ServicerContext

        Yields
        ------
        Messages for the client.
        """
        connection = self._of_thread.connection = Connection(context)
        asked = threading.Semaphore(0)
        is_over = threading.Event()

        def answers() -> Iterator[Any]:
            while True:
                asked.acquire()
                message = None if is_over.is_set() else next(request_iterator, None)
                if message is None:
                    return
                if not connection.is_admitted and message.ByteSize() > STRANGER_BYTES:
                    log.warning("a client was refused: its first answer was too long")
                    connection.end()
                    return
                yield message

        try:
            for message in super().Join(answers(), context):
                asked.release()
                yield message
        except GrpcBridgeClosed:  # Flower ends every connection in this way.
            pass
        finally:
            is_over.set()
            asked.release()

    def _connection(self) -> Connection:
        connection: Connection = self._of_thread.connection
        return connection


def start_service(
    clients: ClientManager,
    address: str,
    *,
    room: int,
    message_bytes: int,
    certificates: tuple[bytes, bytes, bytes] | None,
) -> grpc.Server:
    """Listen, and serve up to `room` clients at once; further clients are told that there is no room.

    Parameters
    ----------
    clients : ClientManager
    address : str
        ``host:port``.
    room : int
    message_bytes : int
        The largest message.
    certificates : tuple of (bytes, bytes, bytes) or None
        CA certificate, server certificate, private key, in PEM.

    Returns
    -------
    grpc.Server
        Started.

    Raises
    ------
    AddressError
        Listening is not possible there, or not with these certificates.
    """
    options = [
        ("grpc.max_concurrent_streams", max(100, room)),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.so_reuseport", 0),
    ]
    threads = concurrent.futures.ThreadPoolExecutor(max_workers=room, thread_name_prefix="fedexec-service")
    service = grpc.server(threads, maximum_concurrent_rpcs=room, options=options)
    add_FlowerServiceServicer_to_server(_Service(clients), service)
    try:
        if certificates is None:
            service.add_insecure_port(address)
        else:
            authority, certificate, key = certificates
            credentials = grpc.ssl_server_credentials(((key, certificate),), root_certificates=authority)
            service.add_secure_port(address, credentials)
    except RuntimeError as exc:
        with_what = "" if certificates is None else " with these certificates"
        raise AddressError(f"Cannot listen at {address}{with_what}: {exc}") from exc
    service.start()
    return service
