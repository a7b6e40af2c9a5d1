"""The end of the interpreter: what was submitted is finished before the pools below it are closed."""

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
_interpreter_ends = False
_FIRST = 1 << 30  # of multiprocessing's exit priorities; its own go up to 15


def register(scheduler: _Drainable) -> None:
    """Have a scheduler finish its tasks before the interpreter ends, for as long as it lives."""
    _schedulers.add(scheduler)


def interpreter_ends() -> bool:
    """Return whether the interpreter has begun to end."""
    return _interpreter_ends


def drain_before_exit_of(backend_class: type[Backend]) -> None:
    """Finish what was submitted before the pools that a backend is built on are closed at exit.

    concurrent.futures and loky close their pools in hooks of the same kind, last registered first; the
    backend's module has been imported by now, so this hook runs before theirs. There is no public name.
    In a process of multiprocessing queues and Managers end before threads, in hooks of another kind.
    """
    _drain_with_threads(backend_class)
    if multiprocessing.parent_process() is not None:
        _drain_with_children(os.getpid())


@functools.cache
def _drain_with_threads(_: type[Backend]) -> None:
    threading._register_atexit(_drain)  # type: ignore[attr-defined]


@functools.cache
def _drain_with_children(_: int) -> None:  # by pid: a forked process has none of these hooks yet
    util.Finalize(None, _drain, exitpriority=_FIRST)


def _forget_in_child() -> None:
    """Leave the executors of a process to it: in one that is forked from it their threads do not exist."""
    _schedulers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _drain() -> None:
    global _interpreter_ends
    _interpreter_ends = True
    schedulers = list(_schedulers)
    for scheduler in schedulers:
        scheduler.close()
    for scheduler in schedulers:
        scheduler.join()
