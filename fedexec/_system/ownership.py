"""The mark of a process of fedexec, by which :mod:`fedexec._system.leftovers` recognizes it.

The mark is part of the environment with which the process was started, where only its user can read it. Linux
only: elsewhere processes have no mark.
"""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["VARIABLE", "Mark"]

VARIABLE = "_FEDEXEC_CALLER"
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Mark:
    """Identifies the caller that has started a process.

    Attributes
    ----------
    pid : int
        Process id of the caller.
    started : int
        Start of the caller in clock ticks since the machine was started. No other process has the same
        `pid` and the same `started`.
    namespace : int
        Inode of the pid namespace to which `pid` belongs.
    boot : str
        Identifies the start of the machine.
    """

    pid: int
    started: int
    namespace: int
    boot: str

    @classmethod
    def own(cls) -> "Mark | None":
        """Return the mark of this process; None if the system does not provide the necessary information."""
        started = _start_of(os.getpid())
        try:
            namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 (a link that leads nowhere)
            boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if started is None else cls(os.getpid(), started, namespace, boot)

    @classmethod
    def on(cls, pid: int) -> "Mark | None":
        """Return the mark that a process has.

        Parameters
        ----------
        pid : int

        Returns
        -------
        Mark or None
            None if the process has no mark, has ended, or belongs to another user.
        """
        try:
            environ = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            return None
        name = VARIABLE.encode() + b"="
        text = next((entry[len(name) :] for entry in environ if entry.startswith(name)), b"")
        try:
            number, started, namespace, boot = text.decode().split(":")
            return cls(int(number), int(started), int(namespace), boot)
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"{self.pid}:{self.started}:{self.namespace}:{self.boot}"

    def caller_has_ended(self) -> bool:
        """Return whether it is certain that the caller has ended."""
        here = Mark.own()
        if here is None or (self.namespace, self.boot) != (here.namespace, here.boot):
            return False  # in this namespace the process id names another process
        return _start_of(self.pid) != self.started


def _start_of(pid: int) -> int | None:
    try:
        return int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None
