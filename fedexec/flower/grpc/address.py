"""Checks of ``host:port`` before Flower sees it, because Flower's own check prints and exits."""

import errno
import os
import random
import socket

from fedexec.errors import FedexecError

__all__ = ["AddressError", "check_listening", "free_address", "split_address"]

CONNECT_SECONDS = 1.0  # time limit for a connection on this machine
# below the ephemeral ports, which a system gives to programs that ask for any port
_PORTS = range(10_000, 32_768)


class AddressError(FedexecError, OSError):
    """An address that cannot be used; the message gives the reason."""


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[host]:port``.

    Parameters
    ----------
    address : str

    Returns
    -------
    tuple of (str, int)
        Host without brackets, and port.

    Raises
    ------
    AddressError
        The address has neither form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise AddressError(f"{address!r} is not an address. Write it like 127.0.0.1:8080 or [::1]:8080.")
    return host.strip("[]"), int(port)


def check_listening(address: str) -> None:
    """Check that this process can listen at an address.

    The check does not listen itself: a process that another thread starts at that moment holds this process's
    sockets a little longer, and the next listener would find the address in use.

    Parameters
    ----------
    address : str
        ``host:port``.

    Raises
    ------
    AddressError
        Listening is not possible there.
    """
    host, port = split_address(address)
    try:
        family, kind, protocol, _, endpoint = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(endpoint)
            # A listener may exist although the bind has succeeded.
            with socket.socket(family, kind, protocol) as caller:
                caller.settimeout(CONNECT_SECONDS)
                if caller.connect_ex(endpoint) in (0, errno.EAGAIN):
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    except OSError as exc:
        raise AddressError(f"Cannot listen at {address}: {exc.strerror}. Choose another --address.") from exc


def free_address(host: str = "127.0.0.1") -> str:
    """Find a free address to listen at.

    The port is not an ephemeral one, so the system does not give it to another program before the server
    listens.

    Parameters
    ----------
    host : str

    Returns
    -------
    str
        ``host:port``.

    Raises
    ------
    AddressError
        None of 100 ports is free, or `host` does not belong to this machine.
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
