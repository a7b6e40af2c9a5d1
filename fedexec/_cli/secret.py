"""Files that prove who somebody is: read up to a bound, and named where they do not keep a secret."""

import logging
import math
import stat
import sys
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from fedexec._cli.options import STDOUT, UsageError
from fedexec.flower.grpc.client_auth import MIN_SECRET_BYTES

__all__ = ["read_certificate", "read_key", "read_secret"]

log = logging.getLogger("fedexec")

LARGEST = 1 << 20  # bytes; a device may have no end
LEAST_BITS = 50.0  # 16 random bytes show 55 and more
ADVICE = f"make one by `(umask 077; head -c {2 * MIN_SECRET_BYTES} /dev/urandom > FILE)`"


def read_certificate(name: str) -> bytes:
    """Read a file that anybody may read.

    Raises
    ------
    UsageError
        It cannot be read, or has no end.
    """
    try:
        with Path(name).open("rb") as file:
            return _read(name, file)
    except OSError as exc:
        raise UsageError(f"{name}: {exc.strerror}") from exc


def read_key(name: str) -> bytes:
    """Read a file that only its owner should be able to read; warn where others can."""
    if Path(name) == STDOUT:
        return _read(name, sys.stdin.buffer)
    data = read_certificate(name)
    if _others_can_read(Path(name)):
        log.warning("%s can be read by others on this machine: chmod 600 %s", name, name)
    return data


def read_secret(name: str | None) -> bytes | None:
    """Read what ``--client-secret`` names; it is refused where it could be guessed."""
    if name is None:
        return None
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
