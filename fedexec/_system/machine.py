"""How many cores, how much memory and how many descriptors this process may use.

Of the machine, and of the container around it.

Containers bound both by control groups, of version 1 or 2, which are read where they are mounted, and where
Linux distributions mount them. What cannot be read bounds nothing.
"""

import functools
import math
import os
import re
import signal
import sys
from collections.abc import Iterator

import psutil

if sys.platform != "win32":
    import resource

__all__ = ["SIGKILL", "available_bytes", "available_cores", "open_files", "total_bytes"]

SIGKILL: int = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has one way to end a process

TOP = "/sys/fs/cgroup"
MEMBERSHIP = "/proc/self/cgroup"
MOUNTS = "/proc/self/mountinfo"
_ESCAPED = re.compile(r"\\([0-7]{3})")  # a space, say, in the path of a mount
_DIGITS = 20  # of the largest number that the kernel writes; Python refuses to read one of thousands
UNLIMITED = 1 << 60  # bytes; version 1 writes a number near 2**63 where there is no limit


def available_cores() -> int:
    """Return how many cores this process may use, at least 1.

    The least of its CPU affinity (or ``PYTHON_CPU_COUNT``, from Python 3.13) and the quotas of its control
    groups; part of a core counts as one.
    """
    count = getattr(os, "process_cpu_count", None) or _affinity
    return max(1, min([count() or 1, *(math.ceil(quota) for quota in _cpu_quotas())]))


def total_bytes() -> int:
    """Return what this process may use of the memory: its control groups' limit, if that is less."""
    return min([_memory()[0], *(limit for limit, _ in _memory_limits())])


def available_bytes() -> int:
    """Return what can still be taken before the kernel swaps or kills."""
    free = [limit - used for limit, used in _memory_limits()]
    return max(0, min([_memory()[1], *free]))


def _memory() -> tuple[int, int]:
    """Return the machine's memory, and what of it is available: all, where nobody can tell."""
    try:
        memory = psutil.virtual_memory()
    except OSError:  # no /proc
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    return int(memory.total), int(memory.available)


def open_files(more: int) -> int | None:
    """See to it that this process may open more files; None if it may, else its limit.

    The soft limit (``ulimit -n``, often 1024) is raised as far as needed, which the hard limit allows
    everybody to do: it is there for programs that use ``select``, and hurts them only if that many files
    are in fact open. Processes that are started later inherit it.

    Parameters
    ----------
    more : int
        How many, beside those that are open now.
    """
    if sys.platform == "win32":
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _count_open_files() + more
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return None
    if hard != resource.RLIM_INFINITY and wanted > hard:
        return hard
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # macOS: no more than OPEN_MAX, whatever the hard limit says
        return soft
    return None


def _count_open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))  # noqa: PTH208
    except OSError:
        return 0


def _affinity() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_quotas() -> Iterator[float]:
    """Yield how many cores each control group may use."""
    for group in _groups("cpu"):
        quota, _, period = _read(f"{group}/cpu.max").partition(" ")
        if not period:
            quota, period = _read(f"{group}/cpu.cfs_quota_us"), _read(f"{group}/cpu.cfs_period_us")
        if _is_number(quota) and _is_number(period):
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) of each control group, without the page cache that nobody uses."""
    for group in _groups("memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _read(f"{group}/{limit}"), _read(f"{group}/{used}")
            if _is_number(most) and (now == "0" or _is_number(now)) and int(most) < UNLIMITED:
                yield int(most), int(now) - _statistic(f"{group}/memory.stat", cache)


def _statistic(path: str, name: str) -> int:
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and _is_number(value):
            return int(value)
    return 0


def _groups(controller: str) -> tuple[str, ...]:
    """Return the directories of this process's control groups, and of those above, for a controller."""
    return _find_groups(controller, TOP, MEMBERSHIP, MOUNTS)


@functools.cache
def _find_groups(controller: str, top: str, membership: str, mounts: str) -> tuple[str, ...]:
    mounted = list(_mounted(mounts))
    found: dict[str, None] = dict.fromkeys((top, f"{top}/{controller}"))
    for line in _read(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2, alone or beside version 1
            usual = [top, f"{top}/unified"]
        elif controller in controllers.split(","):
            usual = [f"{top}/{controllers}", f"{top}/{controller}"]
        else:
            continue
        kind = controller if controllers else None
        roots = dict.fromkeys(usual, "/") | {place: root for place, root, kinds in mounted if kind in kinds}
        found |= dict.fromkeys(usual)
        for place, root in roots.items():
            found |= dict.fromkeys(_from_top(place, _parts(root), _parts(path)))
    return tuple(group for group in found if os.path.isdir(group))  # noqa: PTH112


def _mounted(path: str) -> Iterator[tuple[str, str, tuple[str | None, ...]]]:
    """Yield where control groups are mounted, which group is the top one there, and for which controllers.

    None stands for version 2, where every controller is in the same place.
    """
    for line in _read(path).splitlines():
        mount, _, system = line.partition(" - ")
        kind, _, rest = system.partition(" ")
        fields = [_ESCAPED.sub(lambda code: chr(int(code[1], 8)), text) for text in mount.split(" ")]
        if kind in ("cgroup", "cgroup2") and len(fields) > 4:
            controllers = (None,) if kind == "cgroup2" else tuple(rest.rpartition(" ")[2].split(","))
            yield fields[4], fields[3], controllers


def _from_top(place: str, root: list[str], path: list[str]) -> list[str]:
    """Return the directories of the group `path`, and of those above it, where the group `root` is on top.

    A container sees its own group as the top one, and the names above it in its path or not at all.
    """
    if path[: len(root)] == root:
        below = path[len(root) :]
    elif set(root) == {".."} and path.count("..") <= len(root):
        below = []  # That group is above ours, and nobody tells the names between.
    else:
        return []
    if ".." in below:
        return []
    return ["/".join([place, *below[:depth]]) for depth in range(len(below) + 1)]


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= _DIGITS and int(text) > 0


def _read(path: str) -> str:
    try:
        # Workers ask for it, and this is cheaper than pathlib.
        with open(path, encoding="ascii", errors="surrogateescape") as file:  # noqa: PTH123
            return file.read().strip()
    except OSError:
        return ""
