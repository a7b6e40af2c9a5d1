"""Writes files completely or not at all, and never turns a path into something else than it is.

A file is written beside its path, and then put in its place in one step. That would change a path that is
more than the one name of one file, or whose file has another owner. So a device, a pipe and a descriptor that
the shell has opened are written directly, and of a symbolic link the target is written. :func:`attempt` goes
through the same steps, to find out what cannot work before there is anything to lose.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedexec.errors import FedexecError

__all__ = [
    "IS_FULL",
    "UnwritableError",
    "attempt",
    "descriptor",
    "explained",
    "is_same",
    "new_version",
    "write",
]

MOST_LINKS = 40  # Linux follows as many symbolic links
KEEPS_ITS_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EINVAL)  # write directly
IS_FULL = (errno.ENOSPC, errno.EDQUOT)
# Windows does not have the first two flags, and no other system has the last.
FLAGS = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOCTTY", "O_BINARY"))
OPEN = os.O_WRONLY | FLAGS


class UnwritableError(FedexecError, OSError):
    """A file cannot be written; the message names the file and says what to do."""


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a file, completely or not at all where its path allows that.

    Parameters
    ----------
    path : Path
    data : bytes-like

    Raises
    ------
    UnwritableError
        The file is unchanged, unless the path had to be written directly.
    """
    with explained(path):
        number = descriptor(path)
        if number is not None:
            _write(os.dup(number), data)
            return
        status = _status_of(path)
        if not (_is_replaceable(path, status) and _replace(path, status, data)):
            _write_through(path, status, data)


def attempt(path: Path) -> None:
    """Find out whether a file can be written, by the steps of :func:`write`, without changing anything.

    Parameters
    ----------
    path : Path

    Raises
    ------
    UnwritableError
        The file cannot be written.
    """
    with explained(path):
        number = descriptor(path)
        if number is not None:
            os.write(number, b"")
            return
        status = _status_of(path)
        if status is not None and not stat.S_ISREG(status.st_mode):
            # Do not open it: the process at the other end of a pipe would notice that.
            if stat.S_ISSOCK(status.st_mode):
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return
        if status is not None:
            os.close(os.open(path, OPEN))
        if _is_replaceable(path, status):
            _replace(path, status, None)


@contextlib.contextmanager
def new_version(path: Path, part: Path, *, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Yield a new file, which replaces another file in one step when the context ends.

    Then the file and its name are on the disk. After an error, the new file is removed and `path` unchanged.

    Parameters
    ----------
    path : Path
        The file to replace or to make.
    part : Path
        Name of the new file until then: a free name in the same directory.
    mode : int
        Permissions of the new file.

    Yields
    ------
    file object
        Open for reading and writing bytes.
    """
    # O_EXCL: no other user can have put a link there.
    fd = os.open(part, os.O_RDWR | FLAGS | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "w+b") as file:
            yield file
            file.flush()
            os.fsync(fd)
        part.replace(path)
        _sync_directory(path.parent)
    finally:
        part.unlink(missing_ok=True)


def descriptor(path: Path) -> int | None:
    """Return the open descriptor of this process that a path such as ``/dev/stdout`` or ``/dev/fd/63`` names.

    Parameters
    ----------
    path : Path

    Returns
    -------
    int or None
        None if the path names no descriptor.
    """
    for _ in range(MOST_LINKS):
        directory = os.path.realpath(path.parent)
        if path.name.isdecimal() and re.fullmatch(rf"/dev/fd|/proc/{os.getpid()}(/task/\d+)?/fd", directory):
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(directory, path.readlink())
    return None


def is_same(first: Path, second: Path) -> bool:
    """Return whether two paths lead to one file, or will: writing one of them would lose the other.

    Parameters
    ----------
    first, second : Path

    Returns
    -------
    bool
    """
    try:
        if first.exists() and second.exists():
            return first.is_file() and first.samefile(second)
    except OSError:  # a path cannot be the name of a file
        return False
    return os.path.realpath(first) == os.path.realpath(second)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError of the context into an UnwritableError that names the path and says what to do.

    Parameters
    ----------
    path : Path
    """
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EISDIR:
            reason = "is a directory"
        else:
            reason = f"cannot be written: {exc.strerror or exc}"
        advice = "name a file in a directory that exists and is yours"
        if exc.errno in IS_FULL:
            advice = "free some space, or name a file elsewhere"
        raise UnwritableError(f"{path} {reason}; {advice}") from exc


def _status_of(path: Path) -> os.stat_result | None:
    """Return the status of the file that a path leads to; None if there is none.

    In directories where all users may write, the kernel refuses to follow the links of other users.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return status


def _is_replaceable(path: Path, status: os.stat_result | None) -> bool:
    """Return whether a path is the one name of one file, or free; files under /proc are open somewhere."""
    if status is None:
        return True
    is_file = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    return is_file and not os.path.realpath(path.parent).startswith("/proc/")


def _replace(path: Path, status: os.stat_result | None, data: bytes | memoryview | None) -> bool:
    """Put a new file in a path's place; without data, only try. Return False to have it written directly."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f".fedexec-{secrets.token_hex(8)}.part")
    try:
        with new_version(target, part, mode=0o666 if status is None else 0o600) as file:
            if status is not None and hasattr(os, "fchown"):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
            if data is None:
                raise _OnlyTriedError
            file.write(data)
    except _OnlyTriedError:
        return True
    except OSError as exc:
        if status is None or exc.errno not in KEEPS_ITS_PLACE:
            raise
        return False
    return True


class _OnlyTriedError(Exception):
    """A new version of the file could be made, but was only to be tried."""


def _write_through(path: Path, status: os.stat_result | None, data: bytes | memoryview) -> None:
    """Write to a path directly; the content of a file is lost only once there is room for all new data."""
    fd = os.open(path, OPEN)
    if status is None or not stat.S_ISREG(status.st_mode):
        _write(fd, data)
        return
    try:
        if len(data) > status.st_size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, len(data))
    except OSError as exc:
        if exc.errno in IS_FULL:
            os.ftruncate(fd, status.st_size)
            os.close(fd)
            raise
    os.ftruncate(fd, len(data))
    _write(fd, data, sync=True)


def _write(fd: int, data: bytes | memoryview, *, sync: bool = False) -> None:
    """Write all data and close the descriptor; some file systems report a full disk only then."""
    with open(fd, "wb", buffering=0) as file:
        left = memoryview(data).cast("B")
        while left:
            left = left[file.write(left) :]
        if sync:
            os.fsync(fd)


def _sync_directory(directory: Path) -> None:
    """Write the entries of a directory to the disk, if the system supports that."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:  # some file systems do not support this
        pass
    finally:
        os.close(fd)
