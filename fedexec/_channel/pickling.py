"""How objects are pickled between the caller and its workers: cloudpickle, with what its users would miss.

- What ``__main__`` defines travels by value, with the name of its file, so that a traceback shows its lines.
  In a process that multiprocessing has spawned, that is called ``__mp_main__``. So does what is defined in a
  module that only the sender can import.
- torch's CPU tensors travel like arrays: their bytes lie beside the pickle.
- A function with ``functools.lru_cache`` travels without its cache, a ``cached_property`` without its lock.
- What comes back never changes a class of the process that reads it.
"""

import functools
import gc
import io
import linecache
import os
import pickle
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from importlib import import_module
from multiprocessing import reduction
from typing import Any

import cloudpickle
from cloudpickle import cloudpickle as _cloudpickle

from fedexec._system.installed import is_installed

__all__ = [
    "Pickler",
    "Sources",
    "dump",
    "dumps",
    "load_with_main",
    "loads",
    "send_main_by_value",
    "show_sources",
]

Sources = tuple[tuple[str, tuple[str, ...]], ...]
"""(file name, lines) of code that only the sender's process has the source of: notebook cells."""

_MAINS = ("__main__", "__mp_main__")
_cloudpickle._PICKLE_BY_VALUE_MODULES.update(_MAINS)  # its public function takes only what is loaded here


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    """Pickle code as cloudpickle does, but with the name of its file, which cloudpickle 3.1.3 leaves out."""
    constructor, args, *rest = _reduce_code_of_cloudpickle(code)
    args = tuple(code.co_filename if type(arg) is str and arg == "<dynamic-code>" else arg for arg in args)
    return constructor, args, *rest


_reduce_code_of_cloudpickle: Callable[[types.CodeType], tuple[Any, ...]] = cloudpickle.Pickler.dispatch_table[
    types.CodeType
]


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles by value what ``__main__`` defines, and torch's CPU tensors like arrays.

    Attributes
    ----------
    files : set of str
        Where the functions that it has met stand.
    of_main : dict of str to object
        The functions and classes that it has met and that ``__main__`` knows by these names.
    """

    dispatch_table = cloudpickle.Pickler.dispatch_table.new_child({types.CodeType: _reduce_code})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.files: set[str] = set()
        self.of_main: dict[str, Any] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what cloudpickle would not, or not as it should be."""
        torch = sys.modules.get("torch")  # whoever has a tensor has imported it; not if that goes on just now
        kinds = (getattr(torch, "Tensor", None), getattr(getattr(torch, "nn", None), "Parameter", None))
        if torch is not None and type(obj) in kinds and _is_plain(torch, obj):
            return _reduce_tensor(torch, obj)
        if _is_of_main(obj):
            self._note(obj)
        elif isinstance(obj, types.FunctionType | type):
            _send_by_value_if_only_here(obj.__module__)
        if type(obj) is types.FunctionType:
            self.files.add(obj.__code__.co_filename)
        elif type(obj) is functools._lru_cache_wrapper and _is_sent_by_value(obj):
            return _reduce_cached(obj)
        elif type(obj) is weakref.WeakKeyDictionary:  # functools.singledispatch has one
            return weakref.WeakKeyDictionary, (dict(obj),)
        elif type(obj) is types.MappingProxyType:
            return types.MappingProxyType, (gc.get_referents(obj)[0],)
        elif issubclass(type(obj), BaseException) and (base := _plain_base(type(obj))) is not None:
            _, args, *state = obj.__reduce__()
            return _exception, (type(obj), base, args), *state
        elif type(obj) is functools.cached_property:  # It has a lock up to Python 3.11.
            return functools.cached_property, (obj.func,), {"attrname": obj.attrname, "__doc__": obj.__doc__}
        return super().reducer_override(obj)

    def _note(self, obj: Any) -> None:
        name: str = obj.__qualname__
        if vars(sys.modules["__main__"]).get(name) is obj:
            self.of_main[name] = obj


@functools.cache
def _send_by_value_if_only_here(name: str) -> None:
    """Have a module of the user's travel by value if no other process could import it by its name.

    A program may load a file under a name of its own, as those with plug-ins do, or make a module of nothing.
    """
    package = name.partition(".")[0]
    if name not in sys.modules or is_installed(name) or is_installed(package) or package in _MAINS:
        return
    parent = sys.modules.get(name.rpartition(".")[0])
    path = getattr(parent, "__path__", None)
    if not any(_finds(finder, name, path) for finder in sys.meta_path):
        _cloudpickle._PICKLE_BY_VALUE_MODULES.add(name)


def _finds(finder: Any, name: str, path: Any) -> bool:
    try:
        return finder.find_spec(name, path) is not None
    except Exception:  # one that is not made for this
        return False


def dump(obj: Any, *, with_main: bool = False) -> tuple[bytes, list[memoryview], Sources]:
    """Pickle an object.

    Parameters
    ----------
    obj : object
    with_main : bool
        For :func:`load_with_main`: with the names by which ``__main__`` knows what is pickled by value.

    Returns
    -------
    tuple of bytes, list of memoryview and Sources
        The pickle, the buffers beside it, and the source of what it holds of notebook cells.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = Pickler(file, protocol=5, buffer_callback=buffers.append)
    # These names are pickled last, when all of them are known.
    pickler.dump((obj, pickler.of_main) if with_main else obj)
    return file.getvalue(), [buffer.raw() for buffer in buffers], _sources(pickler.files)


def dumps(obj: Any) -> bytes:
    """Pickle an object in one piece, by value what ``__main__`` defines."""
    file = io.BytesIO()
    Pickler(file, protocol=5).dump(obj)
    return file.getvalue()


def _sources(files: Iterable[str]) -> Sources:
    """Return the lines of those files that are none: linecache was told of them."""
    return tuple(
        (name, tuple(linecache.getlines(name)))
        for name in sorted(files)
        if name in linecache.cache and not os.path.exists(name)  # noqa: PTH110
    )


def show_sources(sources: Sources) -> None:
    """Have tracebacks in this process show these lines."""
    for name, lines in sources:
        linecache.cache[name] = (sum(map(len, lines)), None, list(lines), name)


# ---------------------------------------------------------------- tensors


def _is_plain(torch: Any, tensor: Any) -> bool:
    return bool(
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and tensor.is_contiguous()
        and tensor.numel() > 0
        and tensor.is_leaf
        and not (tensor.is_quantized or tensor.is_complex() or tensor.is_neg())
        and not (vars(tensor) or tensor._backward_hooks)
    )


def _reduce_tensor(torch: Any, tensor: Any) -> tuple[Any, ...]:
    raw = tensor.detach().view(-1).view(torch.uint8).numpy()
    is_parameter = type(tensor) is torch.nn.Parameter
    shape = tuple(tensor.shape)
    return _tensor, (pickle.PickleBuffer(raw), tensor.dtype, shape, tensor.requires_grad, is_parameter)


def _tensor(buffer: Any, dtype: Any, shape: tuple[int, ...], requires_grad: bool, is_parameter: bool) -> Any:
    """Rebuild a tensor on the memory its bytes lie in."""
    torch = import_module("torch")
    writable = buffer if not memoryview(buffer).readonly else bytearray(buffer)
    tensor = torch.frombuffer(writable, dtype=torch.uint8).view(dtype).view(shape)
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad)


# ---------------------------------------------------------------- exceptions


def _plain_base(cls: type[BaseException]) -> type[BaseException] | None:
    """Return Python's exception that a class derives from; None if it is one, or pickles in its own way."""
    base = next(each for each in cls.__mro__ if each.__module__ == "builtins")
    reduces: list[Any] = [base.__reduce__, object.__reduce_ex__]
    return base if base is not cls and [cls.__reduce__, cls.__reduce_ex__] == reduces else None


def _exception(cls: type[BaseException], base: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """Rebuild an exception as any other object, without its ``__init__``, which may take other arguments."""
    error = base.__new__(cls, *args)
    base.__init__(error, *args)
    return error


# ---------------------------------------------------------------- functools.lru_cache


def _is_sent_by_value(function: Any) -> bool:
    name = getattr(function, "__qualname__", None)
    if getattr(function, "__module__", None) in _MAINS:
        return True
    return name is not None and _cloudpickle._lookup_module_and_qualname(function, name=name) is None


def _reduce_cached(cached: Any) -> tuple[Any, ...]:
    """Pickle a function with a cache: first its shell, for it may call itself by its name."""
    parameters = cached.cache_parameters()
    return (
        _empty_cached,
        (parameters["maxsize"], parameters["typed"]),
        cached.__wrapped__,
        None,
        None,
        _fill_cached,
    )


class _Called:
    """What a rebuilt cached function calls."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _empty_cached(maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(_Called())


def _fill_cached(cached: Any, function: Callable[..., Any]) -> Any:
    cached.__wrapped__.function = function
    return functools.update_wrapper(cached, function)


# ---------------------------------------------------------------- names of __main__


def load_with_main(data: bytes, buffers: Iterable[Any] | None = None) -> Any:
    """Unpickle, in a worker, what :func:`dump` wrote with the names of the caller's ``__main__``.

    They become names of this process's ``__main__``. So a task finds its own functions and classes where
    plain pickle looks for them: ``torch.save(net)``, and what it sends to processes that it forks.

    Parameters
    ----------
    data : bytes
    buffers : iterable, optional
        What lies beside it.
    """
    obj, of_main = _Unpickler(io.BytesIO(data), buffers=buffers, changes_classes=True).load()
    main = sys.modules["__main__"]
    vars(main).update(of_main)
    for each in of_main.values():
        sys.modules.setdefault(each.__module__, main)
    return obj


def send_main_by_value() -> None:
    """Have multiprocessing send functions and classes of ``__main__`` by value from this process, a worker.

    The processes that a task spawns do not run the user's script, and would not find them by their names.
    """
    forking_pickler: Any = reduction.ForkingPickler
    if getattr(forking_pickler, "reducer_override", None) is not _reduce_of_main:
        forking_pickler.reducer_override = _reduce_of_main


def _is_of_main(obj: Any) -> bool:
    return isinstance(obj, types.FunctionType | type) and obj.__module__ in _MAINS


def _reduce_of_main(_: Any, obj: Any) -> Any:
    if _is_of_main(obj):
        return _load_of_main, (dump(obj, with_main=True)[0],)
    return NotImplemented


def _load_of_main(data: bytes) -> Any:
    send_main_by_value()  # What this process sends back, or on, may be of the same kind.
    return load_with_main(data)


# ---------------------------------------------------------------- classes


def loads(data: bytes, buffers: Iterable[Any] | None = None) -> Any:
    """Unpickle an object without changing a class that this process has already.

    cloudpickle sets the attributes of a class that it knows to what they were where the class comes from. So
    a result would undo what the caller has changed meanwhile, and bring what a task did to its copy.

    Parameters
    ----------
    data : bytes
    buffers : iterable, optional
        What lies beside it.
    """
    return _Unpickler(io.BytesIO(data), buffers=buffers).load()


class _Unpickler(pickle.Unpickler):
    """Unpickles what cloudpickle has written, and makes no class a second time.

    cloudpickle makes one before it looks for that which is here: metaclasses and ``__init_subclass__`` saw it
    twice, and those that refuse a name which they know already raised.
    """

    def __init__(
        self, file: io.BytesIO, *, buffers: Iterable[Any] | None, changes_classes: bool = False
    ) -> None:
        super().__init__(file, buffers=buffers)
        self._changes_classes = changes_classes
        self._kept: set[type] = set()  # classes that were here before, and stay as they are
        self._made: set[type] = set()  # those that were not; one that refers to itself is met again

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if found is _cloudpickle._make_skeleton_class or found is _cloudpickle._make_skeleton_enum:
            return functools.partial(self._find_or_make, found)
        return self._set_state if found is _cloudpickle._class_setstate else found

    def _find_or_make(self, make: Callable[..., type], *args: Any) -> type:
        *_, identity, _ = args
        cls: type | None = _cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(identity)
        if cls is None:
            cls = make(*args)
            self._made.add(cls)
        elif cls not in self._made and not self._changes_classes:
            self._kept.add(cls)
        return cls

    def _set_state(self, cls: type, state: Any) -> type:
        return cls if cls in self._kept else _cloudpickle._class_setstate(cls, state)
