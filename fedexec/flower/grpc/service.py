"""The server's end of the wire: Flower's service, with limits of time and size.

Flower's own waits without limit where a client takes nothing more, and reads ahead as much as a client sends.
"""

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

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

STRANGER_BYTES = 64 << 10  # an answer of somebody who has not been admitted
KEEPALIVE_SECONDS = 60  # after so long without a sign of life a client is asked for one, and given as long


class Connection(GrpcBridge):
    """What Flower talks to one client through: each question has its time.

    Parameters
    ----------
    context : grpc.ServicerContext

    Attributes
    ----------
    is_admitted : bool
        Whether it may send more than a few words.
    forget : callable
        Called when the connection ends, before anybody who waits for an answer hears of it: who hears of it
        may begin the next round at once, and that one must not count on this client any more.
    """

    def __init__(self, context: grpc.ServicerContext) -> None:
        super().__init__()
        self._context = context
        self.is_admitted = False
        self.forget: Callable[[], None] = lambda: None

    def request(self, ins_wrapper: Any) -> Any:
        """Ask, and wait for the answer; TimeoutError if it is late, ConnectionError if there will be none."""
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
        """Note that the connection has ended; Flower calls it when it has."""
        self.forget()
        super().close()

    def end(self) -> None:
        """End the connection, whatever its other end does."""
        self.close()
        self._context.cancel()


class _Service(FlowerServiceServicer):
    """Flower's service, which reads one message for each that it sends, a short one from a stranger."""

    def __init__(self, clients: Any) -> None:
        super().__init__(clients, grpc_bridge_factory=self._connection)
        self._of_thread = threading.local()

    def Join(  # noqa: N802  # Flower's name
        self, request_iterator: Iterator[Any], context: grpc.ServicerContext
    ) -> Iterator[Any]:
        """Serve one client; runs in a thread of its own."""
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
                    log.warning("a client was refused: it answered the first question at length")
                    connection.end()
                    return
                yield message

        try:
            for message in super().Join(answers(), context):
                asked.release()
                yield message
        except GrpcBridgeClosed:  # that is how it ends
            pass
        finally:
            is_over.set()
            asked.release()

    def _connection(self) -> Connection:
        connection: Connection = self._of_thread.connection
        return connection


def start_service(
    clients: Any,
    address: str,
    *,
    room: int,
    message_bytes: int,
    certificates: tuple[bytes, bytes, bytes] | None,
) -> grpc.Server:
    """Listen, and serve so many clients at once; more are told that there is no room.

    Raises
    ------
    AddressError
        Nobody can listen there, or not with these certificates.
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
        raise AddressError(f"Cannot listen at {address}: {exc}") from exc
    service.start()
    return service
