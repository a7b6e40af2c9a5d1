"""Seeds random generators in workers: independently of each other, or from a given seed.

A worker that is forked from a template inherits the state of the template's generators, as every other worker
does. Python seeds :mod:`random` again in a forked process; this module seeds the generators of numpy and
torch. It does not import these libraries: if a task imports one, the library is seeded at that moment.
"""

import contextlib
import hashlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from fedexec._worker import imports

if TYPE_CHECKING:  # importlib.abc imports the whole of importlib.resources
    from importlib.abc import Loader

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


_VARIABLE = "FEDEXEC_SEED"  # the variable of the setting `seed`
_MT19937_WORDS = 624  # size of the state of numpy's global generator, in words of 32 bits


def derive(seed: int, number: int) -> int:
    """Return the seed of one task. Seeds of different tasks are unrelated.

    Parameters
    ----------
    seed : int
        Seed of the executor.
    number : int
        How many tasks were submitted before this task.

    Returns
    -------
    int
        Less than 2**64.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little")


def seed_all(seed: int) -> None:
    """Seed the global generators of Python and, if they are loaded, of numpy and torch.

    Parameters
    ----------
    seed : int
        At least 0; numpy takes its lowest 32 bits, torch its lowest 63 bits.
    """
    random.seed(seed)
    for name, seed_one in _SEEDERS.items():
        if name in sys.modules:
            seed_one(sys.modules[name], seed)


def renew() -> None:
    """Seed the generators of numpy and torch from the system, in a worker that inherits the template's."""
    numpy_random, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    if numpy_random is not None:
        # Set the whole state at once: seeding with several numbers would touch 100 more pages in each worker.
        words = memoryview(os.urandom(4 * _MT19937_WORDS)).cast("I")
        try:
            numpy_random.set_state(("MT19937", words, _MT19937_WORDS))
        except ValueError:  # the user has replaced the global generator by another kind of generator
            numpy_random.seed(list(words[:4]))
    # Generators of devices need nothing: torch makes and seeds them when a device is started.
    generator = getattr(torch, "default_generator", None)
    if generator is not None:
        generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)


def states() -> dict[str, Any]:
    """Return the states of the global generators that are loaded, by name of their module."""
    saved: dict[str, Any] = {"random": random.getstate()}
    if (numpy_random := _loaded("numpy.random")) is not None:
        saved["numpy.random"] = numpy_random.get_state()
    if (torch := _loaded("torch")) is not None:
        saved["torch"] = torch.get_rng_state()
    return saved


def _loaded(name: str) -> ModuleType | None:
    """Return a module that is imported completely; else None, because torch crashes if it is used before."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def restore(saved: dict[str, Any]) -> None:
    """Set the global generators to the states that :func:`states` has returned.

    Some libraries, for instance rich, draw random numbers while they are imported. A task that has to import
    such a library must draw the same numbers as a task whose worker has inherited it.

    Parameters
    ----------
    saved : dict of str to object
    """
    random.setstate(saved["random"])
    if "numpy.random" in saved:
        sys.modules["numpy.random"].set_state(saved["numpy.random"])
    if "torch" in saved:
        sys.modules["torch"].set_rng_state(saved["torch"])


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed every generator, including those of libraries that are imported while the context lasts.

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
    """Make the task's seed the value of ``FEDEXEC_SEED`` while the task runs, if the variable is set.

    Executors that the task makes read the variable. With the caller's value, the tasks of all these executors
    would draw the same random numbers. Processes that the task starts inherit the variable.

    Parameters
    ----------
    seed : int or None
        The task's seed. None changes nothing.
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
    """Make a call with all generators seeded.

    Parameters
    ----------
    seed : int
    call : callable

    Returns
    -------
    object
        What the call has returned.
    """
    with seeded(seed):
        return call()


@contextlib.contextmanager
def when_imported(actions: Mapping[str, Callable[[ModuleType], None]]) -> Iterator[None]:
    """Act on libraries as soon as they have been imported, before anybody uses them.

    Parameters
    ----------
    actions : mapping of str to callable
        ``action(module)`` by name of the library. A library that is already imported is left as it is.
    """
    finder = _Finder(actions)
    sys.meta_path.insert(0, finder)
    try:
        with imports.keeping(states, restore):
            yield
    finally:
        with contextlib.suppress(ValueError):  # the task may have changed the list
            sys.meta_path.remove(finder)


def _seed_numpy(module: ModuleType, seed: int) -> None:
    module.seed(seed % 2**32)


def _seed_torch(module: ModuleType, seed: int) -> None:
    if hasattr(module, "manual_seed"):  # false while torch is being imported
        module.manual_seed(seed % 2**63)


_SEEDERS: dict[str, Callable[[ModuleType, int], None]] = {"numpy.random": _seed_numpy, "torch": _seed_torch}


class _Finder:
    """Finds a library through the other finders, and has an action follow its import."""

    def __init__(self, actions: Mapping[str, Callable[[ModuleType], None]]) -> None:
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
                    loader = _ActingLoader(spec.loader, self._actions[name])
                    spec.loader = cast("Loader", loader)
                return spec
        return None


class _ActingLoader:
    """Loads a library with the library's own loader, and then runs the action."""

    def __init__(self, loader: "Loader", action: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._action = action

    def __getattr__(self, name: str) -> Any:
        """Look up other attributes in the library's own loader, without importing the library."""
        if name == "_loader":  # it is not set yet in an object that is being copied
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
