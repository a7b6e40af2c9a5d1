"""Counts of what an executor may leave behind: processes, descriptors, threads, files, semaphores."""

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedexec._system.leftovers import mapped_shared_memory, shared_memory

__all__ = ["HeldResources", "living", "memory_of", "new_children", "still_named"]


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def new_children(before: Iterable[psutil.Process] = ()) -> set[psutil.Process]:
    """Return the living descendants of this process, without resource trackers and those in `before`."""
    children = living(psutil.Process().children(recursive=True))
    return {child for child in children - set(before) if not _is_tracker(child)}


def living(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Return the processes that have not ended; a process that has not been reaped counts as ended."""
    alive = set()
    for process in processes:
        try:
            if process.is_running() and (
                process.status() != psutil.STATUS_ZOMBIE or _has_living_threads(process.pid)
            ):
                alive.add(process)
        except psutil.NoSuchProcess:
            pass
    return alive


def _has_living_threads(zombie: int) -> bool:
    try:
        return len(list(Path(f"/proc/{zombie}/task").iterdir())) > 1
    except OSError:  # It is reaped, or there is no /proc.
        return False


def memory_of(processes: Iterable[psutil.Process]) -> set[int]:
    """Return the inodes of the semaphores and shared memory that these processes have mapped."""
    return {inode for process in processes for inode in mapped_shared_memory(process.pid)}


def still_named(inodes: set[int]) -> set[Path]:
    """Return the semaphores and segments among `inodes` that still have a name, and so stay for ever."""
    named = set()
    for path in shared_memory():
        try:
            if path.stat().st_ino in inodes:
                named.add(path)
        except FileNotFoundError:
            pass
    return named


def _descriptors() -> Iterator[str]:
    """Yield number and target of each open descriptor; only Linux gives the target a name."""
    directory = Path("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")
    for entry in list(directory.iterdir()):
        try:
            target = entry.readlink() if sys.platform == "linux" else os.fstat(int(entry.name)).st_ino
            yield f"{entry.name} -> {target}"
        except OSError:
            pass  # the descriptor that lists the directory


@dataclass(frozen=True)
class HeldResources:
    """What this process holds.

    Attributes
    ----------
    children : frozenset of psutil.Process
    descriptors : frozenset of str
        Number and target of every open file descriptor.
    threads : frozenset of str
        Name and identifier of every thread.
    shared : frozenset of int
        Inodes of the semaphores and shared memory that are mapped.
    files : frozenset of str
        Files in the temporary directory.
    """

    children: frozenset[psutil.Process]
    descriptors: frozenset[str]
    threads: frozenset[str]
    shared: frozenset[int]
    files: frozenset[str]

    @classmethod
    def now(cls, temp: Path) -> "HeldResources":
        """Measure this process and the temporary directory `temp`."""
        return cls(
            frozenset(new_children()),
            frozenset(_descriptors()),
            frozenset(f"{thread.name} {thread.ident}" for thread in threading.enumerate()),
            frozenset(mapped_shared_memory(os.getpid())),
            frozenset(str(path) for path in temp.rglob("*")),
        )

    def growth(self, before: "HeldResources") -> dict[str, list[str]]:
        """Return what this process holds in addition to `before`."""
        grown = {}
        for field in ("children", "descriptors", "threads", "shared", "files"):
            if more := getattr(self, field) - getattr(before, field):
                grown[field] = sorted(map(str, more))
        return grown
