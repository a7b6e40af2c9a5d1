"""What programs that ended badly have left on this machine: what is ours is removed, the rest is told.

Nothing of fedexec stays when its caller ends, however it ends. What is found here could not be ended, or
belongs to other users of :mod:`multiprocessing` and loky: their files do not tell whose they are, so they are
never touched. Linux only: elsewhere nothing is found.
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
_NAMES = ("sem.mp-", "sem.loky-", "psm_")  # semaphores of multiprocessing and of loky, and segments
_DIRECTORY = "pymp-"  # of a Manager's socket
_YOUNG_SECONDS = 10.0  # what is younger may be about to be used


@dataclass(frozen=True, slots=True)
class Leftover:
    """A process of fedexec's whose caller has ended.

    Attributes
    ----------
    pid : int
    mark : Mark
        The proof.
    """

    pid: int
    mark: Mark

    def __str__(self) -> str:
        return f"process {self.pid} of process {self.mark.pid}, which has ended"

    def remove(self) -> None:
        """End the process, and what was started in its group.

        Raises
        ------
        OSError
            That is not allowed.
        """
        try:
            handle = os.pidfd_open(self.pid)  # From here on the number cannot become another process's.
        except ProcessLookupError:
            return
        try:
            if Mark.on(self.pid) == self.mark and self.mark.is_of_the_dead():
                if os.getpgid(self.pid) == self.pid:
                    os.killpg(self.pid, signal.SIGKILL)
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            pass  # It has ended meanwhile.
        finally:
            os.close(handle)


def find() -> list[Leftover]:
    """Return this user's processes that are proven to be fedexec's, and whose caller is proven to be gone."""
    found = []
    for pid in _processes():
        mark = Mark.on(pid)
        if mark is not None and mark.is_of_the_dead() and _user_of(pid) == os.getuid():
            found.append(Leftover(pid, mark))
    return found


def suspects() -> dict[str, list[Path]]:
    """Return, by kind, files of this user that no process which can be seen uses.

    They may be in use all the same: by a process of another user or container, or by one that is about to.
    """
    found: dict[str, list[Path]] = {}
    named = [path for path in shared_memory() if path.name.startswith(_NAMES) and _is_old(path, stat.S_ISREG)]
    for path in unmapped(named):
        found.setdefault("semaphore" if path.name.startswith("sem.") else "shared memory", []).append(path)
    try:
        sockets = Path("/proc/net/unix").read_text()
    except OSError:
        return found
    for path in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY}*"):
        if _is_old(path, stat.S_ISDIR) and str(path) not in sockets:
            found.setdefault("directory of a socket", []).append(path)
    return found


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
            if path.lstat().st_ino not in mapped:
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


def _processes() -> list[int]:
    return psutil.pids()


def _user_of(pid: int) -> int | None:
    try:
        return psutil.Process(pid).uids().real
    except psutil.Error:
        return None


def _is_old(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Return whether this is such a file, of this user, and not new. A symbolic link is not followed."""
    try:
        status = path.lstat()
    except OSError:
        return False
    is_ours = status.st_uid == os.getuid() and is_kind(status.st_mode)
    return is_ours and time.time() - status.st_mtime > _YOUNG_SECONDS
