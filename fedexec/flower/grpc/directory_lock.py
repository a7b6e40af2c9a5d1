"""A lock on a directory, so that one process at a time uses it; the lock names that process."""

import errno
import logging
import os
import socket
import stat
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["DirectoryLock", "LockedError"]

log = logging.getLogger("fedexec.flower")

NAME = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # File systems without locks answer like this.


class LockedError(Exception):
    """Another process holds the lock; the message names it."""


class DirectoryLock:
    """Locks a directory until the lock is released or this process ends.

    It is a record lock: the system releases it when the process ends for any reason, and forked processes do
    not keep it.

    Parameters
    ----------
    directory : Path

    Raises
    ------
    LockedError
        Another process holds the lock.
    OSError
        The directory cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._fd = self._open()
        try:
            while not self._is_held():
                os.close(self._fd)
                self._fd = self._open()
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            os.close(self._fd)
            raise

    def release(self) -> None:
        """Release the lock; further calls do nothing."""
        if self._fd >= 0:
            # Remove the file first: after the release, it may belong to another process.
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        """Open the lock's file, but nothing that another user has put in its place."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        fd = os.open(self._path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, f"its {NAME} is not a regular file")
        return fd

    def _is_held(self) -> bool:
        """Take the lock; return whether the file is still the one with that name."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno in _UNKNOWN:
                log.warning(
                    "%s cannot be locked (%s): make sure that no other run uses it",
                    self._path.parent, exc.strerror,
                )  # fmt: skip
                return True
            if exc.errno not in _TAKEN:
                raise
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip()
            raise LockedError(holder or "its pid is not known yet") from exc
        try:
            return os.path.samestat(self._path.lstat(), os.fstat(self._fd))
        except FileNotFoundError:  # The holder has just removed the file.
            return False
