"""One line that isolates a function of a Flower app, no matter how the app is run.

::

    @app.train()
    @offload
    def train(message: Message, context: Context) -> Message: ...


    strategy.start(grid, arrays, evaluate_fn=offload(evaluate))

The function's body runs in a worker of an executor, and its resources are freed when it ends. In a process
that already is such a worker (:func:`fedexec.flower.simulate`), the function runs directly.
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
from typing import Any, ParamSpec, TypeVar, overload

import cloudpickle
from flwr.app import Context

from fedexec import settings
from fedexec._system.find_by_name import find_attribute
from fedexec.devices.device import hidden
from fedexec.errors import SettingsError
from fedexec.executor import Executor
from fedexec.flower.record_packing import Packed, pack, unpack
from fedexec.interface import Capability, Hooks

__all__ = ["app_settings", "offload", "set_isolated", "warm_torch"]

log = logging.getLogger("fedexec.flower")
P = ParamSpec("P")
T = TypeVar("T")

PREFIX = settings.KEY_PREFIX


@overload
def offload(fn: Callable[P, T], /, *, executor: Executor | None = None) -> Callable[P, T]: ...
@overload
def offload(*, executor: Executor | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]: ...
def offload(fn: Any = None, /, *, executor: Executor | None = None) -> Any:
    """Make a function run in a worker; use this as a decorator, or call it with the function.

    Parameters
    ----------
    fn : callable
        A function under ``@app.train()`` or ``@app.evaluate()``, or any other function, such as an
        ``evaluate_fn`` of either signature. It gets copies of its arguments; the only change that comes back
        is the ``state`` of a ``Context``.
    executor : Executor, optional
        Default: one executor for this process, made at the first call from ``executor-backend`` and similar
        keys of the app's config, which the environment (``FEDEXEC_BACKEND``) overrides; it has one worker
        unless it is configured otherwise.

    Returns
    -------
    callable
        Returns what `fn` returns and raises what `fn` raises.

    Raises
    ------
    TypeError
        `fn` is not callable.
    WorkerDiedError
        Raised by the returned function if its worker dies.
    """
    if fn is None:
        return functools.partial(offload, executor=executor)
    if not callable(fn):
        raise TypeError(f"offload needs a function, got {fn!r}")
    holder = _LocalExecutor(executor)

    @functools.wraps(fn)
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        # Everything else is found by reference, because this function may be pickled by value.
        return _run(fn, holder, args, kwargs)

    with _offloaded_lock:
        _offloaded.add(fn)
    return offloaded


class _LocalExecutor:
    """Holds an executor, which stays in this process when the function around it is pickled."""

    def __init__(self, executor: Executor | None = None) -> None:
        self.executor = executor

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def _run(
    fn: Callable[..., Any], holder: _LocalExecutor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if _isolated:
        return fn(*args, **kwargs)
    contexts = _contexts(args, kwargs)
    pool = holder.executor or _shared_executor(contexts[0].run_config if contexts else {})
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
    except BaseException:  # Also after Ctrl+C: no caller waits for the task any more.
        pool.end(future)
        raise


# ---------------------------------------------------------------- in the worker

_isolated = False  # Whether this process is a worker, in which an offloaded function runs directly.


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
    """Return a function that finds `fn` in another process: by name, or pickled if the name does not work."""
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    if module not in (None, "__main__"):
        by_name = functools.partial(_by_name, module, name)
        with contextlib.suppress(ImportError, AttributeError):
            if by_name() is fn:
                return by_name
    return functools.partial(_itself, fn)


def _by_name(module: str, name: str) -> Callable[..., Any]:
    target = find_attribute(module, name)
    return getattr(target, "__wrapped__", target)  # type: ignore[no-any-return]


def _itself(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


# ---------------------------------------------------------------- the executor of this process

_offloaded: "weakref.WeakSet[Callable[..., Any]]" = weakref.WeakSet()
_offloaded_lock = threading.Lock()  # A set cannot be listed while another thread adds to it.
_shared: tuple[int, Executor] | None = None  # the owner's pid, and the executor
_lock = threading.Lock()  # held for as long as the executor takes to start


def _shared_executor(run_config: Mapping[str, Any]) -> Executor:
    global _shared
    with _lock:
        if _shared is None or _shared[0] != os.getpid():
            resolved = settings.resolve(config={"max_workers": 1} | app_settings(run_config))
            _shared = os.getpid(), Executor(resolved, Hooks(warmup=_warmup()))
        return _shared[1]


def app_settings(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the executor's settings in an app's config: ``executor-max-workers`` is ``max_workers``.

    Parameters
    ----------
    run_config : mapping

    Returns
    -------
    dict
        Name of the setting -> value.

    Raises
    ------
    SettingsError
        A key begins with ``executor-`` but names no setting.
    """
    known = {option.key: option.name for option in settings.options()}
    given = {key: value for key, value in run_config.items() if key.startswith(PREFIX)}
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(known)}."
            raise SettingsError(f"{key!r} in the app's config is not a setting of an executor.{hint}")
    return {known[key]: value for key, value in given.items()}


def _warmup() -> Callable[[], object]:
    packed = []
    with _offloaded_lock:
        functions = list(_offloaded)
    for fn in functions:
        with contextlib.suppress(Exception):  # If a function cannot be pickled, its own call reports that.
            packed.append(cloudpickle.dumps(_address(fn)))
    return functools.partial(_warm, packed)


def _warm(packed: list[bytes]) -> None:
    """Import, in the template, what the functions of this process need."""
    for each in packed:
        with contextlib.suppress(Exception):  # The function's own call reports the error.
            cloudpickle.loads(each)()
    warm_torch()


def warm_torch() -> None:
    """Take one training step if torch is imported: the first step of a process takes 2 s of set-up."""
    if "torch" in sys.modules:
        with hidden(), _one_thread(sys.modules["torch"]):
            _take_step(sys.modules["torch"])


@contextlib.contextmanager
def _one_thread(torch: Any) -> Iterator[None]:
    """Compute with one thread, even if an app has set more: no forked worker could use a pool of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _take_step(torch: Any) -> None:
    nn = torch.nn
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(net(torch.zeros(2, 1, 8, 8)), torch.tensor([0, 1])).backward()
    optimizer.step()
