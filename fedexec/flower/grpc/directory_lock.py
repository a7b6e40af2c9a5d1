"""A directory that one process uses at a time, and that tells which."""

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
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that have no locks


class LockedError(Exception):
    """Another process holds the lock; the message says which."""


class DirectoryLock:
    """Holds a directory until it is released, or this process ends.

    It is a record lock: the system takes it back with the process, however that ends, and what the process
    has forked does not keep it.

    Parameters
    ----------
    directory : Path

    Raises
    ------
    LockedError
        Another process holds it.
    OSError
        Nothing can be written there.
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
        """Let others have it. May be called again."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)  # before it is let go: afterwards it may be somebody else's
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        """Open the file of the lock, and nothing else that somebody has put there in its place."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        fd = os.open(self._path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, f"{NAME} in it is not a regular file")
        return fd

    def _is_held(self) -> bool:
        """Take the lock; return whether the file is still the one by that name."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno in _UNKNOWN:
                log.warning(
                    "%s cannot be locked (%s): let no other run use it", self._path.parent, exc.strerror
                )
                return True
            if exc.errno not in _TAKEN:
                raise
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip()
            raise LockedError(holder or "it has not yet said by which pid") from exc
        try:
            return os.path.samestat(self._path.lstat(), os.fstat(self._fd))
        except FileNotFoundError:  # its holder has just removed it
            return False
