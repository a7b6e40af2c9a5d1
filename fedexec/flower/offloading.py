"""One line that isolates a function of a Flower app, wherever that app runs.

::

    @app.train()
    @offload
    def train(message: Message, context: Context) -> Message: ...


    strategy.start(grid, arrays, evaluate_fn=offload(evaluate))

The body runs in a worker of an executor, and what it held ends with it. In a process that is such a worker
already (:func:`fedexec.flower.simulate`), it just runs.
"""

import contextlib
import difflib
import functools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, ParamSpec, TypeVar, overload

import cloudpickle
from flwr.app import Context

from fedexec import settings
from fedexec.devices.device import hidden
from fedexec.errors import SettingsError
from fedexec.executor import Executor
from fedexec.flower.record_packing import Packed, pack, unpack
from fedexec.interface import Capability, Hooks

__all__ = ["app_settings", "offload", "set_isolated", "warm_torch"]

log = logging.getLogger("fedexec.flower")
P = ParamSpec("P")
T = TypeVar("T")

PREFIX = "executor-"


@overload
def offload(fn: Callable[P, T], /, *, executor: Executor | None = None) -> Callable[P, T]: ...
@overload
def offload(*, executor: Executor | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]: ...
def offload(fn: Any = None, /, *, executor: Executor | None = None) -> Any:
    """Have a function run in a worker. A decorator, also called with the function.

    Parameters
    ----------
    fn : callable
        Under ``@app.train()`` or ``@app.evaluate()``, or any other: an ``evaluate_fn`` of either signature.
        Its arguments are copies; of what it changes, the ``state`` of a ``Context`` comes back.
    executor : Executor, optional
        Default: one for this process, made at the first call from ``executor-backend`` and the like in the
        app's config, which the environment (``FEDEXEC_BACKEND``) overrides; one worker unless told otherwise.

    Returns
    -------
    callable
        Returns what `fn` returns and raises what it raises; WorkerDiedError if its worker dies.
    """
    if fn is None:
        return functools.partial(offload, executor=executor)
    if not callable(fn):
        raise TypeError(f"offload needs a function, got {fn!r}")
    chosen = _Here(executor)

    @functools.wraps(fn)
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        return _run(fn, chosen, args, kwargs)  # all else by reference: this may be pickled by value

    _offloaded.add(fn)
    return offloaded


class _Here:
    """An executor that stays where it is when the function around it travels."""

    def __init__(self, executor: Executor | None = None) -> None:
        self.executor = executor

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def _run(fn: Callable[..., Any], chosen: _Here, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _isolated:
        return fn(*args, **kwargs)
    contexts = _contexts(args, kwargs)
    pool = chosen.executor or _shared_executor(contexts[0].run_config if contexts else {})
    if Capability.ISOLATED not in pool.capabilities:
        return _wait(pool, fn, *args, **kwargs)
    answer = _wait(pool, _call, _address(fn), pack((args, kwargs)))
    result, states = unpack(answer, keep_classes=True)
    for context, state in zip(contexts, states, strict=True):
        context.state.clear()
        context.state.update(state)
    return result


def _contexts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Context]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Context)]


def _wait(pool: Executor, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    future = pool.submit(fn, *args, **kwargs)
    try:
        return future.result()
    except BaseException:  # Ctrl+C too: nobody waits for it any more
        pool.end(future)
        raise


# ---------------------------------------------------------------- in the worker

_isolated = False  # this process is a worker: what would be sent to another one runs here


def set_isolated() -> None:
    """Note that this process is a worker."""
    global _isolated
    _isolated = True


def _call(address: Callable[[], Callable[..., Any]], packed: Packed) -> Packed:
    set_isolated()
    args, kwargs = unpack(packed)
    result = address()(*args, **kwargs)
    return pack((result, [context.state for context in _contexts(args, kwargs)]))


# ---------------------------------------------------------------- functions by name


def _address(fn: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """Return what finds a function in another process: its name; itself, if that leads to another."""
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    if module not in (None, "__main__"):
        by_name = functools.partial(_by_name, module, name)
        with contextlib.suppress(ImportError, AttributeError):
            if by_name() is fn:
                return by_name
    return functools.partial(_itself, fn)


def _by_name(module: str, name: str) -> Callable[..., Any]:
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return getattr(found, "__wrapped__", found)  # type: ignore[no-any-return]


def _itself(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


# ---------------------------------------------------------------- the executor of this process

_offloaded: "weakref.WeakSet[Callable[..., Any]]" = weakref.WeakSet()
_shared: tuple[int, Executor] | None = None  # with the process it belongs to
_lock = threading.Lock()


def _shared_executor(run_config: Mapping[str, Any]) -> Executor:
    global _shared
    with _lock:
        if _shared is None or _shared[0] != os.getpid():
            resolved = settings.resolve(config={"max_workers": 1} | app_settings(run_config))
            _shared = os.getpid(), Executor(resolved, Hooks(warmup=_warmup()))
        return _shared[1]


def app_settings(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the executor's settings in an app's config: ``executor-max-workers`` is ``max_workers``.

    Raises
    ------
    SettingsError
        No setting has this name.
    """
    known = {PREFIX + option.name.replace("_", "-"): option.name for option in settings.options()}
    given = {key: value for key, value in run_config.items() if key.startswith(PREFIX)}
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(known)}."
            raise SettingsError(f"{key!r} in the app's config is no setting of an executor.{hint}")
    return {known[key]: value for key, value in given.items()}


def _warmup() -> Callable[[], object]:
    packed = []
    for fn in list(_offloaded):
        with contextlib.suppress(Exception):  # what does not pickle is for its own call to report
            packed.append(cloudpickle.dumps(_address(fn)))
    return functools.partial(_warm, packed)


def _warm(packed: list[bytes]) -> None:
    """Import in the template what the functions of this process need."""
    for each in packed:
        with contextlib.suppress(Exception):  # for its own call to report
            cloudpickle.loads(each)()
    warm_torch()


def warm_torch() -> None:
    """Take a training step, if torch is there: what it imports and sets up then takes 2 s a process."""
    if "torch" in sys.modules:
        with hidden(), _one_thread(sys.modules["torch"]):
            _take_step(sys.modules["torch"])


@contextlib.contextmanager
def _one_thread(torch: Any) -> Iterator[None]:
    """Compute with one thread, whatever an app has chosen: no forked worker could use a pool of threads."""
    chosen = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(chosen)


def _take_step(torch: Any) -> None:
    nn = torch.nn
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(net(torch.zeros(2, 1, 8, 8)), torch.tensor([0, 1])).backward()
    optimizer.step()
