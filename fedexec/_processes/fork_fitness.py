"""Whether a process may be forked: what a forked child would lose, and which GPU it could not use.

The template asks this after each module that it imports and after the warm-up. A fork copies the memory of a
process but only one of its threads, so a child loses the other threads, and it cannot use a GPU whose driver
its parent has started. Threads are judged by the library that owns them. GPUs are tried in a forked child,
because no library has a flag that tells the whole truth.
"""

import contextlib
import ctypes
import gc
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

from fedexec._worker.seeding import when_imported

__all__ = ["fork", "no_torch_threads", "open_files", "show_devices", "why_unfit"]

# A joined thread stays in /proc for some microseconds; a thread that is ending needs time.
ENDING_SECONDS = 1.0
TRIAL_SECONDS = 20.0  # time that a forked child has to tell whether it can use a GPU

NATIVE_HARMLESS = {
    "jemalloc_bg_thd": "jemalloc (pyarrow, polars) returns memory in this thread and handles a fork itself",
    "polars-ooc-clea": "polars removes its spill files in this thread; before the first query there are none",
}
"""Name of a library's native thread -> why a forked child works without the thread."""

PYTHON_HARMLESS = {
    "tqdm._monitor.TMonitor": "tqdm refreshes slow bars in this thread and starts another one when needed",
}
"""Class of a Python thread -> why a forked child works without the thread."""

GPU_FILES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/render", "/dev/dxg")
"""Prefixes of the paths of GPU device files; a process that has such a file open has started a driver."""

NVML_FILES = ("/dev/nvidiactl", *(f"/dev/nvidia{number}" for number in range(64)))
"""Files that NVML opens to answer questions; CUDA opens /dev/nvidia-uvm in addition."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
_NVML, _CUDA = "libnvidia-ml.so.1", "libcuda.so.1"
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED: cuInit's error in a child of a process that used CUDA


# ---------------------------------------------------------------- the verdict


def why_unfit() -> str | None:
    """Return why a child forked from this process would work worse than a fresh process.

    Returns
    -------
    str or None
        A sentence whose subject, "it", is the module that was imported last; None if this process may be
        forked.
    """
    if files := _gpu_files():
        return f"it opened {', '.join(files)}, and a GPU's driver does not survive a fork"
    if started := _started_by_torch():
        return f"it had torch start {started}, which no process forked after that can use"
    if _may_have_touched_gpu() and (trouble := _try_in_child(_gpu_trouble)):
        return trouble
    return _lost_threads() or _shared_pools()


def why_no_child_answers() -> str | None:
    """Return why a forked child does not run (for instance because of a fork hook).

    Returns
    -------
    str or None
        A sentence; None if a forked child runs.
    """
    return _try_in_child(lambda: None)


def fork() -> int:
    """Fork without Python's warning about threads, which :func:`why_unfit` has found harmless.

    Returns
    -------
    int
        As of :func:`os.fork`: the child's pid in the parent, 0 in the child.
    """
    if not _is_multithreaded:
        return os.fork()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


# ---------------------------------------------------------------- pools

POOLS = ("concurrent.futures.process", "loky.process_executor", "joblib.externals.loky.process_executor")


def _shared_pools() -> str | None:
    """Return a complaint if there is a process pool, whose pipes all forked workers would share."""
    kinds = tuple(sys.modules[name].ProcessPoolExecutor for name in POOLS if name in sys.modules)
    if kinds and any(issubclass(type(each), kinds) and not _is_shut(each) for each in gc.get_objects()):
        return "it made a ProcessPoolExecutor, whose pipes all forked workers would share"
    return None


def _is_shut(pool: Any) -> bool:
    flags = getattr(pool, "_flags", None)  # loky's pool keeps its state there
    return bool(flags.shutdown if flags is not None else pool._shutdown_thread)


# ---------------------------------------------------------------- threads

_is_multithreaded = False


@dataclass(frozen=True, slots=True)
class _Thread:
    """A thread other than the main one; `kind` (class) and `target` are known for Python threads only."""

    name: str
    kind: str | None = None
    target: str = ""

    @property
    def is_harmless(self) -> bool:
        return (self.name in NATIVE_HARMLESS) if self.kind is None else (self.kind in PYTHON_HARMLESS)

    def __str__(self) -> str:
        if self.kind is None:
            return f"{self.name!r} of a library"
        return f"{self.name!r} ({self.target or self.kind})"


def _lost_threads() -> str | None:
    """Name the threads that a forked child would lose, after a wait for threads that are about to end."""
    global _is_multithreaded
    threads = _threads()
    deadline = time.monotonic() + ENDING_SECONDS
    restarted: set[str] = set()
    if any(not thread.is_harmless for thread in threads):
        # A pool without references ends its threads when it is collected.
        gc.collect()
        # Libraries that handle a fork either end their threads before the fork (OpenBLAS) or start them again
        # after it: the threads that a forked child has are not lost.
        restarted = set((_try_in_child(_names_of_threads) or "").splitlines())
    while lost := [each for each in threads if not each.is_harmless and each.name not in restarted]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.002)
        threads = _threads()
    _is_multithreaded = bool(threads)
    if not lost:
        return None
    names = ", ".join(dict.fromkeys(map(str, lost)))
    return f"it left {len(lost)} thread(s) running, which a forked worker would lose: {names}"


def _names_of_threads() -> str:
    """Return the names of this process's native threads, one per line."""
    return "\n".join(thread.name for thread in _threads() if thread.kind is None)


def _threads() -> list[_Thread]:
    """Return every thread of this process except the main one."""
    known = {thread.native_id: _describe_python_thread(thread) for thread in threading.enumerate()}
    main = threading.main_thread().native_id
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return [thread for number, thread in known.items() if number != main]
    found = []
    for task in tasks.iterdir():
        number = int(task.name)
        if number not in (main, os.getpid()):
            with contextlib.suppress(OSError):  # The thread has ended since it was listed.
                found.append(known.get(number) or _Thread((task / "comm").read_text().rstrip("\n")))
    return found


def _describe_python_thread(thread: threading.Thread) -> _Thread:
    # Python has no public name for the function that a thread runs.
    target = getattr(thread, "_target", None)
    where = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}" if target else ""
    return _Thread(thread.name, f"{type(thread).__module__}.{type(thread).__qualname__}", where)


# ---------------------------------------------------------------- GPUs


@contextlib.contextmanager
def no_torch_threads() -> Iterator[None]:
    """Let imports set torch's number of threads without starting a thread, which a fork would lose.

    The first call of `torch.set_num_threads` sizes the pool of XNNPACK, which starts its threads at once. So
    the first call asks for one thread, before an import can ask for more. torch's other pools start their
    threads only when they compute.
    """

    def set_one_thread(torch: ModuleType) -> None:
        if hasattr(torch, "set_num_threads"):
            torch.set_num_threads(1)

    with when_imported({"torch": set_one_thread}):
        yield


def show_devices() -> Callable[[], None]:
    """Set which GPUs this process sees while it imports modules of other authors.

    torch must ask NVML for the GPUs and not CUDA, because no forked child could use CUDA afterwards. torch
    cannot ask NVML for MIG instances, so GPU 0 is shown instead. If there is no GPU, torch must not look for
    one, because torch would then refuse to compute on any.

    Returns
    -------
    callable
        Restores the variables to the values that the workers are to see.
    """
    os.environ.setdefault(ASK_NVML, "1")
    before = os.environ.get(VISIBLE)
    if not _may_have_gpu():
        shown = ""
    elif before is not None and before.strip().startswith("MIG-"):
        shown = "0"
    else:
        return lambda: None
    os.environ[VISIBLE] = shown

    def restore() -> None:
        if os.environ.get(VISIBLE) != shown:
            return  # A module has set the variable itself, and its choice stays.
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before

    return restore


def _may_have_gpu() -> bool:
    """Return whether this machine may have a GPU that torch calls "cuda"."""
    if any(Path("/dev").glob("nvidia*")) or any(os.path.exists(f"/dev/{name}") for name in ("kfd", "dxg")):  # noqa: PTH110
        return True
    if any(Path("/dev").glob("nvhost-*gpu*")) or any(Path("/dev").glob("nvgpu*")):  # Jetson
        return True
    count = ctypes.c_uint(0)
    try:
        nvml = ctypes.CDLL(_NVML)
        if nvml.nvmlInit_v2() != 0:
            return False
        try:
            nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return False
    return count.value > 0


def _started_by_torch() -> str | None:
    """Return the kind of GPU ("cuda" or "xpu") that torch has initialized in this process."""
    torch = sys.modules.get("torch")
    for name in ("cuda", "xpu"):
        is_initialized = getattr(getattr(torch, name, None), "is_initialized", None)
        if is_initialized is not None and is_initialized():
            return name
    return None


def _may_have_touched_gpu() -> bool:
    return "torch" in sys.modules or _is_mapped("libcuda.so")


def _gpu_trouble() -> str | None:
    """Return why this process, a forked child, cannot use a GPU."""
    torch = sys.modules.get("torch")
    for name, is_there in (("cuda", _may_have_gpu), ("xpu", lambda: any(Path("/dev/dri").glob("render*")))):
        is_in_bad_fork = getattr(getattr(torch, name, None), "_is_in_bad_fork", None)
        if is_in_bad_fork is not None and is_in_bad_fork() and is_there():
            return (
                f"it had torch start {name}, so torch refuses {name} in every process forked after that "
                "(a step of Adam on the CPU and pin_memory do it, too)"
            )
    if _is_mapped("libcuda.so"):
        try:
            refused = ctypes.CDLL(_CUDA).cuInit(0) == _NOT_INITIALIZED
        except (OSError, AttributeError):
            refused = False
        if refused:
            return "it started CUDA's driver, which refuses every process forked after that"
    return None


def _gpu_files() -> list[str]:
    """Return the open files of GPUs, without those that NVML needs to answer questions."""
    with _nvml_closed() as was_in_use:
        files = _open_gpu_files()
        if was_in_use and not _is_mapped("libcuda.so"):
            files = [file for file in files if file not in NVML_FILES]
    return files


def _open_gpu_files() -> list[str]:
    return sorted(file for file in open_files() if file.startswith(GPU_FILES))


def open_files() -> set[str]:
    """Return the targets of this process's open descriptors, as /proc names them.

    Returns
    -------
    set of str
        Paths, or names such as ``socket:[123]``; empty where /proc is missing.
    """
    targets = set()
    with contextlib.suppress(OSError):
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # The descriptor was closed after it was listed.
                targets.add(str(descriptor.readlink()))
    return targets


@contextlib.contextmanager
def _nvml_closed() -> Iterator[bool]:
    """Close NVML's files for a moment, invisibly to users of pynvml; yield whether NVML was in use."""
    if not _open_gpu_files() or not _is_mapped("libnvidia-ml.so"):
        yield False
        return
    nvml = ctypes.CDLL(_NVML)
    was_in_use = False
    while nvml.nvmlShutdown() == 0:  # NVML counts its users; torch never shuts NVML down.
        was_in_use = True
    try:
        yield was_in_use
    finally:
        for _ in range(getattr(sys.modules.get("pynvml"), "_nvmlLib_refcount", 0)):
            nvml.nvmlInit_v2()


def _is_mapped(library: str) -> bool:
    try:
        return library in Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return False


# ---------------------------------------------------------------- trying


def _try_in_child(check: Callable[[], str | None]) -> str | None:
    """Run a check in a forked child; return the child's answer, or why the child did not answer."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # It warns about threads, which `_lost_threads` judges.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _answer_and_end(check, writing)
    os.close(writing)
    try:
        ready = wait([reading], TRIAL_SECONDS)  # `select.select` refuses descriptors above 1,023
        answer = os.read(reading, 1 << 16) if ready else b""
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
        _, status = os.waitpid(pid, 0)
    if not ready:
        return f"a process forked after it did not answer within {TRIAL_SECONDS:g} s"
    if not answer:
        return f"a process forked after it ended with {os.waitstatus_to_exitcode(status)}"
    return answer[1:].decode() or None


def _answer_and_end(check: Callable[[], str | None], writing: int) -> None:
    try:
        answer = check() or ""
    except BaseException as exc:
        answer = f"a process forked after it fails: {exc!r}"
    with contextlib.suppress(OSError):
        os.write(writing, b"+" + answer.encode())
    os._exit(0)
