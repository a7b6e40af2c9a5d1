"""The executor a user holds: the same on every backend. Where a task runs is the backend's business."""

import concurrent.futures
import copy
import functools
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from fedexec import registry
from fedexec.errors import SettingsError
from fedexec.interface import Capability, Hooks, Task, function_name, once
from fedexec.machine import open_files
from fedexec.memory.admission import Admission, Footprint, ceiling
from fedexec.memory.device import devices, is_emulated
from fedexec.scheduler import Future, Scheduler, Stats, drain_before_exit_of
from fedexec.seeding import call_seeded
from fedexec.settings import Settings, resolve

__all__ = ["Executor", "create_executor"]

log = logging.getLogger("fedexec")
T = TypeVar("T")


def create_executor(
    backend: str | None = None,
    *,
    max_workers: int | str | None = None,
    start_method: str | None = None,
    preload: Sequence[str] = (),
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
    timeout: float | None = None,
    retries: int | None = None,
    memory_limit: int | str | None = None,
    device_memory_limit: int | str | None = None,
    enforce_limits: bool | None = None,
    device: str | None = None,
    threads_per_worker: int | None = None,
    warmup: Callable[[], object] | None = None,
    max_tasks_per_child: int | None = None,
    standby: int | None = None,
    shared_memory: bool | None = None,
    preload_timeout: float | None = None,
    log_level: str | None = None,
    learn: bool | None = None,
    seed: int | None = None,
) -> "Executor":
    """Create an executor. What is not given is read from the environment (``FEDEXEC_BACKEND``, ...).

    Parameters
    ----------
    backend : str, optional
        A name that :func:`fedexec.backends` lists. Default: "standby" where fork is safe, else "process".
    max_workers : int or "auto", optional
        How many tasks run at once. Default: the cores this process may use. "auto": as many as memory allows,
        the host's and the devices'; see :mod:`fedexec.memory.admission`.
    start_method : {"forkserver", "spawn"}, optional
        How worker processes start. Neither imports the caller's ``__main__`` again.
    preload : sequence of str, optional
        Modules a worker has imported before its first task; with forkserver, once for all workers.
    initializer, initargs : callable and tuple, optional
        Called in every worker before its first task. If it raises, the executor is broken.
    timeout : float, optional
        Seconds a task may take; then its worker is ended. Default: no limit.
    retries : int, optional
        How often a task is run again when its *worker* died. Default 0.
    memory_limit, device_memory_limit : int or str, optional
        ``"512MiB"``; a reused worker that holds more of the host's, or of a device's, memory after a task is
        replaced.
    enforce_limits : bool, optional
        End a task that exceeds one of these limits while it *runs* (WorkerMemoryError). Default: no.
    device : str, optional
        The devices to use, as :func:`fedexec.memory.device.devices` reads it. Default: all that are visible.
    threads_per_worker : int, optional
        Default: ``cores // max_workers``, at least 1.
    warmup : callable, optional
        Called once, after the preload, in the process that workers are forked from: what it imports, loads
        and caches every worker has. What it does must survive a fork: where it leaves a thread that a worker
        would miss, or starts CUDA (see :func:`fedexec.memory.device.hidden`), workers start as fresh
        interpreters instead, without it.
    max_tasks_per_child : int, optional
        How many tasks a worker of ``standby`` runs before it ends. Default 1.
    standby : int, optional
        How many workers of ``standby`` wait ahead of need. Default: `max_workers`.
    shared_memory : bool, optional
        Large arrays go through shared memory. Default: yes, but on ``process``.
    preload_timeout : float, optional
        Seconds that the preload and the warm-up may take. Default 120.
    log_level : str, optional
        Level of the logger ``fedexec``.
    learn : bool, optional
        Where workers are forked, later ones are born with the modules of installed packages that tasks have
        imported; see :mod:`fedexec.learning`. Default: yes.
    seed : int, optional
        At least 0. Each task's global generators (:mod:`random`, numpy, torch) follow from it and from how
        many tasks were submitted before, the same on every isolating backend. Default: those of different
        tasks are independent.

    Returns
    -------
    Executor

    Raises
    ------
    SettingsError
        A value makes no sense (a ValueError).
    UnknownBackendError
        No such backend; names those that exist.
    DeviceError
        No such device; names those that exist.
    BackendUnavailableError
        Its package is missing; says how to install it.
    PreloadError
        A module of `preload` cannot be imported.
    """
    settings = resolve(
        {
            "backend": backend,
            "max_workers": max_workers,
            "start_method": start_method,
            "preload": (preload,) if isinstance(preload, str) else tuple(preload),
            "timeout": timeout,
            "retries": retries,
            "memory_limit": memory_limit,
            "device_memory_limit": device_memory_limit,
            "enforce_limits": enforce_limits,
            "device": device,
            "threads_per_worker": threads_per_worker,
            "max_tasks_per_child": max_tasks_per_child,
            "standby": standby,
            "shared_memory": shared_memory,
            "preload_timeout": preload_timeout,
            "log_level": log_level,
            "learn": learn,
            "seed": seed,
        }
    )
    return Executor(settings, Hooks(initializer, initargs, warmup))


SPARE_DESCRIPTORS = 128  # beside those of workers: of results that are kept, and the caller's own

_NOT_KEPT = "backend %s cannot keep %s: it is not enforced"
_NEEDS = {  # setting -> the promises of which one must be made for it to hold
    "timeout": Capability.KILLS_ONE,
    "memory_limit": Capability.RECYCLES | Capability.FRESH_PROCESS,
    "device_memory_limit": Capability.RECYCLES | Capability.FRESH_PROCESS,
    "enforce_limits": Capability.KILLS_ONE,
    "max_tasks_per_child": Capability.STANDS_BY,
    "standby": Capability.STANDS_BY,
    "shared_memory": Capability.SHARES_MEMORY,
    "seed": Capability.ISOLATED,
}


class Executor(concurrent.futures.Executor):
    """Runs tasks where its backend says; everything else is :class:`concurrent.futures.Executor`.

    Parameters
    ----------
    settings : Settings
        Resolved settings; :func:`create_executor` makes them.
    hooks : Hooks, optional
        The caller's own functions: initializer and warm-up.

    Attributes
    ----------
    settings : Settings
    devices : tuple of Device
        What tasks may compute on, beside the CPU; where they run in this process, its first.
    capabilities : Capability
    """

    def __init__(self, settings: Settings, hooks: Hooks | None = None) -> None:
        hooks = hooks or Hooks()
        for name in ("initializer", "warmup"):
            if getattr(hooks, name) is not None and not callable(getattr(hooks, name)):
                raise TypeError(f"{name} must be a callable")
        backend_class = registry.load(settings.backend)
        drain_before_exit_of(backend_class)
        _configure_logging(settings)
        self._tag: str | None = None
        self._whole: Executor | None = None  # of which this is a view, and which lives as long as it
        self.devices = devices(settings.device)
        if Capability.ISOLATED not in backend_class.capabilities:
            self.devices = self.devices[:1]  # all tasks share this process, and its device
        if settings.device and self.devices and not is_emulated(settings.device):
            # By UUID: that is what workers are told, whatever an index means to them.
            settings = replace(settings, device=",".join(device.uuid for device in self.devices))
        settings = self.settings = replace(settings, max_workers=ceiling(settings, self.devices))
        _open_files(settings, backend_class.descriptors_per_worker)
        backend = backend_class(settings, hooks)
        self.capabilities = backend.capabilities
        admission = Admission(settings, self.devices, fresh=Capability.FRESH_PROCESS in self.capabilities)
        try:
            backend.start()
        except BaseException:
            backend.shutdown()
            raise
        log.info("%s", settings)
        for field, promise in _NEEDS.items():
            if settings.sources.get(field, "default") != "default" and not self.capabilities & promise:
                log.warning(_NOT_KEPT, settings.backend, field)
        self._scheduler = Scheduler(backend, settings, admission, self.devices)
        # An executor nobody holds any more finishes what it was given, then ends.
        weakref.finalize(self, self._scheduler.close).atexit = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Schedule ``fn(*args, **kwargs)``; see :meth:`concurrent.futures.Executor.submit`.

        Returns
        -------
        Future
            With `usage`, once it is done. An argument that does not pickle shows up here too.

        Raises
        ------
        RuntimeError
            After shutdown.
        BrokenProcessPool
            After an initializer or a preload failed.
        """
        settings = self.settings
        return self._scheduler.submit(
            Task(fn, args, kwargs, timeout=settings.timeout, retries=settings.retries, tag=self._tag)
        )

    def with_options(
        self, *, timeout: float | None = None, retries: int | None = None, tag: str | None = None
    ) -> "Executor":
        """Return a view of this executor whose tasks have options of their own; all else they share.

        ``executor.with_options(timeout=60, tag="client 7").submit(fit, weights)``

        Parameters
        ----------
        timeout : float, optional
            Seconds that a task may take, from its start; ``math.inf`` for no limit. Default: as it is here.
        retries : int, optional
            How often a task runs again when its worker died; never, if :func:`fedexec.once` says so.
            Default: as it is here.
        tag : str, optional
            What messages and errors call the task besides its function's name. Default: as it is here.

        Raises
        ------
        SettingsError
            A value makes no sense.
        """
        view = copy.copy(self)
        view._whole = self
        if timeout is not None:
            limit = None if timeout == math.inf else resolve({"timeout": timeout}, environ={}).timeout
            view.settings = replace(view.settings, timeout=limit)
            if limit is not None and Capability.KILLS_ONE not in self.capabilities:
                log.warning(_NOT_KEPT, self.settings.backend, "timeout")
        if retries is not None:
            number = resolve({"retries": retries}, environ={}).retries
            view.settings = replace(view.settings, retries=number)
        if tag is not None:
            view._tag = tag
        return view

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[T]:
        """Apply `fn` to each item; see :meth:`concurrent.futures.Executor.map`.

        Parameters
        ----------
        timeout : float, optional
            Seconds from this call; then ``next`` raises TimeoutError.
        chunksize : int, optional
            Items per task.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout)
        call_each = functools.partial(_call_each, fn)
        chunks = super().map(
            call_each if Task(fn, (), {}).repeatable else once(call_each),
            _chunks(zip(*iterables, strict=False), chunksize),
            timeout=timeout,
        )
        return _flatten(chunks)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks and, once the rest is done, give everything back.

        Parameters
        ----------
        wait : bool
            Return only when no process is left; else this happens behind the caller's back.
        cancel_futures : bool
            Cancel what has not started.
        """
        self._scheduler.close(cancel_futures=cancel_futures)
        if wait:
            self._scheduler.join()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Leave a ``with`` block: :meth:`shutdown`; after Ctrl+C, :meth:`kill_workers`: nobody waits."""
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            self.kill_workers()
        else:
            self.shutdown()

    def kill_workers(self) -> None:
        """Shut down at once: cancel what waits, end the workers of what runs (WorkerDiedError)."""
        self._scheduler.close(cancel_futures=True, kill=True)
        self._scheduler.join()

    def end(self, future: concurrent.futures.Future[Any]) -> None:
        """End one task: cancel it if it waits, end its worker if it runs (WorkerDiedError).

        A running task of a backend without :attr:`Capability.KILLS_ONE` goes on.
        """
        self._scheduler.end(future)

    def rehearse(self, fn: Callable[..., object], /, *args: Any, **kwargs: Any) -> bool:
        """Make a call once, and have every later worker find in memory what it has left there.

        For code that keeps something costly in a module once it has it, such as a data set: a fresh process
        would fill that cache for every task. The call is made in a process that workers are forked from, on
        the CPU, and its result is thrown away. What it has written to files stays. What it leaves in memory,
        all later tasks see, as if each had made the call before: this is no place for what is to differ from
        task to task. Random generators are seeded for each task, as ever. The same call is made once.

        Parameters
        ----------
        fn, args, kwargs
            As for :meth:`submit`. It may take ``preload_timeout`` seconds.

        Returns
        -------
        bool
            Whether later workers inherit it. If the call makes that process unfit to be forked (it starts a
            GPU, or leaves a thread, a process or a connection), if it leaves what workers would share (a
            file that is open for reading, a lock), or workers are fresh interpreters, nothing changes, and a
            warning says why. On ``inline`` nothing is done: tasks share their memory.

        Raises
        ------
        PreloadError
            The call has raised; carries its traceback.
        RuntimeError
            After a shutdown.
        """
        name = function_name(fn)
        if name.startswith("__main__.") and Capability.ISOLATED in self.capabilities:
            log.warning(
                "%s is of the script itself: what it leaves in the script's own variables is not inherited; "
                "keep that in a module", name,
            )  # fmt: skip
        call = functools.partial(fn, *args, **kwargs)
        if self.settings.seed is not None:
            call = functools.partial(call_seeded, self.settings.seed, call)
        reason = self._scheduler.rehearse(call, name)
        if reason is not None:
            log.warning("workers do not inherit what %s leaves in memory: %s", name, reason)
        return reason is None

    def stats(self) -> Stats:
        """Return what has been done so far."""
        return self._scheduler.stats()

    def running(self) -> list[Task]:
        """Return the tasks that run now; their ``pid`` is None while it is not known."""
        return self._scheduler.running()

    def footprints(self) -> dict[str, Footprint]:
        """Return what each kind of task takes, as far as ``max_workers="auto"`` has measured it."""
        return self._scheduler.footprints()


def _open_files(settings: Settings, per_worker: int) -> None:
    """Raise SettingsError if so many workers need more descriptors than this process may have."""
    needed = max(settings.max_workers, settings.standby) * per_worker
    needed += SPARE_DESCRIPTORS if per_worker else 0
    limit = open_files(needed)
    if limit is not None:
        raise SettingsError(
            f"max_workers={settings.max_workers} needs up to {needed} file descriptors on backend "
            f"{settings.backend!r} ({per_worker} for each worker), and this process may have {limit} "
            f"(ulimit -Hn): lower max_workers, raise the limit, or take a backend that needs fewer"
        )


def _call_each(fn: Callable[..., T], chunk: Sequence[tuple[Any, ...]]) -> list[T]:
    return [fn(*args) for args in chunk]


def _chunks(items: Iterator[Any], size: int) -> Iterator[tuple[Any, ...]]:
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk


def _flatten(lists: Iterator[list[T]]) -> Iterator[T]:
    """Yield each element of each list, keeping no reference to what was yielded."""
    for elements in lists:
        elements.reverse()
        while elements:
            yield elements.pop()


def _configure_logging(settings: Settings) -> None:
    if settings.log_level is None:
        return
    log.setLevel(settings.log_level)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
