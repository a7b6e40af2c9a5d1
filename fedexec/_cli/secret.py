"""Files that prove who somebody is: read up to a bound, and named where they do not keep a secret."""

import contextlib
import logging
import math
import ssl
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedexec._cli.options import STDOUT, UsageError
from fedexec._system.error_text import message_of
from fedexec.flower.grpc.client_auth import MIN_SECRET_BYTES

__all__ = ["read_authority", "read_key", "read_secret", "read_tls"]

log = logging.getLogger("fedexec")

LARGEST = 1 << 20  # bytes; a device may have no end
LEAST_BITS = 50.0  # 16 random bytes show 55 and more
ADVICE = f"make one by `(umask 077; head -c {2 * MIN_SECRET_BYTES} /dev/urandom > FILE)`"


def read_tls(authority: str, certificate: str, key: str) -> tuple[bytes, bytes, bytes]:
    """Read the three files of ``--certificates``.

    Raises
    ------
    UsageError
        One cannot be read, or is not what it should be; or the key is that of another certificate.
    """
    with _given_by("--certificates"):
        found = _read_certificate(authority), _read_certificate(certificate), read_key(key)
        if b"PRIVATE KEY-----" not in found[2]:
            raise UsageError(f"{key} holds no private key: it has no PEM block -----BEGIN PRIVATE KEY-----")
        if Path(certificate).is_file() and Path(key).is_file():  # else it has been read, and is gone
            _check_pair(certificate, key)
        return found


@contextlib.contextmanager
def _given_by(option: str) -> Iterator[None]:
    """Name the option whose file is wrong."""
    try:
        yield
    except UsageError as exc:
        raise UsageError(f"{option} {exc}") from exc


def _check_pair(certificate: str, key: str) -> None:
    def refuse() -> str:
        raise UsageError(f"{key} is encrypted with a passphrase, which nobody could enter for the server")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=refuse)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"{key} is not the key of the certificate in {certificate}") from exc
        raise UsageError(f"{key} holds no private key that can be read: {message_of(exc)}") from exc


def read_authority(name: str | None, option: str) -> bytes | None:
    """Read the certificate of an authority, which anybody may read; None if none is named.

    Raises
    ------
    UsageError
        The file cannot be read, has no end, or holds no certificate.
    """
    if name is None:
        return None
    with _given_by(option):
        return _read_certificate(name)


def _read_certificate(name: str) -> bytes:
    data = _read_file(name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as exc:
        raise UsageError(
            f"{name} holds no certificate: it has no sound PEM block -----BEGIN CERTIFICATE-----"
        ) from exc
    return data


def _read_file(name: str) -> bytes:
    try:
        with Path(name).open("rb") as file:
            return _read(name, file)
    except OSError as exc:
        raise UsageError(f"{name}: {exc.strerror}") from exc


def read_key(name: str) -> bytes:
    """Read a file that only its owner should be able to read; warn where others can."""
    if Path(name) == STDOUT:
        return _read(name, sys.stdin.buffer)
    data = _read_file(name)
    if _others_can_read(Path(name)):
        log.warning("%s can be read by others on this machine: chmod 600 %s", name, name)
    return data


def read_secret(name: str | None) -> bytes | None:
    """Read what ``--client-secret`` names; it is refused where it could be guessed."""
    if name is None:
        return None
    with _given_by("--client-secret"):
        secret = read_key(name)
    if len(secret) < MIN_SECRET_BYTES:
        raise UsageError(
            f"--client-secret {name}: {len(secret)} bytes are too few for a secret, which has "
            f"{MIN_SECRET_BYTES} or more: {ADVICE}"
        )
    if _bits(secret) < LEAST_BITS:
        raise UsageError(f"--client-secret {name}: it repeats itself, and can be guessed: {ADVICE}")
    return secret


def _read(name: str, file: BinaryIO) -> bytes:
    data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise UsageError(f"{name}: it is larger than {LARGEST >> 20} MiB, which no key and no certificate is")
    return data


def _others_can_read(path: Path) -> bool:
    """Whether a file's mode, and those of the directories above it, let another user in."""
    if not path.is_file() or not path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        return False
    return all(above.stat().st_mode & (stat.S_IXGRP | stat.S_IXOTH) for above in path.resolve().parents)


def _bits(secret: bytes) -> float:
    """Return how much at most a secret holds, by how often each of its bytes occurs."""
    return sum(number * math.log2(len(secret) / number) for number in Counter(secret).values())
