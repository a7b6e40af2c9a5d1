"""Keeps descriptors of the caller from staying open in processes that are forked from it.

DataLoader, ``multiprocessing.Pool`` and :func:`os.fork` copy the caller with its executors, but without their
threads. Workers and templates notice the end of the caller by the end of a pipe. A forked process that kept
the caller's end of such a pipe open would keep them alive. So in the child each such descriptor leads to
``/dev/null``. The number of the descriptor stays in use there, so that no object of the child later closes a
descriptor that belongs to another object.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

__all__ = ["hold", "let_go", "no_fork"]

_lock = threading.RLock()  # no process is forked while this is locked
_held: set[int] = set()


@contextlib.contextmanager
def no_fork() -> Iterator[None]:
    """Keep other threads from forking between opening a descriptor and calling :func:`hold`."""
    with _lock:
        yield


def hold(fd: int) -> int:
    """Note that a descriptor must not stay open in forked processes.

    Parameters
    ----------
    fd : int

    Returns
    -------
    int
        The same descriptor.
    """
    _held.add(fd)
    return fd


def let_go(fd: int) -> None:
    """Note that a descriptor is about to be closed, because another file may soon get its number.

    Parameters
    ----------
    fd : int
    """
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
