"""Records how much of an EMULATED device each process holds; the kernel keeps the record.

The ledger is a file without a name (``memfd``) that holds no data, only *locks*: a process that holds `n`
bytes of the device has locked `n` bytes of the file, in a range that follows from its pid. A lock ends with
the last descriptor of the process that took it, whatever ended that process. The first process that asks for
the device makes the ledger, and tells its children in ``_FEDEXEC_EMULATED_LEDGER`` where it is. Linux only.
"""

import contextlib
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

from fedexec.devices.device import LEDGER_VARIABLE
from fedexec.errors import DeviceError

__all__ = ["Ledger", "ledgers"]

NAME = "fedexec-emulated"


def ledgers(count: int) -> list[str]:
    """Return the paths of this program's ledgers, one for each device; they are made if there are none.

    Parameters
    ----------
    count : int
        Number of devices.

    Returns
    -------
    list of str

    Raises
    ------
    DeviceError
        The inherited ledgers no longer exist, or ledgers cannot be made on this system.
    """
    known = os.environ.get(LEDGER_VARIABLE, "").split(":")
    if known != [""] and len(known) == count:
        if all(_is_ledger(path) for path in known):
            return known
        raise DeviceError(
            f"the emulated device of this program no longer exists: the process that made it has ended. "
            f"Unset {LEDGER_VARIABLE} ({':'.join(known)}) to make a new device"
        )
    try:
        fds = [os.memfd_create(NAME) for _ in range(count)]
    except (AttributeError, OSError) as exc:
        raise DeviceError(f"this system cannot emulate a device: {exc}") from exc
    paths = [f"/proc/{os.getpid()}/fd/{fd}" for fd in fds]
    os.environ[LEDGER_VARIABLE] = ":".join(paths)
    return paths


def _is_ledger(path: str) -> bool:
    """Return whether the path still leads to a ledger: another process may have got the same pid."""
    try:
        return str(Path(path).readlink()).startswith(f"/memfd:{NAME} ")
    except OSError:
        return False


class Ledger:
    """Records how much each process holds, as locks of a file (``F_OFD_SETLK`` in fcntl(2)).

    Parameters
    ----------
    path : str
        Path of the file.
    """

    SPAN = 1 << 40  # bytes of the file that a process may lock, from pid * SPAN on
    END = 1 << 62  # greater than pid * SPAN of every pid (less than 2**22); this byte is the lock for changes

    def __init__(self, path: str) -> None:
        self._path = path
        self._pid = os.getpid()
        self._fd: int | None = None  # holds the locks of this process

    def disown(self) -> bool:
        """Give up the inherited locks if this process was forked, and return whether it was."""
        if self._pid == os.getpid():
            return False
        self._pid, self._fd = os.getpid(), None  # the inherited descriptor stays open on purpose
        return True

    def read(self) -> dict[int, int]:
        """Return how many bytes each process holds, by pid."""
        held: dict[int, int] = {}
        fd = self._open()  # another open file than that with our locks, so that it shows our locks too
        try:
            spans = [(0, self.END)]
            while spans:
                start, end = spans.pop()
                lock = self._find(fd, start, end)
                if lock is None:
                    continue
                first, last = lock
                pid = first // self.SPAN
                held[pid] = held.get(pid, 0) + last - first
                # The kernel returns any lock in the span and not the first, so look on both sides of it.
                spans += [span for span in ((start, first), (last, end)) if span[0] < span[1]]
        finally:
            os.close(fd)
        return held

    def used(self) -> int:
        """Return how many bytes all processes hold together."""
        return sum(self.read().values())

    def write(self, held: int, needed: int) -> None:
        """Hold `needed` bytes instead of `held`.

        Parameters
        ----------
        held, needed : int
            Bytes.
        """
        start = os.getpid() * self.SPAN
        if needed > held:
            self._lock(fcntl.F_WRLCK, start + held, needed - held)
        elif needed < held:
            self._lock(fcntl.F_UNLCK, start + needed, held - needed)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep all other processes from changing the ledger while the context lasts."""
        self._lock(fcntl.F_WRLCK, self.END, 1, wait=True)
        try:
            yield
        finally:
            self._lock(fcntl.F_UNLCK, self.END, 1)

    def _lock(self, kind: int, start: int, size: int, *, wait: bool = False) -> None:
        if self._fd is None:
            self._fd = self._open()
        command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
        fcntl.fcntl(self._fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, size, 0))

    @staticmethod
    def _find(fd: int, start: int, end: int) -> tuple[int, int] | None:
        question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
        kind, _, first, size, _ = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))
        return None if kind == fcntl.F_UNLCK else (max(first, start), min(first + size, end))

    def _open(self) -> int:
        if not _is_ledger(self._path):
            raise DeviceError(
                f"the ledger of the emulated device, {self._path}, no longer exists, because the process "
                "that made it has ended"
            )
        try:
            return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise DeviceError(f"the ledger of the emulated device cannot be opened: {exc}") from exc
