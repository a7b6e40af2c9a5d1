"""``host:port``, checked before Flower sees it: its own check prints and exits."""

import socket

from fedexec.errors import FedexecError

__all__ = ["AddressError", "check_listening", "split_address"]


class AddressError(FedexecError, OSError):
    """An address nobody can use; the message says why."""


def split_address(address: str) -> tuple[str, int]:
    """Take ``host:port`` or ``[host]:port`` apart; AddressError if it is neither."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise AddressError(f"{address!r} is not an address. Write it like 127.0.0.1:8080 or [::1]:8080.")
    return host.strip("[]"), int(port)


def check_listening(address: str) -> None:
    """Raise AddressError where nobody can listen."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, endpoint = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(endpoint)
            probe.listen(1)  # with SO_REUSEADDR only this notices another listener
    except OSError as exc:
        raise AddressError(f"Cannot listen at {address}: {exc.strerror}. Choose another --address.") from exc
