"""Finds what programs that ended badly have left on this machine: processes of fedexec, and files.

Processes of fedexec end with their caller, however it ends; those that are found here could not be ended.
Files may belong to other users of :mod:`multiprocessing` and loky. The files do not say whose they are, so
they are only reported and never removed. Linux only: elsewhere nothing is found.
"""

import os
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedexec._system.ownership import Mark

__all__ = ["Leftover", "find", "mapped_shared_memory", "shared_memory", "suspects", "unmapped"]

SHARED = Path("/dev/shm")
_NAMES = ("sem.mp-", "sem.loky-", "psm_")  # semaphores of multiprocessing and of loky, and shared memory
_DIRECTORY = "pymp-"  # directories with the socket of a Manager
_YOUNG_SECONDS = 10.0  # a process may be about to use a file that is younger


@dataclass(frozen=True, slots=True)
class Leftover:
    """A process of fedexec whose caller has ended.

    Attributes
    ----------
    pid : int
        Process id.
    mark : Mark
        The proof that this is a process of fedexec.
    """

    pid: int
    mark: Mark

    def __str__(self) -> str:
        return f"process {self.pid} of process {self.mark.pid}, which has ended"

    def remove(self) -> None:
        """End the process and all processes in its group.

        Raises
        ------
        OSError
            This user may not end the process.
        """
        try:
            handle = os.pidfd_open(self.pid)  # from here on no other process can get this process id
        except ProcessLookupError:
            return
        try:
            if Mark.on(self.pid) == self.mark and self.mark.caller_has_ended():
                if os.getpgid(self.pid) == self.pid:
                    os.killpg(self.pid, signal.SIGKILL)
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the process has ended meanwhile
        finally:
            os.close(handle)


def find() -> list[Leftover]:
    """Return this user's processes that are certainly fedexec's and whose caller has certainly ended."""
    leftovers = []
    for pid in _processes():
        mark = Mark.on(pid)
        if mark is not None and mark.caller_has_ended() and _user_of(pid) == os.getuid():
            leftovers.append(Leftover(pid, mark))
    return leftovers


def suspects() -> dict[str, list[Path]]:
    """Return files of this user that no visible process uses, by kind of file.

    The files may be in use all the same: by a process of another user or container, or soon by a new process.
    """
    unused: dict[str, list[Path]] = {}
    named = [path for path in shared_memory() if path.name.startswith(_NAMES) and _is_old(path, stat.S_ISREG)]
    for path in unmapped(named):
        unused.setdefault("semaphore" if path.name.startswith("sem.") else "shared memory", []).append(path)
    try:
        sockets = Path("/proc/net/unix").read_text()
    except OSError:
        return unused
    for path in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY}*"):
        if _is_old(path, stat.S_ISDIR) and str(path) not in sockets:
            unused.setdefault("directory of a socket", []).append(path)
    return unused


def shared_memory() -> set[Path]:
    """Return the paths of all POSIX semaphores and shared memory that have a name."""
    return set(SHARED.iterdir()) if SHARED.is_dir() else set()


def unmapped(paths: Iterable[Path]) -> set[Path]:
    """Return those of these semaphores and shared memory files that no living process has mapped.

    Parameters
    ----------
    paths : iterable of Path

    Returns
    -------
    set of Path
    """
    paths = set(paths)  # listed before the maps are read, so that newer files do not count as unmapped
    if not paths:
        return set()
    # Compare inodes, because a semaphore is created under another name than its final name.
    mapped = {inode for pid in psutil.pids() for inode in mapped_shared_memory(pid)}
    free = set()
    for path in paths:
        try:
            if path.lstat().st_ino not in mapped:
                free.add(path)
        except FileNotFoundError:
            pass
    return free


def mapped_shared_memory(pid: int) -> set[int]:
    """Return the inodes of the semaphores and shared memory that a process has mapped.

    Parameters
    ----------
    pid : int

    Returns
    -------
    set of int
        Empty if the process does not exist or belongs to another user.
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if " /dev/shm/" in line}


def _processes() -> list[int]:
    return psutil.pids()


def _user_of(pid: int) -> int | None:
    try:
        return psutil.Process(pid).uids().real
    except psutil.Error:
        return None


def _is_old(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Return whether a path is a file of that kind, of this user, and not new. Links are not followed."""
    try:
        status = path.lstat()
    except OSError:
        return False
    is_ours = status.st_uid == os.getuid() and is_kind(status.st_mode)
    return is_ours and time.time() - status.st_mtime > _YOUNG_SECONDS
