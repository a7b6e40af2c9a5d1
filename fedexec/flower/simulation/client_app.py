"""A ClientApp in a worker: loaded by its name, it gets one message, and its node's state goes there and back.

The caller's side is :mod:`fedexec.flower.simulation.grid`.
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
from fedexec._system import find_by_name
from fedexec._system.error_text import one_line
from fedexec._system.installed import is_installed_file
from fedexec._worker.seeding import seeded
from fedexec.flower.flower_internals import (
    PARTITION_ID_KEY,
    ErrorCode,
    LoadClientAppError,
    arrived,
    is_file_of_flower,
)
from fedexec.flower.offloading import set_isolated, warm_torch
from fedexec.flower.record_packing import Packed, pack, unpack
from fedexec.flower.simulation import module_caches
from fedexec.flower.simulation.client_output import marked
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


# With a fixed seed, random numbers that an app's modules draw at import are the same in every worker.
LOADING_SEED = 0


@dataclass(frozen=True, slots=True)
class AppRef:
    """How a worker finds a ClientApp.

    Attributes
    ----------
    name : str
        ``"module:attribute"``, or a name for messages if the app is pickled.
    pickled : bytes or None
        The app itself, if no name leads to it because it was made in a script or in a function.
    """

    name: str
    pickled: bytes | None = None

    @classmethod
    def of(cls, app: ClientApp) -> "AppRef":
        """Find the name of an app, or pickle the app.

        Parameters
        ----------
        app : ClientApp

        Returns
        -------
        AppRef

        Raises
        ------
        LoadClientAppError
            The app has no name and cannot be pickled.
        """
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
    """Return the app itself, loading it if `app` is a reference.

    Parameters
    ----------
    app : ClientApp or AppRef

    Returns
    -------
    ClientApp

    Raises
    ------
    LoadClientAppError
        The app cannot be loaded, or the name leads to another object.
    """
    return app if isinstance(app, ClientApp) else _load(app)


@functools.lru_cache(maxsize=8)
def _load(ref: AppRef) -> ClientApp:
    try:
        with seeded(LOADING_SEED):
            app = import_app(ref.name) if ref.pickled is None else cloudpickle.loads(ref.pickled)
    except (Exception, SystemExit) as exc:
        raise LoadClientAppError(
            f"The ClientApp {ref.name!r} cannot be loaded: {one_line(exc)}{place_of(exc)}"
        ) from exc
    if not isinstance(app, ClientApp):
        raise LoadClientAppError(f"{ref.name!r} is not a ClientApp, it is a {type(app).__name__}.")
    return app


def import_app(name: str) -> Any:
    """Return the object that ``"module:attribute"`` names.

    Parameters
    ----------
    name : str

    Returns
    -------
    object

    Raises
    ------
    ValueError
        The name is not of that form.
    ImportError, AttributeError
        The object does not exist.
    """
    return find_by_name.find_attribute(*find_by_name.split_name(name))


def warm(app: AppRef, prepare: Callable[[], object] | None = None) -> None:
    """Load the app in the template.

    An app that cannot be loaded is ignored here, because :func:`check` reports it.

    Parameters
    ----------
    app : AppRef
    prepare : callable, optional
        Called before the app is imported.
    """
    if prepare is not None:
        prepare()
    with contextlib.suppress(LoadClientAppError):
        load(app)
        module_caches.find()
    warm_torch()
    _rehearse()


class AppFirst:
    """A call that loads its app when it is unpickled, because the app's modules still see the GPUs then.

    Parameters
    ----------
    app : ClientApp or AppRef
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
    with contextlib.suppress(LoadClientAppError):  # The call will raise the same error.
        load(app)
    return call


def answer_or_raise(task: "MessageTask") -> None:
    """Give a message to the app, and raise if the answer is an error.

    Parameters
    ----------
    task : MessageTask

    Raises
    ------
    RuntimeError
        The answer is an error.
    """
    error = run(task).error
    if error is not None:
        raise RuntimeError(error[1])


def _rehearse() -> None:
    """Run a message that does nothing, so that late imports are done (numpy.random takes 10 ms)."""
    import_module("numpy.random")
    app = ClientApp()
    app.train()(lambda message, context: Message(RecordDict(), reply_to=message))
    metadata = Metadata(0, "id", 1, 2, "", "", time.time(), 3600.0, "train")
    run(MessageTask(app, pack(RecordDict()), metadata, {}, {}, b"", seed=0, isolated=True))


def check(app: ClientApp | AppRef) -> None:
    """Check, in a worker, that the app can be loaded there.

    Parameters
    ----------
    app : ClientApp or AppRef

    Raises
    ------
    LoadClientAppError
        The app cannot be loaded. The cause is in a note, so that the caller can unpickle the error.
    """
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
        The message's content; packed once for all nodes that get the same content.
    metadata : Metadata
    node_config, run_config : dict
    state : bytes
        The node's packed state; empty if there is none.
    seed : int or None
        Seed of the worker's global random generators.
    isolated : bool
        Whether the message runs in a worker process.
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
    """The outcome of a message.

    Attributes
    ----------
    reply : Packed or None
        The reply; None if `error` is set.
    error : tuple of (int, str) or None
        Flower's error code, and the reason.
    state : bytes or None
        The node's packed state; None if it is unchanged.
    traceback : str
        Traceback of the app's exception; empty if there is none.
    filled : tuple of str
        Variables of the app's modules that the message has filled; see
        :mod:`fedexec.flower.simulation.module_caches`.
    """

    reply: Packed | None = None
    error: tuple[int, str] | None = None
    state: bytes | None = None
    traceback: str = ""
    filled: tuple[str, ...] = ()


def run(task: MessageTask) -> Answer:
    """Give a message to the app; as in Flower, an exception of the app becomes an error.

    Parameters
    ----------
    task : MessageTask

    Returns
    -------
    Answer
    """
    if task.isolated:
        set_isolated()
    try:
        app = load(task.app)
    except LoadClientAppError as exc:
        return Answer(error=(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, str(exc)))
    partition = task.node_config.get(PARTITION_ID_KEY) if task.isolated else None
    # numpy imports numpy.random at its first use, so this seeds it, too.
    with marked(partition), seeded(task.seed):
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
        reason = f"{one_line(exc)}{place_of(exc)}"
        return Answer(error=(code, reason), traceback=_own_traceback(exc))
    return Answer(packed, state=None if after == task.state else after, filled=module_caches.filled(before))


def _own_traceback(error: BaseException) -> str:
    """Return an error's traceback from where the app's own code begins."""
    own = error.__traceback__
    while own is not None and _is_outer_file(own.tb_frame.f_code.co_filename):
        own = own.tb_next
    return "".join(traceback.format_exception(type(error), error, own or error.__traceback__))


def _is_outer_file(path: str) -> bool:
    return path == __file__ or is_file_of_flower(path)


def _check_reply(reply: Any, metadata: Metadata) -> None:
    if not isinstance(reply, Message):
        raise TypeError(f"the ClientApp returned a {type(reply).__name__} instead of a Message")
    if reply.metadata.reply_to_message_id != metadata.message_id:
        reason = "the ClientApp returned a Message that is not a reply: make it with reply_to=message"
        raise ValueError(reason)


def place_of(error: BaseException) -> str:
    """Return where the app's own code raised an error.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    str
        " (file, line n)", to end a sentence; empty if the app's own code is not involved.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in (__file__, find_by_name.__file__):
            return ""
        if not frame.filename.startswith("<") and not is_installed_file(frame.filename):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""
