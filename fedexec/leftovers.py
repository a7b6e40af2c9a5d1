"""What programs that ended badly may have left on this machine, and how it is removed.

Nothing of fedexec stays when its caller ends, however it ends. What is found here was left by a machine that
crashed, by a process that could not be ended, or by other users of :mod:`multiprocessing` and loky. Linux
only: elsewhere nothing is found.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Leftover", "find", "mapped_shared_memory", "shared_memory", "unmapped"]

SHARED = Path("/dev/shm")
_NAMES = ("sem.mp-", "sem.loky-", "psm_")  # semaphores of multiprocessing and of loky, and segments
_DIRECTORY = "pymp-"  # of a Manager's socket
_TEMPLATE = "fedexec_backends._forker"  # in the command line of a template and of what it forked
_YOUNG_SECONDS = 10.0  # what is younger may be about to be used


@dataclass(frozen=True, slots=True)
class Leftover:
    """One thing that nobody uses any more: a process (`pid`), or a file or a directory (`path`)."""

    kind: str
    pid: int | None = None
    path: Path | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.pid if self.path is None else self.path}"

    def remove(self) -> None:
        """End the process and its group, or remove the file.

        Raises
        ------
        OSError
            That is not allowed.
        """
        if self.pid is not None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it leads no group, or is gone
                try:
                    os.kill(self.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        elif self.path is not None and self.path.is_dir():
            for entry in self.path.iterdir():
                entry.unlink(missing_ok=True)
            self.path.rmdir()
        elif self.path is not None:
            self.path.unlink(missing_ok=True)


def find() -> list[Leftover]:
    """Return what belongs to this user, and nobody uses."""
    return [*_processes(), *_shared_memory(), *_directories()]


def shared_memory() -> set[Path]:
    """Return the POSIX semaphores and shared memory that have a name."""
    return set(SHARED.iterdir()) if SHARED.is_dir() else set()


def unmapped(paths: Iterable[Path]) -> set[Path]:
    """Return those of these semaphores and segments that no living process has mapped."""
    paths = set(paths)  # listed before the maps are read: what is created meanwhile would seem to be nobody's
    if not paths:
        return set()
    # By inode: a semaphore is created under another name than it gets.
    mapped = {inode for pid in psutil.pids() for inode in mapped_shared_memory(pid)}
    found = set()
    for path in paths:
        try:
            if path.stat().st_ino not in mapped:
                found.add(path)
        except FileNotFoundError:
            pass
    return found


def mapped_shared_memory(pid: int) -> set[int]:
    """Return the inodes of the semaphores and segments that a process has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if " /dev/shm/" in line}


def _processes() -> list[Leftover]:
    """Return templates, and what they forked, whose caller is gone."""
    found = []
    for process in psutil.process_iter(["pid", "uids", "cmdline"]):
        try:
            ours = any(_TEMPLATE in argument for argument in process.info["cmdline"] or ())
            if ours and process.info["uids"].real == os.getuid() and _is_orphan(process):
                found.append(Leftover("process", pid=process.pid))
        except psutil.Error:
            pass
    return found


def _is_orphan(process: psutil.Process) -> bool:
    parent = process.parent()
    # The first process of a container may be the caller itself.
    return parent is None or (parent.pid == 1 and "python" not in parent.name())


def _shared_memory() -> list[Leftover]:
    candidates = [path for path in shared_memory() if path.name.startswith(_NAMES) and _is_ours(path)]
    kinds = (("semaphore" if path.name.startswith("sem.") else "shared memory", path) for path in candidates)
    unused = unmapped(candidates)
    return [Leftover(kind, path=path) for kind, path in kinds if path in unused]


def _directories() -> list[Leftover]:
    try:
        sockets = Path("/proc/net/unix").read_text()
    except OSError:
        return []
    unused = [
        path
        for path in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY}*")
        if _is_ours(path) and str(path) not in sockets
    ]
    return [Leftover("directory", path=path) for path in unused]


def _is_ours(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG_SECONDS
