"""Decides which modules the template learns: those that tasks import, so that later workers have them.

A fresh process would import these modules for every task. The reply of a worker says what its task has
imported; modules that the pickled call names are known even before the task runs. How the template imports
modules is up to the backend (:class:`Lesson`); this module decides which of them are worth it.
"""

import logging
import pickle
import pickletools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from fedexec._system.installed import OURS, is_installed
from fedexec.interface import Task, Usage

__all__ = ["Learner", "Lesson"]

log = logging.getLogger("fedexec")

WORTH_SECONDS = 0.1  # learn only if the imports of a kind of task took as long: learning costs about as much
WORTH_MODULES = 30  # learn before a task runs only if the packages that its call names have so many modules
WAIT_SECONDS = 20.0  # the longest that a task waits until the template has learnt what the task would import
WAKE_SECONDS = 0.25  # how often a task that waits checks whether its worker was ended meanwhile
SCANNED_BYTES = 1 << 18  # how much of a pickled call is searched for names of modules


@dataclass(frozen=True, slots=True)
class Lesson:
    """The result of having a template import modules.

    Attributes
    ----------
    learnt : tuple of str
        Modules that the template has imported.
    unfit : mapping of str to str
        Modules that the template did not keep, each with the reason: with the module, workers could not be
        forked any more, or would behave differently.
    """

    learnt: tuple[str, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)


class Learner:
    """Decides what the template learns, and when. There is one for each executor. Thread-safe.

    Parameters
    ----------
    teach : callable
        ``teach(names)`` has the template import modules, and returns the :class:`Lesson`. It is called in a
        thread of its own.
    renew : callable
        ``renew()`` replaces idle workers. It is called when the template has learnt modules, because idle
        workers do not have them.
    """

    def __init__(
        self, teach: Callable[[tuple[str, ...]], Lesson], renew: Callable[[], object] = lambda: None
    ) -> None:
        self._teach = teach
        self._renew = renew
        # Enter this lock and not the condition: Ctrl+C in Condition.__enter__ could leave it locked for ever.
        self._lock = threading.RLock()  # guards everything below
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._scanned: set[str] = set()  # kinds of tasks whose pickled call has been searched
        self._asked: dict[str, None] = {}  # modules that the template was asked to import, fit or unfit
        self._lessons: list[tuple[str, tuple[str, ...]]] = []  # waiting (kind of task, modules)
        self._kinds: Counter[str] = Counter()  # number of lessons that wait or run, by kind of task
        self._late: set[str] = set()  # kinds whose lesson takes so long that tasks no longer wait for it
        self._pending: dict[str, dict[str, None]] = {}  # by kind: modules that were not worth a lesson yet
        self._spent: dict[str, float] = {}  # by kind: seconds that tasks have spent on importing these
        self._cold: dict[str, float] = {}  # by kind: seconds of imports of a task before anything was learnt
        self._learnt = 0
        self._unfit: dict[str, str] = {}
        self._seconds = 0.0
        self._saved = 0.0

    def prepare(self, task: Task, data: bytes) -> None:
        """Learn the modules that a pickled call names, and wait while modules for its kind are being learnt.

        Parameters
        ----------
        task : Task
            Its attribute `held_up` grows by the seconds that it waits here.
        data : bytes
            The pickled call.
        """
        with self._lock:
            if task.kind not in self._scanned:
                self._scanned.add(task.kind)
                names = self._unasked(_named_modules(data))
                if _loaded_under(names) >= WORTH_MODULES:
                    self._ask(task.kind, names)
            self._wait(task)

    def _wait(self, task: Task) -> None:
        """Wait while the template learns for this kind of task, which would import the same modules.

        If learning takes much longer than the imports did, tasks of this kind no longer wait.
        """
        kind = task.kind
        patience = min(WAIT_SECONDS, max(1.0, 3 * self._cold[kind]) if kind in self._cold else WAIT_SECONDS)
        if task.timeout is not None:
            patience = min(patience, task.timeout / 4)
        begun = time.monotonic()
        deadline = begun + patience
        while self._kinds[kind] and kind not in self._late and not task.doomed:
            if time.monotonic() > deadline:
                self._late.add(kind)
            self._changed.wait(WAKE_SECONDS)
        task.held_up += time.monotonic() - begun

    def note(self, task: Task, imported: Iterable[str], usage: Usage | None) -> None:
        """Note which modules a task has imported, and how long that took; learn them if that is worth it.

        Parameters
        ----------
        task : Task
        imported : iterable of str
            Names of modules.
        usage : Usage or None
            Usage of the task, whose `import_seconds` are used.
        """
        seconds = usage.import_seconds if usage is not None and usage.import_seconds is not None else 0.0
        with self._lock:
            self._saved += max(0.0, self._cold.setdefault(task.kind, seconds) - seconds)
            pending = self._pending.setdefault(task.kind, {})
            pending |= dict.fromkeys(self._unasked(imported))
            if not pending:
                return
            self._cold[task.kind] = max(self._cold[task.kind], seconds)
            self._spent[task.kind] = self._spent.get(task.kind, 0.0) + seconds
            if self._spent[task.kind] >= WORTH_SECONDS:
                self._ask(task.kind, pending)
                del self._pending[task.kind], self._spent[task.kind]

    def report(self) -> dict[str, Any]:
        """Return what the template has learnt.

        Returns
        -------
        dict
            ``modules``: number of modules; ``seconds``: time that learning took; ``saved_seconds``: estimated
            time that tasks have saved; ``unfit``: modules that were left out, each with the reason.
        """
        with self._lock:
            return {
                "modules": self._learnt,
                "seconds": self._seconds,
                "saved_seconds": self._saved,
                "unfit": dict(self._unfit),
            }

    def close(self) -> None:
        """Learn nothing more. This is called when the template has ended."""
        with self._lock:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _unasked(self, names: Iterable[str]) -> list[str]:
        """Return the modules that the template was not asked to import, and that may be fit."""
        unfit = tuple(f"{module}." for module in self._unfit)
        return [name for name in names if name not in self._asked and not name.startswith(unfit)]

    def _ask(self, kind: str, names: Iterable[str]) -> None:
        if self._closing:
            return
        self._asked |= dict.fromkeys(names)
        self._lessons.append((kind, tuple(names)))
        self._kinds[kind] += 1
        if self._thread is None:
            thread = threading.Thread(target=self._learn, name="fedexec-learning", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # too many threads, or CPython 3.12.0 to 3.12.2 at its end (gh-113964)
                self._lessons.clear()
                self._kinds.clear()
                return
            self._thread = thread

    def _learn(self) -> None:
        while True:
            with self._lock:
                if not self._lessons or self._closing:
                    self._thread = None
                    self._kinds.clear()
                    self._changed.notify_all()
                    return
                lessons, self._lessons = self._lessons, []
            names = dict.fromkeys(name for _, names in lessons for name in names)
            begun = time.perf_counter()
            try:
                lesson = self._teach(tuple(names))
            except Exception as exc:  # for example no descriptors or no memory; tasks import the modules then
                log.warning("the template has learnt nothing: %r", exc)
                lesson = Lesson()
            seconds = time.perf_counter() - begun
            if lesson.learnt:
                self._renew()
            self._finish(lessons, lesson, seconds)

    def _finish(self, lessons: list[tuple[str, tuple[str, ...]]], lesson: Lesson, seconds: float) -> None:
        kinds = [kind for kind, _ in lessons]
        with self._lock:
            self._kinds.subtract(kinds)
            self._late.difference_update(kinds)
            self._learnt += len(lesson.learnt)
            self._unfit.update(lesson.unfit)
            self._seconds += seconds
            self._changed.notify_all()
        if lesson.learnt:
            packages = ", ".join(dict.fromkeys(name.partition(".")[0] for name in lesson.learnt))
            log.info(
                "the template has learnt %d modules in %.1f s, which tasks like %s need not import again: %s",
                len(lesson.learnt), seconds, ", ".join(dict.fromkeys(kinds)), packages,
            )  # fmt: skip
        for module, reason in lesson.unfit.items():
            log.info("the template does not learn %s, so each task imports it: %s", module, reason)


# ---------------------------------------------------------------- modules that a call names


def _named_modules(data: bytes) -> list[str]:
    """Return the modules of installed packages that a call needs, directly or through the user's modules."""
    modules: dict[str, None] = {}
    for name in dict.fromkeys(_imported_by(data)):
        if name not in sys.modules:
            continue
        if is_installed(name):
            modules[name] = None
        else:
            modules |= dict.fromkeys(_used_by(name, set()))
    return [name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names]


_SUBIMPORT = ("cloudpickle.cloudpickle", "subimport")  # the function that cloudpickle imports modules by

_OnStack = str | tuple[object, object] | None
"""A value on the stack of a pickle: a string, or (module, name) of a function; None is any other."""


def _imported_by(data: bytes) -> Iterator[str]:
    """Yield the modules that unpickling imports, including those of pickles inside the pickle."""
    memo: dict[int, _OnStack] = {}
    before: _OnStack = None  # the last value on the stack but one
    last: _OnStack = None
    try:
        for opcode, argument, position in pickletools.genops(data):
            if position is not None and position > SCANNED_BYTES:
                return
            name = opcode.name
            value: _OnStack = None
            if name == "MEMOIZE":
                memo[len(memo)] = last
                continue
            if name in ("BINGET", "LONG_BINGET"):
                value = memo.get(int(argument or 0))
            elif name == "STACK_GLOBAL":
                value = (before, last)
                if isinstance(before, str):
                    yield before
            elif isinstance(argument, str):
                value = argument
            elif isinstance(argument, bytes) and argument[:1] == pickle.PROTO:
                yield from _imported_by(argument)
            if last == _SUBIMPORT and isinstance(value, str):
                yield value
            before, last = last, value
    except ValueError:  # the bytes begin like a pickle but are not one
        return


def _used_by(name: str, seen: set[str]) -> Iterator[str]:
    """Yield the modules of installed packages that a module of the user refers to, directly or indirectly."""
    if name in seen or name.partition(".")[0] in OURS:
        return
    seen.add(name)
    for value in list(vars(sys.modules[name]).values()):
        other = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if not isinstance(other, str) or other not in sys.modules:
            continue
        if is_installed(other):
            yield other
        elif other != "__main__":
            yield from _used_by(other, seen)


def _loaded_under(names: Iterable[str]) -> int:
    """Return how many modules of the packages that these modules belong to are loaded in this process."""
    tops = {name.partition(".")[0] for name in names}.difference(OURS)  # workers have most of our modules
    return sum(name.partition(".")[0] in tops for name in list(sys.modules))
