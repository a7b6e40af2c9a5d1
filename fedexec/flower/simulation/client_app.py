"""A ClientApp in a worker: found by its name, given one message, its node's state there and back.

The other end is :mod:`fedexec.flower.simulation.grid`.
"""

import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import cloudpickle
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from fedexec._channel.pickling import dumps
from fedexec._system.installed import is_installed_file
from fedexec._worker.seeding import seeded
from fedexec.flower.flower_internals import ErrorCode, LoadClientAppError, arrived
from fedexec.flower.offloading import set_isolated, warm_torch
from fedexec.flower.record_packing import Packed, pack, unpack
from fedexec.flower.simulation import module_caches
from fedexec.interface import function_name

__all__ = [
    "Answer",
    "AppFirst",
    "AppRef",
    "MessageTask",
    "answer_or_raise",
    "check",
    "load",
    "place_of",
    "run",
    "warm",
]


LOADING_SEED = 0  # What an app's modules draw at their top is the same in every worker, and in every run.


@dataclass(frozen=True, slots=True)
class AppRef:
    """How a worker finds a ClientApp.

    Attributes
    ----------
    name : str
        ``"module:attribute"``, or what to call it.
    pickled : bytes or None
        The app itself, where no name leads to it: it was made in a script, or in a function.
    """

    name: str
    pickled: bytes | None = None

    @classmethod
    def of(cls, app: ClientApp) -> "AppRef":
        """Find the name of an app, or pack it; LoadClientAppError where neither can be done."""
        for module_name, module in list(sys.modules.items()):
            if module_name not in ("__main__", "__mp_main__") and isinstance(module, ModuleType):
                for name, value in list(vars(module).items()):
                    if value is app:
                        return cls(f"{module_name}:{name}")
        try:
            return cls("of this script", dumps(app))
        except Exception as exc:
            raise LoadClientAppError(
                f"The ClientApp cannot be sent to workers: {exc!r}. Make it in a module of its own."
            ) from exc


def load(app: ClientApp | AppRef) -> ClientApp:
    """Return the app that is meant, in a worker if it is a reference; LoadClientAppError if there is none."""
    return app if isinstance(app, ClientApp) else _load(app)


@functools.lru_cache(maxsize=8)
def _load(ref: AppRef) -> ClientApp:
    try:
        with seeded(LOADING_SEED):
            app = import_app(ref.name) if ref.pickled is None else cloudpickle.loads(ref.pickled)
    except (Exception, SystemExit) as exc:
        raise LoadClientAppError(
            f"The ClientApp {ref.name!r} cannot be loaded: {_line(exc)}{place_of(exc)}"
        ) from exc
    if not isinstance(app, ClientApp):
        raise LoadClientAppError(f"{ref.name!r} is not a ClientApp, it is a {type(app).__name__}.")
    return app


def import_app(name: str) -> Any:
    """Return what ``"module:attribute"`` names; ValueError if it does not look like that."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{name!r} is not written like package.module:app")
    found = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def warm(app: AppRef) -> None:
    """Load the app where workers are forked from; one that cannot be is for :func:`check` to report."""
    with contextlib.suppress(LoadClientAppError):
        load(app)
        module_caches.find()
    warm_torch()
    _rehearse()


class AppFirst:
    """A call whose app is loaded where the call is unpickled: there the app's modules still see the devices.

    Parameters
    ----------
    app : AppRef
    call : callable
    """

    def __init__(self, app: ClientApp | AppRef, call: Callable[[], object]) -> None:
        self._app, self._call = app, call
        self.__qualname__ = function_name(call).rpartition(".")[2]

    def __call__(self) -> None:
        """Make the call."""
        self._call()

    def __reduce__(self) -> tuple[Any, ...]:
        return _app_first, (self._app, self._call)


def _app_first(app: ClientApp | AppRef, call: Callable[[], object]) -> Callable[[], object]:
    with contextlib.suppress(LoadClientAppError):  # The call will meet it too.
        load(app)
    return call


def answer_or_raise(task: "MessageTask") -> None:
    """Run a message, and raise RuntimeError where the answer is an error."""
    error = run(task).error
    if error is not None:
        raise RuntimeError(error[1])


def _rehearse() -> None:
    """Run a message that does nothing, so that late imports are done (numpy.random: 10 ms)."""
    import_module("numpy.random")
    app = ClientApp()
    app.train()(lambda message, context: Message(RecordDict(), reply_to=message))
    metadata = Metadata(0, "id", 1, 2, "", "", time.time(), 3600.0, "train")
    run(MessageTask(app, pack(RecordDict()), metadata, {}, {}, b"", seed=0, isolated=True))


def check(app: ClientApp | AppRef) -> None:
    """Raise LoadClientAppError, in the caller too, where workers do not find the app."""
    try:
        load(app)
    except LoadClientAppError as exc:
        error = LoadClientAppError(str(exc))
        error.add_note("".join(traceback.format_exception(exc.__cause__)) if exc.__cause__ else "")
        raise error from None


# ---------------------------------------------------------------- one message


@dataclass(frozen=True, slots=True)
class MessageTask:
    """One message and its node, on their way to a worker.

    Attributes
    ----------
    app : ClientApp or AppRef
    content : Packed
        Of the message; packed once for all nodes that get the same.
    metadata : Metadata
    node_config, run_config : dict
    state : bytes
        Of the node, packed; empty if there is none.
    seed : int or None
        For the global random generators of the worker.
    isolated : bool
        It runs in a worker process.
    """

    app: ClientApp | AppRef
    content: Packed
    metadata: Metadata
    node_config: dict[str, Any]
    run_config: dict[str, Any]
    state: bytes
    seed: int | None
    isolated: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a message.

    Attributes
    ----------
    reply : Packed or None
        A Message; None if there is
    error : tuple of (int, str) or None
        Flower's code, and the reason.
    state : bytes or None
        Of the node, packed; None if it is what it was.
    traceback : str
    filled : tuple of str
        Variables of the app's modules in which something is kept since; see
        :mod:`fedexec.flower.simulation.module_caches`.
    """

    reply: Packed | None = None
    error: tuple[int, str] | None = None
    state: bytes | None = None
    traceback: str = ""
    filled: tuple[str, ...] = ()


def run(task: MessageTask) -> Answer:
    """Give a message to the app. What that raises is an answer, as in Flower."""
    if task.isolated:
        set_isolated()
    try:
        app = load(task.app)
    except LoadClientAppError as exc:
        return Answer(error=(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, str(exc)))
    with seeded(task.seed):  # numpy.random too, which numpy imports when it is first used
        return _run(app, task)


def _run(app: ClientApp, task: MessageTask) -> Answer:
    state = unpack(Packed.from_bytes(task.state)) if task.state else RecordDict()
    run_config = dict(task.run_config)
    context = Context(task.metadata.run_id, task.metadata.dst_node_id, task.node_config, state, run_config)
    before = module_caches.empty()
    try:
        reply = app(arrived(unpack(task.content), task.metadata), context)
        _check_reply(reply, task.metadata)
        packed = pack(reply)
        after = pack(context.state).to_bytes() if context.state else b""
    except (Exception, SystemExit) as exc:
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return Answer(error=(code, _line(exc)), traceback=traceback.format_exc())
    return Answer(packed, state=None if after == task.state else after, filled=module_caches.filled(before))


def _check_reply(reply: Any, metadata: Metadata) -> None:
    if not isinstance(reply, Message):
        raise TypeError(f"the ClientApp returned a {type(reply).__name__} where a Message is due")
    if reply.metadata.reply_to_message_id != metadata.message_id:
        raise ValueError("the ClientApp returned a Message that is no reply: make it with reply_to=message")


def place_of(error: BaseException) -> str:
    """Return where an app's own code was when an error arose, as the end of a sentence; "" if nowhere."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == __file__:
            return ""
        if not frame.filename.startswith("<") and not is_installed_file(frame.filename):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
