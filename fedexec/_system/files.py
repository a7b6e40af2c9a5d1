"""Files that this program leaves for others: whole or not at all, and each path stays what it is.

A file gets its new content in one step, from a file that is written beside it. That would make something else
of a path that is more than a file of one name, or of another owner: a device, a pipe and a descriptor that
the shell has opened are written through, a link's target is what is written. What cannot work is found out by
:func:`attempt`, by the same steps, before there is anything to lose.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from fedexec.errors import FedexecError

__all__ = ["IS_FULL", "UnwritableError", "attempt", "descriptor", "explained", "is_same", "write"]

MOST_LINKS = 40  # as many as Linux follows
KEEPS_ITS_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EINVAL)  # write through then
IS_FULL = (errno.ENOSPC, errno.EDQUOT)
# Windows has none of the first two, and only it has the last.
OPEN = os.O_WRONLY | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOCTTY", "O_BINARY"))


class UnwritableError(FedexecError, OSError):
    """A file that cannot be written; the message names it and says what helps."""


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a file, whole where its path allows that.

    Raises
    ------
    UnwritableError
        What was there is unchanged, unless the path has to be written through.
    """
    with explained(path):
        number = descriptor(path)
        if number is not None:
            _write(os.dup(number), data)
            return
        found = _look(path)
        if not (_is_replaceable(path, found) and _replace(path, found, data)):
            _write_through(path, found, data)


def attempt(path: Path) -> None:
    """Try whether a file can be written, by the steps of :func:`write`, and leave everything as it is.

    Raises
    ------
    UnwritableError
    """
    with explained(path):
        number = descriptor(path)
        if number is not None:
            os.write(number, b"")
            return
        found = _look(path)
        if found is not None and not stat.S_ISREG(found.st_mode):
            # Opening and closing it would be seen at its other end.
            if stat.S_ISSOCK(found.st_mode):
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return
        if found is not None:
            os.close(os.open(path, OPEN))
        if _is_replaceable(path, found):
            _replace(path, found, None)


def descriptor(path: Path) -> int | None:
    """Return which open file of this process a path such as ``/dev/stdout`` or ``/dev/fd/63`` means."""
    for _ in range(MOST_LINKS):
        directory = os.path.realpath(path.parent)
        if path.name.isdecimal() and re.fullmatch(rf"/dev/fd|/proc/{os.getpid()}(/task/\d+)?/fd", directory):
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(directory, path.readlink())
    return None


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, or will: what is written to one is lost with the other."""
    try:
        if one.exists() and other.exists():
            return one.is_file() and one.samefile(other)
    except OSError:  # one of them is no file's name
        return False
    return os.path.realpath(one) == os.path.realpath(other)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Make a failure to write one that names the path and says what helps."""
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


def _look(path: Path) -> os.stat_result | None:
    """Return what a path leads to; the kernel refuses links that others have laid where all may write."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return found


def _is_replaceable(path: Path, found: os.stat_result | None) -> bool:
    """Whether a path is one name of one file, or of none yet; what /proc leads to is open somewhere."""
    if found is None:
        return True
    is_file = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
    return is_file and not os.path.realpath(path.parent).startswith("/proc/")


def _replace(path: Path, found: os.stat_result | None, data: bytes | memoryview | None) -> bool:
    """Put a new file in a path's place, or only try to if there is no data; False: write through instead."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f".fedexec-{secrets.token_hex(8)}.part")
    try:
        # O_EXCL: nobody can have laid a link there.
        mode = 0o666 if found is None else 0o600
        fd = os.open(part, OPEN | os.O_CREAT | os.O_EXCL, mode)
        try:
            if found is not None and hasattr(os, "fchown"):
                os.fchown(fd, found.st_uid, found.st_gid)
                os.fchmod(fd, stat.S_IMODE(found.st_mode))
            _write(fd, data or b"", sync=data is not None)
            if data is not None:
                part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as exc:
        if found is None or exc.errno not in KEEPS_ITS_PLACE:
            raise
        return False
    return True


def _write_through(path: Path, found: os.stat_result | None, data: bytes | memoryview) -> None:
    """Write what a path leads to; of a file, whose content that replaces, only once there is room for all."""
    fd = os.open(path, OPEN)
    if found is None or not stat.S_ISREG(found.st_mode):
        _write(fd, data)
        return
    try:
        if len(data) > found.st_size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, len(data))
    except OSError as exc:
        if exc.errno in IS_FULL:
            os.ftruncate(fd, found.st_size)
            os.close(fd)
            raise
    os.ftruncate(fd, len(data))
    _write(fd, data, sync=True)


def _write(fd: int, data: bytes | memoryview, *, sync: bool = False) -> None:
    """Write everything, and close; a full disk may say so as late as that."""
    with open(fd, "wb", buffering=0) as file:
        left = memoryview(data).cast("B")
        while left:
            left = left[file.write(left) :]
        if sync:
            os.fsync(fd)
