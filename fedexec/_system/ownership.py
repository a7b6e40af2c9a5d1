"""The mark that a process of fedexec bears, so that :mod:`fedexec._system.leftovers` knows it.

It stands in the environment with which the process was started, where only its user can read it. Linux only:
elsewhere no process bears one.
"""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["VARIABLE", "Mark"]

VARIABLE = "_FEDEXEC_CALLER"
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Mark:
    """Who has started a process.

    Attributes
    ----------
    pid : int
        Of the caller.
    started : int
        When the caller was started, in clock ticks since the machine was: no other process has both numbers.
    namespace : int
        In which `pid` counts.
    boot : str
        Which start of the machine it was.
    """

    pid: int
    started: int
    namespace: int
    boot: str

    @classmethod
    def own(cls) -> "Mark | None":
        """Return the mark of this process; None where the system does not tell what it takes."""
        started = _start_of(os.getpid())
        try:
            namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 (a link that leads nowhere)
            boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if started is None else cls(os.getpid(), started, namespace, boot)

    @classmethod
    def on(cls, pid: int) -> "Mark | None":
        """Return the mark that a process bears; None if it bears none, is gone, or is another user's."""
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

    def is_of_the_dead(self) -> bool:
        """Return whether it is certain that the caller has ended."""
        here = Mark.own()
        if here is None or (self.namespace, self.boot) != (here.namespace, here.boot):
            return False  # Its number means another process here.
        return _start_of(self.pid) != self.started


def _start_of(pid: int) -> int | None:
    try:
        return int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None
