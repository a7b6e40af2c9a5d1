"""The executor that users work with. It is the same on every backend; the backend decides where tasks run."""

import concurrent.futures
import copy
import functools
import logging
import math
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from fedexec import _registry
from fedexec._scheduling import mapping
from fedexec._scheduling.admission import Admission, Footprint, ceiling
from fedexec._scheduling.deadline import GRACE_SECONDS
from fedexec._scheduling.exit_hooks import drain_before_exit_of
from fedexec._scheduling.futures import Future, Stats
from fedexec._scheduling.needs import read_needs
from fedexec._scheduling.scheduler import Scheduler
from fedexec._scheduling.settings_checks import (
    NO_EFFECT,
    chosen_devices,
    configure_logging,
    for_nodes,
    require_open_files,
    warn_of_no_effect,
)
from fedexec._system.available_resources import SIGKILL
from fedexec._worker.seeding import call_seeded
from fedexec.devices.device import is_emulated
from fedexec.interface import NO_NEEDS, Capability, Hooks, Node, Task, function_name, once
from fedexec.settings import Settings, resolve

__all__ = ["Executor"]

log = logging.getLogger("fedexec")
T = TypeVar("T")


class Executor(concurrent.futures.Executor):
    """Runs tasks on a backend; otherwise it is like every :class:`concurrent.futures.Executor`.

    Parameters
    ----------
    settings : Settings
        Resolved settings, as :func:`fedexec.settings.resolve` makes them.
    hooks : Hooks, optional
        The caller's own functions: initializer and warm-up.

    Attributes
    ----------
    settings : Settings
    devices : tuple of Device
        The devices on which tasks may compute, besides the CPU. If tasks run in this process, only the first.
    capabilities : Capability
        What the backend guarantees.
    """

    def __init__(self, settings: Settings, hooks: Hooks | None = None) -> None:
        hooks = hooks or Hooks()
        for name in ("initializer", "warmup"):
            if getattr(hooks, name) is not None and not callable(getattr(hooks, name)):
                raise TypeError(f"{name} must be a callable")
        backend_class = _registry.load_chosen(settings)
        drain_before_exit_of(backend_class)
        configure_logging(settings)
        self._tag: str | None = None
        self._needs = NO_NEEDS
        self._original: Executor | None = None  # set in a view, which keeps the original alive
        is_remote = Capability.REMOTE in backend_class.capabilities
        self.devices = () if is_remote else chosen_devices(settings)
        if Capability.ISOLATED not in backend_class.capabilities:
            self.devices = self.devices[:1]  # all tasks share this process and its device
        if settings.device and self.devices and not is_emulated(settings.device):
            # Tell workers UUIDs, because an index may mean another device to them.
            settings = replace(settings, device=",".join(device.uuid for device in self.devices))
        if is_remote:
            settings = for_nodes(settings)
        settings = self.settings = replace(settings, max_workers=ceiling(settings, self.devices))
        require_open_files(settings, backend_class.descriptors_per_worker)
        backend = backend_class(settings, hooks)
        try:
            backend.start()
        except BaseException:
            backend.shutdown()
            raise
        self.capabilities = backend.capabilities  # those of a cluster follow from its nodes
        fresh = Capability.FRESH_PROCESS in self.capabilities
        admission = Admission(settings, self.devices, fresh=fresh, remote=is_remote)
        log.info("%s", settings)
        warn_of_no_effect(settings, self.capabilities)
        self._scheduler = Scheduler(backend, settings, admission, self.devices)
        # An executor that is no longer referred to finishes its tasks and then ends.
        weakref.finalize(self, self._scheduler.close).atexit = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Schedule ``fn(*args, **kwargs)``; see :meth:`concurrent.futures.Executor.submit`.

        Parameters
        ----------
        fn, args, kwargs
            The function and its arguments.

        Returns
        -------
        Future
            Has the attribute `usage` when it is done. If an argument cannot be pickled, the future gets the
            exception.

        Raises
        ------
        RuntimeError
            The executor has been shut down.
        BrokenProcessPool
            An initializer or a preload has failed.
        """
        task = Task(fn, args, kwargs, tag=self._tag, needs=self._needs)
        task.timeout, task.retries = self.settings.timeout, self.settings.retries
        return self.submit_task(task)

    def submit_task(self, task: Task) -> Future[Any]:
        """Schedule a task that has options of its own; see :meth:`submit`.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Future
        """
        return self._scheduler.submit(task)

    def with_options(
        self,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        tag: str | None = None,
        memory: int | str | None = None,
        device_memory: int | str | None = None,
        threads: int | None = None,
    ) -> "Executor":
        """Return a view of this executor whose tasks have options of their own, and all else in common.

        ``executor.with_options(timeout=60, tag="client 7").submit(fit, weights)``

        Parameters
        ----------
        timeout : float, optional
            Time limit of a task in seconds; ``math.inf`` for no limit. Default: that of this executor.
        retries : int, optional
            How often a task runs again if its worker dies; a function that :func:`fedexec.once` marks never
            does. Default: that of this executor.
        tag : str, optional
            Name of the task in messages and errors, besides the name of its function. Default: that of this
            executor.
        memory, device_memory : int or str, optional
            What a task needs of the host's memory, and of that of one device: bytes, or a text such as
            ``"2GiB"``. It starts when tasks that run leave so much of what they have asked for. With
            ``max_workers="auto"`` it counts if it is more than what was measured. Default: not known.
        threads : int, optional
            How many threads the numerical libraries of a task use; tasks that ask for threads and those
            beside them get no more than there are cores. Default: those of the worker.

        Raises
        ------
        SettingsError
            A value is invalid, or more than this machine has.
        """
        view = copy.copy(self)
        view._original = self
        if timeout is not None:
            limit = None if timeout == math.inf else resolve({"timeout": timeout}, environ={}).timeout
            view.settings = replace(view.settings, timeout=limit)
            if limit is not None and Capability.KILLS_ONE not in self.capabilities:
                log.warning(NO_EFFECT, self.settings.backend, "timeout")
        if retries is not None:
            number = resolve({"retries": retries}, environ={}).retries
            view.settings = replace(view.settings, retries=number)
        if tag is not None:
            view._tag = tag
        if (memory, device_memory, threads) != (None, None, None):
            devices = None if Capability.REMOTE in self.capabilities else self.devices
            view._needs = read_needs(view._needs, devices, memory, device_memory, threads)
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
        fn : callable
        iterables : iterables
            Arguments of `fn`, as for :func:`map`.
        timeout : float, optional
            Seconds from this call after which ``next`` raises TimeoutError.
        chunksize : int, optional
            Number of items that one task handles.
        buffersize : int, optional
            How many tasks are submitted ahead of the result that is asked for, as in Python 3.14. By default
            all tasks are submitted at once.

        Returns
        -------
        iterator
            Results, in the order of the items.
        """
        mapping.check(chunksize, buffersize)
        if chunksize == 1:
            return self._map(fn, iterables, timeout, buffersize)
        call_each = functools.partial(mapping.call_each, fn)
        chunks = self._map(
            call_each if Task(fn, (), {}).repeatable else once(call_each),
            (mapping.chunks(zip(*iterables, strict=False), chunksize),),
            timeout,
            buffersize,
        )
        return mapping.flatten(chunks)

    def _map(
        self,
        fn: Callable[..., T],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        buffersize: int | None,
    ) -> Iterator[T]:
        if buffersize is None:
            return super().map(fn, *iterables, timeout=timeout)
        futures = (self.submit(fn, *args) for args in zip(*iterables, strict=False))
        return mapping.buffered(futures, buffersize, timeout)

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes of the cluster on which tasks run; empty if all run on this machine."""
        return self._scheduler.nodes()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks, finish the others, and then give back all resources.

        Parameters
        ----------
        wait : bool
            Whether to return only when no process is left; if not, this returns at once.
        cancel_futures : bool
            Whether to cancel the tasks that have not begun.
        """
        self._scheduler.close(cancel_futures=cancel_futures)
        if wait:
            self._scheduler.join()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Shut down at the end of a ``with`` block; after Ctrl+C do not wait, but end all workers at once."""
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            self.kill_workers()
        else:
            self.shutdown()

    def kill_workers(self) -> None:
        """Shut down at once: cancel waiting tasks, and end all workers (running tasks: WorkerDiedError)."""
        self._scheduler.close(cancel_futures=True, kill=SIGKILL)
        self._scheduler.join()

    def terminate_workers(self) -> None:
        """Shut down like :meth:`kill_workers`, but let running tasks clean up: workers get SIGTERM first.

        Workers that have not ended after 2 seconds are killed.
        """
        self._scheduler.close(cancel_futures=True, kill=signal.SIGTERM)
        killing = threading.Timer(GRACE_SECONDS, self._scheduler.close, kwargs={"kill": SIGKILL})
        try:
            killing.start()
        except RuntimeError:  # no thread can be started: in a function of atexit CPython 3.12 starts none
            self._scheduler.close(kill=SIGKILL)
        self._scheduler.join()
        killing.cancel()

    def end(self, future: concurrent.futures.Future[Any], number: int = SIGKILL) -> None:
        """End one task: cancel it if it waits, or end its worker if it runs, so it raises WorkerDiedError.

        If the backend does not have :attr:`Capability.KILLS_ONE`, a running task goes on.

        Parameters
        ----------
        future : Future
            The future of the task.
        number : int, optional
            Number of the signal that ends the worker. Default: SIGKILL.
        """
        self._scheduler.end(future, number)

    def rehearse(self, fn: Callable[..., object], /, *args: Any, **kwargs: Any) -> bool:
        """Make a call once, so that all later workers inherit what the call leaves in memory.

        This is for code that keeps something expensive in a variable of a module, such as a data set: without
        a rehearsal, a fresh process would load it for every task. The call is made in the template, on the
        CPU. Its result is thrown away; files that it writes stay. All later tasks see what it leaves in
        memory, as if each had made the call before, so it must not leave what has to differ between tasks.
        Random generators are seeded for each task as usual. Rehearsing the same call again does nothing.

        Parameters
        ----------
        fn, args, kwargs
            As for :meth:`submit`. The call may take ``preload_timeout`` seconds.

        Returns
        -------
        bool
            Whether later workers inherit the effects. They do not if after the call the template could not
            be forked (it has started a GPU, or left a thread, a process or a connection), if the call leaves
            what workers would share (a file that is open for reading, a lock), or if workers are not forked.
            Then nothing changes, and a warning says why. On ``inline`` nothing is done, because tasks share
            their memory anyway.

        Raises
        ------
        PreloadError
            The call has raised; the error carries the traceback.
        RuntimeError
            The executor has been shut down.
        """
        name = function_name(fn)
        if name.startswith("__main__.") and Capability.ISOLATED in self.capabilities:
            log.warning(
                "%s is defined in the script itself, so workers do not inherit what it leaves in variables "
                "of the script; keep these variables in a module", name,
            )  # fmt: skip
        call = functools.partial(fn, *args, **kwargs)
        if self.settings.seed is not None:
            call = functools.partial(call_seeded, self.settings.seed, call)
        reason = self.rehearse_call(call, name)
        if reason is not None:
            log.warning("workers do not inherit what %s leaves in memory: %s", name, reason)
        return reason is None

    def rehearse_call(self, call: Callable[[], object], name: str) -> str | None:
        """Make a call without arguments once, as :meth:`rehearse` does, and return why that had no effect.

        Parameters
        ----------
        call : callable
        name : str
            Name of the function, for messages.

        Returns
        -------
        str or None
            None if later workers inherit the effects.
        """
        return self._scheduler.rehearse(call, name)

    def stats(self) -> Stats:
        """Return counts of what has been done so far."""
        return self._scheduler.stats()

    def running(self) -> list[Task]:
        """Return the tasks that run now. The attribute `pid` of a task is None until it is known."""
        return self._scheduler.running()

    def footprints(self) -> dict[str, Footprint]:
        """Return the footprint of each kind of task, as measured for ``max_workers="auto"``."""
        return self._scheduler.footprints()
