"""Random numbers in workers: independent of each other, or following from a seed.

A worker that is forked from a template has the template's generators, like every other worker. Python itself
seeds those of :mod:`random` anew in a forked process; here numpy's and torch's are. No library is imported
for it: one that a task imports is seeded when it arrives.
"""

import contextlib
import hashlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fedexec._worker import imports

__all__ = [
    "call_seeded",
    "derive",
    "passed_on",
    "renew",
    "restore",
    "seed_all",
    "seeded",
    "states",
    "when_imported",
]


_VARIABLE = "FEDEXEC_SEED"  # of settings
_MT19937_WORDS = 624  # of numpy's global generator


def derive(seed: int, number: int) -> int:
    """Return the seed of one task, which tells nothing of another's.

    Parameters
    ----------
    seed : int
        Of the executor.
    number : int
        Of the task: how many were submitted before it.

    Returns
    -------
    int
        Less than 2**64.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little")


def seed_all(seed: int) -> None:
    """Seed the global generators of Python and, where they are loaded, of numpy and torch.

    Parameters
    ----------
    seed : int
        At least 0; numpy takes the lowest 32 bits of it, torch the lowest 63.
    """
    random.seed(seed)
    for name, seed_one in _SEEDERS.items():
        if name in sys.modules:
            seed_one(sys.modules[name], seed)


def renew() -> None:
    """Seed numpy's and torch's generators from the system, in a worker that was born with its template's."""
    numpy_random, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    if numpy_random is not None:
        # The whole state at once: seeding by several numbers touches 100 pages more in each worker.
        words = memoryview(os.urandom(4 * _MT19937_WORDS)).cast("I")
        try:
            numpy_random.set_state(("MT19937", words, _MT19937_WORDS))
        except ValueError:  # The caller has put a generator of another kind in its place.
            numpy_random.seed(list(words[:4]))
    # The generators of devices are made, and seeded by the system, when a device is started.
    generator = getattr(torch, "default_generator", None)
    if generator is not None:
        generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)


def states() -> dict[str, Any]:
    """Return the states of the global generators that are loaded."""
    found: dict[str, Any] = {"random": random.getstate()}
    if (numpy_random := _loaded("numpy.random")) is not None:
        found["numpy.random"] = numpy_random.get_state()
    if (torch := _loaded("torch")) is not None:
        found["torch"] = torch.get_rng_state()
    return found


def _loaded(name: str) -> Any:
    """Return a module whose import is over; None else: torch crashes if it is used before that."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def restore(found: dict[str, Any]) -> None:
    """Give the global generators the states that they had.

    Libraries draw numbers while they are imported, rich for instance. A task must not draw others because it
    had to import one, and another task, whose worker was born with it, had not.
    """
    random.setstate(found["random"])
    if "numpy.random" in found:
        sys.modules["numpy.random"].set_state(found["numpy.random"])
    if "torch" in found:
        sys.modules["torch"].set_rng_state(found["torch"])


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Have every generator follow from a seed, also those of libraries that are imported meanwhile.

    Parameters
    ----------
    seed : int or None
        None changes nothing.
    """
    if seed is None:
        yield
        return
    seed_all(seed)
    with when_imported(dict.fromkeys(_SEEDERS, lambda module: _SEEDERS[module.__name__](module, seed))):
        yield


@contextlib.contextmanager
def passed_on(seed: int | None) -> Iterator[None]:
    """Have executors that a task makes follow from the task's seed, where all have that of ``FEDEXEC_SEED``.

    Otherwise the tasks of each of them would draw the same numbers as those of every other, in every task.
    Processes that the task starts inherit it.

    Parameters
    ----------
    seed : int or None
        The task's. None changes nothing.
    """
    ours, before = str(seed), os.environ.get(_VARIABLE)
    if seed is None or not before:
        yield
        return
    os.environ[_VARIABLE] = ours
    try:
        yield
    finally:
        if os.environ.get(_VARIABLE) == ours:  # else the task has changed it
            os.environ[_VARIABLE] = before


def call_seeded(seed: int, call: Callable[[], object]) -> object:
    """Make a call with every generator following from a seed."""
    with seeded(seed):
        return call()


@contextlib.contextmanager
def when_imported(actions: Mapping[str, Callable[[Any], None]]) -> Iterator[None]:
    """Have something done to a library as soon as it has been imported, before anybody uses it.

    Parameters
    ----------
    actions : mapping of str to callable ``(module) -> None``
        By the library's name. One that is imported already is left as it is.
    """
    finder = _Finder(actions)
    sys.meta_path.insert(0, finder)
    try:
        with imports.keeping(states, restore):
            yield
    finally:
        with contextlib.suppress(ValueError):  # The task may have changed the list.
            sys.meta_path.remove(finder)


def _seed_numpy(module: Any, seed: int) -> None:
    module.seed(seed % 2**32)


def _seed_torch(module: Any, seed: int) -> None:
    if hasattr(module, "manual_seed"):  # not while it is being imported
        module.manual_seed(seed % 2**63)


_SEEDERS: dict[str, Callable[[Any, int], None]] = {"numpy.random": _seed_numpy, "torch": _seed_torch}


class _Finder(MetaPathFinder):
    """Finds nothing by itself: it has something done to a library as soon as that has been imported."""

    def __init__(self, actions: Mapping[str, Callable[[Any], None]]) -> None:
        self._actions = actions

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._actions:
            return None
        for finder in [each for each in sys.meta_path if each is not self]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ActingLoader(spec.loader, self._actions[name])
                return spec
        return None


class _ActingLoader(Loader):
    """A library's own loader, and what is done to the library after that."""

    def __init__(self, loader: Any, action: Callable[[Any], None]) -> None:
        self._loader = loader
        self._action = action

    def __getattr__(self, name: str) -> Any:
        """Answer what is asked of a library's loader without importing the library."""
        if name == "_loader":  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._action(module)
