"""The executor a user holds. It owns what is the same on every backend; where a task runs is the backend's.

A *slot* is a thread that takes one task at a time from the queue and hands it to the backend. There are
``max_workers`` of them, so that a backend never holds more tasks than can run: what waits stays cancellable,
and a broken pool can hurt only what was running.
"""

import concurrent.futures
import functools
import itertools
import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from fedexec import registry
from fedexec.errors import (
    InitializerError,
    PreloadError,
    TaskTimeoutError,
    WorkerDiedError,
    WorkerMemoryError,
)
from fedexec.interface import Backend, Capability, Hooks, Outcome, Task, Usage
from fedexec.memory.admission import Admission, Footprint, ceiling
from fedexec.memory.device import Device, devices
from fedexec.memory.watch import Watch
from fedexec.settings import Settings, resolve

__all__ = ["Executor", "Future", "Stats", "create_executor"]

log = logging.getLogger("fedexec")
T = TypeVar("T")


class Future(concurrent.futures.Future[T]):
    """A :class:`concurrent.futures.Future` that also knows what its task cost.

    Attributes
    ----------
    usage : Usage or None
        Set when the task is done; None before, and where it was not measured (the worker died).
    """

    usage: Usage | None = None

    def result(self, timeout: float | None = None) -> T:
        """Return what the task returned, or raise what it raised, even if that is false (gh-132063)."""
        error = self.exception(timeout)
        if error is None:
            return super().result()
        try:
            raise error
        finally:
            del self, error  # its traceback holds this frame: no cycle


@dataclass(frozen=True, slots=True)
class Stats:
    """What an executor has done so far; every field is a number of tasks, but for the last.

    Attributes
    ----------
    restarts : mapping of str to int
        How many workers were replaced because of a limit, by cause: "host memory", "device memory".
    """

    submitted: int
    succeeded: int
    failed: int
    cancelled: int
    running: int
    queued: int
    worker_deaths: int
    timeouts: int
    retries: int
    memory_kills: int
    restarts: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON knows them."""
        return asdict(self)


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
        and caches every worker has. It must leave no thread behind and not touch CUDA.
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
        }
    )
    return Executor(settings, Hooks(initializer, initargs, warmup))


_NEEDS = {  # setting -> the promises of which one must be made for it to hold
    "timeout": Capability.KILLS_ONE,
    "memory_limit": Capability.RECYCLES | Capability.FRESH_PROCESS,
    "device_memory_limit": Capability.RECYCLES | Capability.FRESH_PROCESS,
    "enforce_limits": Capability.KILLS_ONE,
    "max_tasks_per_child": Capability.STANDS_BY,
    "standby": Capability.STANDS_BY,
    "shared_memory": Capability.SHARES_MEMORY,
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
        What tasks may compute on, beside the CPU.
    capabilities : Capability
    """

    def __init__(self, settings: Settings, hooks: Hooks | None = None) -> None:
        hooks = hooks or Hooks()
        for name in ("initializer", "warmup"):
            if getattr(hooks, name) is not None and not callable(getattr(hooks, name)):
                raise TypeError(f"{name} must be a callable")
        backend_class = registry.load(settings.backend)
        _drain_before_exit_of(backend_class)
        _configure_logging(settings)
        self.devices = devices(settings.device)
        settings = self.settings = replace(settings, max_workers=ceiling(settings, self.devices))
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
                log.warning("backend %s cannot keep %s: it is not enforced", settings.backend, field)
        self._scheduler = _Scheduler(backend, settings, admission, self.devices)
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
        return self._scheduler.submit(Task(fn, args, kwargs))

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
        chunks = super().map(
            functools.partial(_call_each, fn),
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

    def kill_workers(self) -> None:
        """Shut down at once: cancel what waits, end the workers of what runs (WorkerDiedError)."""
        self._scheduler.close(cancel_futures=True, kill=True)
        self._scheduler.join()

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


def _configure_logging(settings: Settings) -> None:
    if settings.log_level is None:
        return
    log.setLevel(settings.log_level)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())


# ---------------------------------------------------------------- the queue and its slots


class _Scheduler:
    """Queue and slots of one executor. Its threads hold it, not the executor, which may be collected."""

    def __init__(
        self, backend: Backend, settings: Settings, admission: Admission, devices: Sequence[Device]
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._admission = admission
        self._changed = threading.Condition()  # guards everything below
        self._queue: deque[tuple[Task, Future[Any]]] = deque()
        self._running: set[Task] = set()
        self._threads: list[threading.Thread] = []  # every slot there ever was
        self._slots: set[threading.Thread] = set()  # those that have not ended
        self._joining: set[threading.Thread] = set()  # those whose callback waits for the others
        self._idle = 0
        self._closing = False
        self._killing = False
        self._broken: InitializerError | PreloadError | None = None
        self._counts: Counter[str] = Counter()
        self._gone = threading.Event()  # the backend is shut down
        self._excesses: dict[int, WorkerMemoryError] = {}  # task id -> why it is being ended
        self._watch: Watch | None = None
        if settings.enforce_limits and Capability.KILLS_ONE in backend.capabilities:
            self._watch = Watch(settings, devices, self.running, self._end_for_memory)
        _schedulers.add(self)

    def submit(self, task: Task) -> Future[Any]:
        future: Future[Any] = Future()
        with self._changed:
            if self._broken is not None:
                raise _copy(self._broken)
            if self._closing:
                when = "interpreter shutdown" if _interpreter_ends else "shutdown"
                raise RuntimeError(f"cannot schedule new futures after {when}")
            self._queue.append((task, future))
            self._counts["submitted"] += 1
            if self._idle >= len(self._queue):
                self._changed.notify()
            elif len(self._slots) < self._settings.max_workers:
                self._open_slot()
        return future

    def close(self, *, cancel_futures: bool = False, kill: bool = False) -> None:
        with self._changed:
            unused = not self._slots and not self._closing
            self._closing = True
            self._killing |= kill
            cancelled = list(self._queue) if cancel_futures else []
            if cancel_futures:
                self._queue.clear()
                self._counts["cancelled"] += len(cancelled)
            running = list(self._running)
            self._changed.notify_all()
        for _, future in cancelled:
            future.cancel()
            future.set_running_or_notify_cancel()
        if kill and Capability.KILLS_ONE in self._backend.capabilities:
            for task in running:
                self._kill(task)
        if unused:
            self._end_backend()

    def join(self) -> None:
        """Wait until nothing is left; called from a slot (a done-callback), for the other slots only.

        Slots that wait here at the same time do not wait for each other.
        """
        me = threading.current_thread()
        with self._changed:
            threads = list(self._threads)
            if me in self._slots:
                self._joining.add(me)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._slots <= self._joining)
                self._joining.discard(me)
                return
        self._gone.wait()
        for thread in threads:
            if thread is not me:
                thread.join()

    def stats(self) -> Stats:
        with self._changed:
            counts = self._counts
            return Stats(
                submitted=counts["submitted"],
                succeeded=counts["succeeded"],
                failed=counts["failed"],
                cancelled=counts["cancelled"],
                running=len(self._running),
                queued=len(self._queue),
                worker_deaths=counts["worker_deaths"],
                timeouts=counts["timeouts"],
                retries=counts["retries"],
                memory_kills=counts["memory_kills"],
                restarts=dict(self._backend.restarts()),
            )

    def running(self) -> list[Task]:
        with self._changed:
            return list(self._running)

    def footprints(self) -> dict[str, Footprint]:
        with self._changed:
            return self._admission.footprints()

    # ------------------------------------------------------------ a slot's life

    def _open_slot(self) -> None:
        slot = threading.Thread(target=self._work, name=f"fedexec-slot-{len(self._slots)}")
        self._slots.add(slot)
        self._threads.append(slot)
        try:
            slot.start()
        except BaseException:
            self._slots.discard(slot)
            self._threads.remove(slot)
            if not self._slots:  # with another slot the task waits for that one
                self._queue.pop()
                self._counts["submitted"] -= 1
                raise

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            try:
                self._serve(*entry)
            except BaseException:  # a done-callback that raised SystemExit must not take the slot along
                log.exception("a callback ended with something that is no Exception")
            del entry  # keep no finished argument alive while waiting for the next task
        with self._changed:
            self._slots.discard(threading.current_thread())
            self._changed.notify_all()
            last = not self._slots
        if last:
            self._end_backend()

    def _next(self) -> tuple[Task, Future[Any]] | None:
        with self._changed:
            self._idle += 1
            try:
                while not (self._queue and self._admission.admit(self._queue[0][0])):
                    if self._closing and not self._queue:
                        return None
                    self._changed.wait()
                task, future = self._queue.popleft()
                self._running.add(task)
                return task, future
            finally:
                self._idle -= 1

    def _serve(self, task: Task, future: Future[Any]) -> None:
        if not future.running() and not future.set_running_or_notify_cancel():
            self._done(task, None)
            return
        with self._admission.measuring(task):
            outcome = self._run(task)
        if isinstance(outcome.exception, InitializerError | PreloadError):
            self._break(outcome.exception)
        if self._done(task, outcome):
            with self._changed:  # it ran out of memory in company
                self._queue.appendleft((task, future))
            return
        del task
        future.usage = outcome.usage
        try:
            if outcome.exception is None:
                future.set_result(outcome.value)
            else:
                future.set_exception(outcome.exception)
        finally:
            del outcome, future  # a traceback out of this very thread holds this frame: no cycle

    def _run(self, task: Task) -> Outcome:
        attempts = 1 + self._settings.retries
        while True:
            attempts -= 1
            try:
                return self._attempt(task)
            except WorkerDiedError as exc:
                self._count("worker_deaths")
                if not attempts or self._killing:
                    return Outcome(exception=exc.with_traceback(None))
                log.warning("%s It is run again.", exc)
                self._count("retries")
            except TaskTimeoutError as exc:
                self._count("timeouts")
                return Outcome(exception=exc.with_traceback(None))
            except WorkerMemoryError as exc:
                self._count("memory_kills")
                return Outcome(exception=exc.with_traceback(None))
            except BaseException as exc:
                return Outcome(exception=exc)

    def _attempt(self, task: Task) -> Outcome:
        timeout = self._settings.timeout
        expired = threading.Event()
        timer = None
        if timeout is not None and Capability.KILLS_ONE in self._backend.capabilities:
            timer = threading.Timer(timeout, self._expire, (task, expired))
            timer.daemon = True
            timer.start()
        try:
            return self._backend.run(task)
        except WorkerDiedError as exc:
            if task.id in self._excesses:
                raise self._excesses.pop(task.id) from None
            if timeout is not None and expired.is_set():
                raise TaskTimeoutError(task.name, timeout, exc.pid) from None
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _expire(self, task: Task, expired: threading.Event) -> None:
        expired.set()
        self._kill(task)

    def _kill(self, task: Task) -> None:
        task.doomed = True
        self._backend.kill(task)

    def _end_for_memory(self, task: Task, error: WorkerMemoryError) -> None:
        self._excesses[task.id] = error
        self._kill(task)

    def _count(self, what: str) -> None:
        with self._changed:
            self._counts[what] += 1

    def _done(self, task: Task, outcome: Outcome | None) -> bool:
        """Count a task; return whether it is to be run once more, because memory ran out."""
        with self._changed:
            self._running.discard(task)
            if self._admission.release(task, outcome):
                self._counts["retries"] += 1
                return True
            how = "cancelled" if outcome is None else "failed" if outcome.exception else "succeeded"
            self._counts[how] += 1
            if self._settings.auto:
                self._changed.notify_all()  # there may be room now
            return False

    def _break(self, error: InitializerError | PreloadError) -> None:
        """No worker can be made ready: fail what waits, refuse what comes."""
        with self._changed:
            self._broken = error
            waiting = list(self._queue)
            self._queue.clear()
            self._counts["failed"] += len(waiting)
        log.critical("%s", error, exc_info=error.__cause__)
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(_copy(error))

    def _end_backend(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        try:
            self._backend.shutdown()
        finally:
            self._gone.set()


def _copy(error: InitializerError | PreloadError) -> Exception:
    """Make an exception of its own for each future: tracebacks pile up in a shared one."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy


# ---------------------------------------------------------------- the end of the interpreter

_schedulers: "weakref.WeakSet[_Scheduler]" = weakref.WeakSet()
_interpreter_ends = False


@functools.cache
def _drain_before_exit_of(backend_class: type[Backend]) -> None:
    """Finish what was submitted before the pools that a backend is built on are closed at exit.

    concurrent.futures and loky close their pools in hooks of the same kind, last registered first; the
    backend's module has been imported by now, so this hook runs before theirs. There is no public name.
    """
    threading._register_atexit(_drain)  # type: ignore[attr-defined]


def _drain() -> None:
    global _interpreter_ends
    _interpreter_ends = True
    schedulers = list(_schedulers)
    for scheduler in schedulers:
        scheduler.close()
    for scheduler in schedulers:
        scheduler.join()
