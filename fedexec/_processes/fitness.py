"""Whether a process is fit to be forked: what its children would lose, and what they could not use.

The template asks after each module that it imports and after the warm-up. A fork copies the memory of a
process and one of its threads. So a child loses the other threads, and it cannot use a GPU whose driver its
parent has started. Threads are judged by whose they are; the GPU is tried in a forked child, because no flag
of a library tells the whole truth.
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
from typing import Any

from fedexec._worker.seeding import when_imported

__all__ = ["fork", "no_torch_threads", "open_files", "show_devices", "why_unfit"]

ENDING_SECONDS = 1.0  # A joined thread stays in /proc for some microseconds; one that ends needs its time.
TRIAL_SECONDS = 20.0  # in which a forked child tells whether it could use a GPU

NATIVE_HARMLESS = {
    "jemalloc_bg_thd": "jemalloc (pyarrow, polars) gives memory back in it, and handles a fork itself",
    "polars-ooc-clea": "polars removes its spill files in it, and has none before its first query",
}
"""Name of a thread of a library -> why a forked child does well without it."""

PYTHON_HARMLESS = {
    "tqdm._monitor.TMonitor": "tqdm refreshes slow progress bars in it, and starts another one when needed",
}
"""Class of a Python thread -> why a forked child does well without it."""

GPU_FILES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/render", "/dev/dxg")
"""How the files of GPUs begin; whoever has one open has started a driver."""

NVML_FILES = ("/dev/nvidiactl", *(f"/dev/nvidia{number}" for number in range(64)))
"""What NVML opens to answer questions; CUDA opens /dev/nvidia-uvm beside them."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
_NVML, _CUDA = "libnvidia-ml.so.1", "libcuda.so.1"
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED: what cuInit says in a child of a process that used CUDA


# ---------------------------------------------------------------- the verdict


def why_unfit() -> str | None:
    """Return why a child forked from this process would be worse off than a fresh process; None if it is not.

    Returns
    -------
    str or None
        A sentence whose subject, "it", is the module that was imported last.
    """
    if files := _gpu_files():
        return f"it opened {', '.join(files)}, and a GPU's driver does not survive a fork"
    if started := _started_by_torch():
        return f"it had torch start {started}, which no process forked after that can use"
    if _may_have_touched_gpu() and (trouble := _try_in_child(_gpu_trouble)):
        return trouble
    return _lost_threads() or _shared_pools()


def why_no_child_answers() -> str | None:
    """Return why a child of this process does not simply run (a hook may stop it); None if it does."""
    return _try_in_child(lambda: None)


def fork() -> int:
    """Fork, without Python's warning about threads that :func:`why_unfit` has found harmless."""
    if not _is_multithreaded:
        return os.fork()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


# ---------------------------------------------------------------- pools

POOLS = ("concurrent.futures.process", "loky.process_executor", "joblib.externals.loky.process_executor")


def _shared_pools() -> str | None:
    """Tell of pools of processes that have started none yet: their pipes are there, for one process."""
    kinds = tuple(sys.modules[name].ProcessPoolExecutor for name in POOLS if name in sys.modules)
    if kinds and any(issubclass(type(each), kinds) and not _is_shut(each) for each in gc.get_objects()):
        return "it made a ProcessPoolExecutor, whose pipes all forked workers would share"
    return None


def _is_shut(pool: Any) -> bool:
    flags = getattr(pool, "_flags", None)  # of loky's
    return bool(flags.shutdown if flags is not None else pool._shutdown_thread)


# ---------------------------------------------------------------- threads

_is_multithreaded = False


@dataclass(frozen=True, slots=True)
class _Thread:
    """A thread beside the main one: its name, and the class and target of one that Python knows."""

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
    """Name the threads that a forked child would miss, once those that are about to end have ended."""
    global _is_multithreaded
    threads = _threads()
    deadline = time.monotonic() + ENDING_SECONDS
    restarted: set[str] = set()
    if any(not thread.is_harmless for thread in threads):
        gc.collect()  # A pool that nobody holds ends its threads when it is collected.
        # Libraries that handle a fork end their threads before it (OpenBLAS) or start them anew after it.
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
    """Return the names of this process's native threads, a line each."""
    return "\n".join(thread.name for thread in _threads() if thread.kind is None)


def _threads() -> list[_Thread]:
    """Return every thread of this process but the main one."""
    known = {thread.native_id: _python_thread(thread) for thread in threading.enumerate()}
    main = threading.main_thread().native_id
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return [thread for number, thread in known.items() if number != main]
    found = []
    for task in tasks.iterdir():
        number = int(task.name)
        if number not in (main, os.getpid()):
            with contextlib.suppress(OSError):  # It has ended since it was listed.
                found.append(known.get(number) or _Thread((task / "comm").read_text().rstrip("\n")))
    return found


def _python_thread(thread: threading.Thread) -> _Thread:
    target = getattr(thread, "_target", None)  # Python tells no one what a thread runs.
    where = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}" if target else ""
    return _Thread(thread.name, f"{type(thread).__module__}.{type(thread).__qualname__}", where)


# ---------------------------------------------------------------- GPUs


@contextlib.contextmanager
def no_torch_threads() -> Iterator[None]:
    """Have imports tell torch a number of threads without starting one, which a fork would lose.

    The first number that torch is told is that of a pool for XNNPACK, which it fills at once. Those for all
    else it fills when it computes.
    """

    def tell_one(torch: Any) -> None:
        if hasattr(torch, "set_num_threads"):
            torch.set_num_threads(1)

    with when_imported({"torch": tell_one}):
        yield


def show_devices() -> Callable[[], None]:
    """Arrange what this process sees of the GPUs while it imports other people's modules.

    torch is to ask NVML for them and not CUDA, which no forked child could use afterwards. torch does not
    know how to ask NVML for MIG instances: one GPU stands for them meanwhile. Where there is no GPU, torch is
    spared to look for one, after which it would refuse to compute on any.

    Returns
    -------
    callable
        Puts the variables back as the workers are to see them.
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

    def put_back() -> None:
        if os.environ.get(VISIBLE) != shown:
            return  # A module has chosen for itself.
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before

    return put_back


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
    torch: Any = sys.modules.get("torch")
    for name in ("cuda", "xpu"):
        is_initialized = getattr(getattr(torch, name, None), "is_initialized", None)
        if is_initialized is not None and is_initialized():
            return name
    return None


def _may_have_touched_gpu() -> bool:
    return "torch" in sys.modules or _is_mapped("libcuda.so")


def _gpu_trouble() -> str | None:
    """Say what this process, a forked child, cannot do with a GPU."""
    torch: Any = sys.modules.get("torch")
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
    """Return the files of GPUs that are open here, but for those that NVML needs to answer questions."""
    with _nvml_put_aside() as was_in_use:
        found = _open_gpu_files()
        if was_in_use and not _is_mapped("libcuda.so"):
            found = [file for file in found if file not in NVML_FILES]
    return found


def _open_gpu_files() -> list[str]:
    return sorted(file for file in open_files() if file.startswith(GPU_FILES))


def open_files() -> set[str]:
    """Return what the descriptors of this process lead to, as Linux names it."""
    found = set()
    with contextlib.suppress(OSError):
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # It was closed since it was listed.
                found.add(str(descriptor.readlink()))
    return found


@contextlib.contextmanager
def _nvml_put_aside() -> Iterator[bool]:
    """Have NVML close its files for a moment, unnoticed by users of pynvml; yield whether it was in use."""
    if not _open_gpu_files() or not _is_mapped("libnvidia-ml.so"):
        yield False
        return
    nvml = ctypes.CDLL(_NVML)
    was_in_use = False
    while nvml.nvmlShutdown() == 0:  # It counts who has started it; torch never shuts it down.
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
    """Run a check in a forked child; return what it says, or how it failed to say anything."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads, which are judged elsewhere
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
