"""What a template learns: the modules that tasks import, so that later workers are born with them.

A fresh process would import them for every task. The worker tells, with its answer, what its task has
imported; what the pickled call names is known even before it runs. How a template learns is the backend's
business; what is worth it is decided here.
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

WORTH_SECONDS = 0.1  # that the imports of a kind of task must have taken: learning costs about as much
WORTH_MODULES = 30  # that the packages which a call names must have loaded here, to be learnt before it runs
WAIT_SECONDS = 20.0  # that a task waits, at most, for the template to learn what the task would import
WAKE_SECONDS = 0.25  # after which a task that waits looks whether it was ended meanwhile
SCANNED_BYTES = 1 << 18  # of a pickled call that are searched for names of modules


@dataclass(frozen=True, slots=True)
class Lesson:
    """What became of modules that a template was to learn.

    Attributes
    ----------
    learnt : tuple of str
        Those that it has imported.
    unfit : mapping of str to str
        Those that it did not take over, and why: workers could not be forked any more, or would differ.
    """

    learnt: tuple[str, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)


class Learner:
    """Decides what the template learns, and when. One for each executor; safe to use from many threads.

    Parameters
    ----------
    teach : callable
        Has the template learn these modules, and returns the :class:`Lesson`. Called in a thread of its own.
    renew : callable
        Called when the template has learnt something: workers that wait and lack it are to be replaced.
    """

    def __init__(
        self, teach: Callable[[tuple[str, ...]], Lesson], renew: Callable[[], object] = lambda: None
    ) -> None:
        self._teach = teach
        self._renew = renew
        # A lock to be taken as it is: in the Condition's own __enter__ Ctrl+C could leave it locked for ever.
        self._lock = threading.RLock()  # guards everything below
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._scanned: set[str] = set()  # kinds of tasks whose call has been looked through
        self._asked: dict[str, None] = {}  # modules that the template was given, fit or not
        self._lessons: list[tuple[str, tuple[str, ...]]] = []  # (kind of task, modules) that wait
        self._kinds: Counter[str] = Counter()  # lessons that wait or run, by kind of task
        self._late: set[str] = set()  # those among them for which nobody waits any more
        self._pending: dict[str, dict[str, None]] = {}  # kind -> modules that were not worth it yet,
        self._spent: dict[str, float] = {}  # and the seconds that its tasks have spent on them
        self._cold: dict[str, float] = {}  # kind -> seconds of imports of a task that found nothing learnt
        self._learnt = 0
        self._unfit: dict[str, str] = {}
        self._seconds = 0.0
        self._saved = 0.0

    def prepare(self, task: Task, data: bytes) -> None:
        """Have the template learn what a pickled call names; wait while it learns something for this kind."""
        with self._lock:
            if task.kind not in self._scanned:
                self._scanned.add(task.kind)
                names = self._unasked(_named_modules(data))
                if _loaded_under(names) >= WORTH_MODULES:
                    self._ask(task.kind, names)
            self._wait(task)

    def _wait(self, task: Task) -> None:
        """Wait while the template learns for this kind of task, which would import the same meanwhile.

        If that takes much longer than the imports did, no task of this kind waits any more.
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
        """Take note of what a task has imported, and of what that has cost."""
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
        """Return what was learnt: how many modules, seconds that it took and saved, and what was left out."""
        with self._lock:
            return {
                "modules": self._learnt,
                "seconds": self._seconds,
                "saved_seconds": self._saved,
                "unfit": dict(self._unfit),
            }

    def close(self) -> None:
        """Learn nothing more. Called when the template is gone."""
        with self._lock:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _unasked(self, names: Iterable[str]) -> list[str]:
        """Return those that the template was not asked to learn, and that may be fit."""
        unfit = tuple(f"{module}." for module in self._unfit)
        return [name for name in names if name not in self._asked and not name.startswith(unfit)]

    def _ask(self, kind: str, names: Iterable[str]) -> None:
        if self._closing:
            return
        self._asked |= dict.fromkeys(names)
        self._lessons.append((kind, tuple(names)))
        self._kinds[kind] += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._learn, name="fedexec-learning", daemon=True)
            self._thread.start()

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
            except Exception as exc:  # no descriptors, no memory: what was not learnt is imported as before
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
                "learnt %d modules in %.1f s, which tasks like %s will not import again: %s",
                len(lesson.learnt), seconds, ", ".join(dict.fromkeys(kinds)), packages,
            )  # fmt: skip
        for module, reason in lesson.unfit.items():
            log.info("%s is not learnt, each task that needs it imports it: %s", module, reason)


# ---------------------------------------------------------------- what a call names


def _named_modules(data: bytes) -> list[str]:
    """Return the modules of installed packages that a call needs, itself or through the user's own."""
    found: dict[str, None] = {}
    for name in dict.fromkeys(_imported_by(data)):
        if name not in sys.modules:
            continue
        if is_installed(name):
            found[name] = None
        else:
            found |= dict.fromkeys(_used_by(name, set()))
    return [name for name in found if name.partition(".")[0] not in sys.stdlib_module_names]


_SUBIMPORT = ("cloudpickle.cloudpickle", "subimport")  # what cloudpickle has called with the name of a module


def _imported_by(data: bytes) -> Iterator[str]:
    """Yield the modules that unpickling imports, of pickles within the pickle too."""
    memo: dict[int, Any] = {}
    before, last = None, None  # what was put on the stack: a string, or a function's module and name
    try:
        for opcode, argument, position in pickletools.genops(data):
            if position is not None and position > SCANNED_BYTES:
                return
            name = opcode.name
            value = None
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
    except ValueError:  # bytes that look like a pickle and are none
        return


def _used_by(name: str, seen: set[str]) -> Iterator[str]:
    """Yield the modules of installed packages that a module of the user's refers to, directly or not."""
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
    """Return how many modules are loaded here of the packages that these belong to."""
    tops = {name.partition(".")[0] for name in names}.difference(OURS)  # of which workers have the most
    return sum(name.partition(".")[0] in tops for name in list(sys.modules))
