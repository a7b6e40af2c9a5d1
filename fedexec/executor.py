"""The executor a user holds: the same on every backend. Where a task runs is the backend's business."""

import concurrent.futures
import copy
import functools
import itertools
import logging
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from fedexec import _registry
from fedexec._scheduling.admission import Admission, Footprint, ceiling
from fedexec._scheduling.exit_hooks import drain_before_exit_of
from fedexec._scheduling.futures import Future, Stats
from fedexec._scheduling.scheduler import Scheduler
from fedexec._scheduling.settings_checks import (
    NOT_KEPT,
    chosen_devices,
    require_open_files,
    warn_of_no_effect,
)
from fedexec._worker.seeding import call_seeded
from fedexec.devices.device import is_emulated
from fedexec.interface import Capability, Hooks, Task, function_name, once
from fedexec.settings import Settings, options, resolve

__all__ = ["Executor", "create_executor"]

log = logging.getLogger("fedexec")
T = TypeVar("T")


def create_executor(
    backend: str | None = None,
    *,
    max_workers: int | str | None = None,
    start_method: str | None = None,
    preload: str | Sequence[str] = (),
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
    backend, max_workers, start_method, preload, timeout, retries, memory_limit, device_memory_limit, \
    enforce_limits, device, threads_per_worker, max_tasks_per_child, standby, shared_memory, \
    preload_timeout, log_level, learn, seed : optional
        The settings; :class:`fedexec.Settings` says of each what it means and what its default is. Sizes are
        bytes, or text such as ``"512MiB"``; times are seconds. `preload` takes one name or several.
    initializer, initargs : callable and tuple, optional
        Called in every worker before its first task. If it raises, the executor is broken.
    warmup : callable, optional
        Called once, after the preload, in the process that workers are forked from: what it imports, loads
        and caches every worker has. What it does must survive a fork: where it leaves a thread that a worker
        would miss, or starts CUDA (see :func:`fedexec.devices.hidden`), workers start as fresh interpreters
        instead, without it.

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
    given = locals()  # the arguments: a setting that the signature lacks fails here
    return Executor(
        resolve({option.name: given[option.name] for option in options()}),
        Hooks(initializer, initargs, warmup),
    )


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
        backend_class = _registry.load_chosen(settings)
        drain_before_exit_of(backend_class)
        _configure_logging(settings)
        self._tag: str | None = None
        self._whole: Executor | None = None  # of which this is a view, and which lives as long as it
        self.devices = chosen_devices(settings)
        if Capability.ISOLATED not in backend_class.capabilities:
            self.devices = self.devices[:1]  # all tasks share this process, and its device
        if settings.device and self.devices and not is_emulated(settings.device):
            # By UUID: that is what workers are told, whatever an index means to them.
            settings = replace(settings, device=",".join(device.uuid for device in self.devices))
        settings = self.settings = replace(settings, max_workers=ceiling(settings, self.devices))
        require_open_files(settings, backend_class.descriptors_per_worker)
        backend = backend_class(settings, hooks)
        self.capabilities = backend.capabilities
        admission = Admission(settings, self.devices, fresh=Capability.FRESH_PROCESS in self.capabilities)
        try:
            backend.start()
        except BaseException:
            backend.shutdown()
            raise
        log.info("%s", settings)
        warn_of_no_effect(settings, self.capabilities)
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
                log.warning(NOT_KEPT, self.settings.backend, "timeout")
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
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Apply `fn` to each item; see :meth:`concurrent.futures.Executor.map`.

        Parameters
        ----------
        timeout : float, optional
            Seconds from this call; then ``next`` raises TimeoutError.
        chunksize : int, optional
            Items per task.
        buffersize : int, optional
            Tasks that are submitted ahead of the result that is asked for, as in Python 3.14. Default: all.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        if chunksize == 1:
            return self._map(fn, iterables, timeout, buffersize)
        call_each = functools.partial(_call_each, fn)
        chunks = self._map(
            call_each if Task(fn, (), {}).repeatable else once(call_each),
            (_chunks(zip(*iterables, strict=False), chunksize),),
            timeout,
            buffersize,
        )
        return _flatten(chunks)

    def _map(
        self,
        fn: Callable[..., T],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        buffersize: int | None,
    ) -> Iterator[T]:
        if buffersize is None:
            return super().map(fn, *iterables, timeout=timeout)
        end = math.inf if timeout is None else time.monotonic() + timeout
        futures = (self.submit(fn, *args) for args in zip(*iterables, strict=False))
        return _buffered(futures, deque(itertools.islice(futures, buffersize)), end)

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


def _buffered(futures: Iterator[Future[T]], submitted: deque[Future[T]], end: float) -> Iterator[T]:
    """Yield each result in turn, keeping no reference to it; before each, submit one more task."""
    try:
        while submitted:
            submitted.extend(itertools.islice(futures, 1))
            yield _result(submitted, end)
    finally:
        for future in submitted:
            future.cancel()


def _result(submitted: deque[Future[T]], end: float) -> T:
    """Return the first one's result, and let go of it; if that fails it stays, to be cancelled."""
    result = submitted[0].result(None if end == math.inf else end - time.monotonic())
    submitted.popleft()
    return result


def _configure_logging(settings: Settings) -> None:
    if settings.log_level is None:
        return
    log.setLevel(settings.log_level)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
