"""How many cores, how much memory and how many descriptors this process may use.

The limits are those of the machine and of the container around this process. Containers limit cores and
memory by control groups, of version 1 or 2, which are read where they are mounted, and where distributions
mount them. A limit that cannot be read counts as no limit.
"""

import functools
import math
import os
import re
import signal
import sys
from collections.abc import Iterator

if sys.platform != "win32":
    import resource

__all__ = ["SIGKILL", "available_bytes", "available_cores", "open_files", "total_bytes"]

SIGKILL: int = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has only one way to end a process

TOP = "/sys/fs/cgroup"
MEMBERSHIP = "/proc/self/cgroup"
MOUNTS = "/proc/self/mountinfo"
_ESCAPED = re.compile(r"\\([0-7]{3})")  # a character in the path of a mount, for example a space
_DIGITS = 20  # of the largest number that the kernel writes; Python refuses to parse thousands of digits
UNLIMITED = 1 << 60  # bytes; version 1 writes a number near 2**63 if there is no limit


def available_cores() -> int:
    """Return how many cores this process may use, at least 1.

    This is the smallest of its CPU affinity (or ``PYTHON_CPU_COUNT``, from Python 3.13) and the CPU quotas of
    its control groups. A part of a core counts as one core.
    """
    count = getattr(os, "process_cpu_count", None) or _affinity
    return max(1, min([count() or 1, *(math.ceil(quota) for quota in _cpu_quotas())]))


def total_bytes() -> int:
    """Return how many bytes of memory this process may use: the machine's memory, or less in a container."""
    return min([_memory()[0], *(limit for limit, _ in _memory_limits())])


def available_bytes() -> int:
    """Return how many bytes of memory can still be used before the kernel swaps or kills processes."""
    free = [limit - used for limit, used in _memory_limits()]
    return max(0, min([_memory()[1], *free]))


def _memory() -> tuple[int, int]:
    """Return the total and the available memory in bytes; all is available if the system does not say."""
    total, available = (_statistic("/proc/meminfo", name) for name in ("MemTotal:", "MemAvailable:"))
    if total and available:
        return total * 1024, available * 1024
    import psutil  # only where there is no /proc: its import would take a tenth of a worker's start

    try:
        memory = psutil.virtual_memory()
    except OSError:  # Linux without /proc
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    return int(memory.total), int(memory.available)


def open_files(more: int) -> int | None:
    """Make sure that this process may open more files.

    If needed, this raises the soft limit (``ulimit -n``, often 1024), as any process may do up to the hard
    limit. The soft limit exists for programs that use ``select``, and raising it harms them only if they do
    open that many files. Processes that are started later inherit the limit.

    Parameters
    ----------
    more : int
        How many files, besides those that are open now.

    Returns
    -------
    int or None
        None if this process may open so many files; else its limit.
    """
    if sys.platform == "win32":
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _count_open_files() + more
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return None
    if hard != resource.RLIM_INFINITY and needed > hard:
        return hard
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (OSError, ValueError):  # macOS allows at most OPEN_MAX, even if the hard limit is higher
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
    """Yield how many cores each control group allows."""
    for group in _groups("cpu"):
        quota, _, period = _read(f"{group}/cpu.max").partition(" ")
        if not period:
            quota, period = _read(f"{group}/cpu.cfs_quota_us"), _read(f"{group}/cpu.cfs_period_us")
        if _is_number(quota) and _is_number(period):
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) of each control group in bytes, without page cache that is not in use."""
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
        key, value, *_ = [*line.split(), ""]
        if key == name and _is_number(value):
            return int(value)
    return 0


def _groups(controller: str) -> tuple[str, ...]:
    """Return the directories of this process's control groups and their parents, for a controller."""
    return _find_groups(controller, TOP, MEMBERSHIP, MOUNTS)


@functools.cache
def _find_groups(controller: str, top: str, membership: str, mounts: str) -> tuple[str, ...]:
    mounted = list(_mounted(mounts))
    directories: dict[str, None] = dict.fromkeys((top, f"{top}/{controller}"))
    for line in _read(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2, alone or together with version 1
            usual = [top, f"{top}/unified"]
        elif controller in controllers.split(","):
            usual = [f"{top}/{controllers}", f"{top}/{controller}"]
        else:
            continue
        kind = controller if controllers else None
        roots = dict.fromkeys(usual, "/") | {place: root for place, root, kinds in mounted if kind in kinds}
        directories |= dict.fromkeys(usual)
        for place, root in roots.items():
            directories |= dict.fromkeys(_from_top(place, _parts(root), _parts(path)))
    return tuple(directory for directory in directories if os.path.isdir(directory))  # noqa: PTH112


def _mounted(path: str) -> Iterator[tuple[str, str, tuple[str | None, ...]]]:
    """Yield (mount point, top group, controllers) of each mount of control groups.

    In version 2 all controllers have one mount; there the controllers are (None,).
    """
    for line in _read(path).splitlines():
        mount, _, system = line.partition(" - ")
        kind, _, rest = system.partition(" ")
        fields = [_ESCAPED.sub(lambda code: chr(int(code[1], 8)), text) for text in mount.split(" ")]
        if kind in ("cgroup", "cgroup2") and len(fields) > 4:
            controllers = (None,) if kind == "cgroup2" else tuple(rest.rpartition(" ")[2].split(","))
            yield fields[4], fields[3], controllers


def _from_top(place: str, root: list[str], path: list[str]) -> list[str]:
    """Return the directories of the group `path` and its parents, in a mount whose top group is `root`.

    A container sees its own group as the top group. The groups above it are part of `path`, or missing.
    """
    if path[: len(root)] == root:
        below = path[len(root) :]
    elif set(root) == {".."} and path.count("..") <= len(root):
        below = []  # the top group is a parent of our group, and the names between are unknown
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
