"""Hooks for the end of the interpreter: submitted tasks finish before the pools of backends are closed."""

import functools
import multiprocessing
import os
import threading
import weakref
from multiprocessing import util
from typing import Protocol

from fedexec.interface import Backend

__all__ = ["drain_before_exit_of", "interpreter_ends", "register"]


class _Drainable(Protocol):
    def close(self) -> None: ...
    def join(self) -> None: ...


_schedulers: "weakref.WeakSet[_Drainable]" = weakref.WeakSet()
_lock = threading.Lock()  # A set cannot be listed while another thread adds to it.
_interpreter_ends = False
_FIRST = 1 << 30  # exit priority in multiprocessing, whose own hooks have at most 15; the highest runs first


def register(scheduler: _Drainable) -> None:
    """Have a scheduler finish its tasks before the interpreter ends, unless it is collected before.

    Parameters
    ----------
    scheduler : object
        Has the methods ``close()`` and ``join()``.
    """
    with _lock:
        _schedulers.add(scheduler)


def interpreter_ends() -> bool:
    """Return whether the interpreter has begun to end."""
    return _interpreter_ends


def drain_before_exit_of(backend_class: type[Backend]) -> None:
    """Finish all submitted tasks before the pools that a backend is built on are closed at exit.

    concurrent.futures and loky close their pools in hooks of ``threading._register_atexit``, which has no
    public name; the hook that was registered last runs first. The backend's module has been imported
    already, so the hook that is registered here runs before theirs. In a process that multiprocessing has
    started, queues and Managers end before threads do, in hooks of another kind (``util.Finalize``).

    Parameters
    ----------
    backend_class : type
        The :class:`~fedexec.interface.Backend` whose module has been imported.
    """
    _drain_with_threads(backend_class)
    if multiprocessing.parent_process() is not None:
        _drain_with_children(os.getpid())


@functools.cache
def _drain_with_threads(_: type[Backend]) -> None:
    threading._register_atexit(_drain)  # type: ignore[attr-defined]


@functools.cache
def _drain_with_children(_: int) -> None:  # the key is the pid: a forked process does not have these hooks
    util.Finalize(None, _drain, exitpriority=_FIRST)


def _forget_in_child() -> None:
    """Forget the executors of the parent in a forked process, because their threads do not exist there."""
    global _lock
    _lock = threading.Lock()  # The parent may have held it when it forked.
    _schedulers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _drain() -> None:
    global _interpreter_ends
    _interpreter_ends = True
    with _lock:
        schedulers = list(_schedulers)
    for scheduler in schedulers:
        scheduler.close()
    for scheduler in schedulers:
        scheduler.join()
