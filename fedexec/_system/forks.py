"""What a process that the caller forks inherits, and must let go of.

DataLoader, ``multiprocessing.Pool`` and :func:`os.fork` copy the caller with its executors, but not their
threads. Workers and templates notice that the caller is gone by the end of a pipe; a forked process that kept
the other end open would keep them alive. So each such descriptor leads to ``/dev/null`` in the child. Its
number stays taken there, so that no object of the child closes somebody else's descriptor later.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

__all__ = ["hold", "let_go", "no_fork"]

_lock = threading.RLock()  # No process is forked while it is held.
_held: set[int] = set()


@contextlib.contextmanager
def no_fork() -> Iterator[None]:
    """Keep other threads from forking between the opening of a descriptor and :func:`hold`."""
    with _lock:
        yield


def hold(fd: int) -> int:
    """Note that a descriptor must not stay open in processes that are forked; return it."""
    _held.add(fd)
    return fd


def let_go(fd: int) -> None:
    """Note that a descriptor is about to be closed: its number may soon be another's."""
    _held.discard(fd)


def _replace_in_child() -> None:
    _lock.release()
    if not _held:
        return
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in _held:
        os.dup2(null, fd, inheritable=False)
    os.close(null)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_replace_in_child)
