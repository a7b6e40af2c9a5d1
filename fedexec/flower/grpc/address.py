"""``host:port``, checked before Flower sees it: its own check prints and exits."""

import errno
import os
import random
import socket

from fedexec.errors import FedexecError

__all__ = ["AddressError", "check_listening", "free_address", "split_address"]

CONNECT_SECONDS = 1.0  # to somebody on this machine
_PORTS = range(10_000, 32_768)  # below those that a system gives to who asks for any


class AddressError(FedexecError, OSError):
    """An address nobody can use; the message says why."""


def split_address(address: str) -> tuple[str, int]:
    """Take ``host:port`` or ``[host]:port`` apart; AddressError if it is neither."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise AddressError(f"{address!r} is not an address. Write it like 127.0.0.1:8080 or [::1]:8080.")
    return host.strip("[]"), int(port)


def check_listening(address: str) -> None:
    """Raise AddressError where nobody can listen.

    It does not listen itself: a process that another thread starts just then has all our sockets for a moment
    longer than we do, and whoever listens next would find the address in use.
    """
    host, port = split_address(address)
    try:
        family, kind, protocol, _, endpoint = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(endpoint)
            with socket.socket(family, kind, protocol) as caller:  # there may be a listener all the same
                caller.settimeout(CONNECT_SECONDS)
                if caller.connect_ex(endpoint) in (0, errno.EAGAIN):
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    except OSError as exc:
        raise AddressError(f"Cannot listen at {address}: {exc.strerror}. Choose another --address.") from exc


def free_address(host: str = "127.0.0.1") -> str:
    """Find an address to listen at.

    Its port is none that the system would give to another program for the asking, so that it is still free
    when a server comes to listen there.

    Raises
    ------
    AddressError
        All of many ports are taken, or `host` is none of this machine's.
    """
    choose = random.SystemRandom().choice
    for _ in range(100):
        address = f"{host}:{choose(_PORTS)}"
        try:
            check_listening(address)
        except AddressError as exc:
            problem = exc
        else:
            return address
    raise problem
