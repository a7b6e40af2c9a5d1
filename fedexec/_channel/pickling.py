"""Pickles objects for the way between the caller and its workers, with cloudpickle and these additions.

- What ``__main__`` defines is pickled by value, with the name of its file, so that tracebacks show its lines.
  (In a process that multiprocessing has spawned, that module is called ``__mp_main__``.) A module that only
  the sender can import is pickled by value too.
- torch's CPU tensors are pickled like arrays: their bytes lie in buffers beside the pickle.
- A function with ``functools.lru_cache`` is pickled without its cache, ``cached_property`` without its lock.
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
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from multiprocessing import reduction
from typing import Any, NamedTuple

import cloudpickle
from cloudpickle import cloudpickle as _cloudpickle

from fedexec._channel.unpickling import load_with_main
from fedexec._system.installed import is_installed

__all__ = [
    "Blob",
    "Packed",
    "Pickler",
    "Sources",
    "dump",
    "dumps",
    "send_main_by_value",
    "show_sources",
]

Sources = tuple[tuple[str, tuple[str, ...]], ...]
"""(file name, lines) of code whose source only the sender's process has: notebook cells."""


class Blob:
    """Bytes that are pickled beside the pickle, so that an engine need not copy them.

    Parameters
    ----------
    data : buffer
    """

    def __init__(self, data: Any) -> None:
        self.data = memoryview(data).cast("B")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Blob, (pickle.PickleBuffer(self.data) if protocol >= 5 else bytes(self.data),)


class Packed(NamedTuple):
    """A pickled object.

    Attributes
    ----------
    data : bytes
        The pickle.
    buffers : sequence of buffer
        The buffers beside the pickle; each is contiguous bytes.
    sources : Sources
        Source lines of the pickled functions that were defined in notebook cells.
    """

    data: bytes
    buffers: Sequence[memoryview]
    sources: Sources = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _packed, (self.data, [Blob(buffer) for buffer in self.buffers], self.sources)


def _packed(data: bytes, blobs: Sequence[Blob], sources: Sources) -> Packed:
    return Packed(data, [blob.data for blob in blobs], sources)


_MAINS = ("__main__", "__mp_main__")
# Not register_pickle_by_value, which accepts only modules that are loaded in this process.
_cloudpickle._PICKLE_BY_VALUE_MODULES.update(_MAINS)


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    """Pickle code as cloudpickle does, but with the name of its file, which cloudpickle 3.1.3 omits."""
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
        Files of the functions that have been pickled.
    of_main : dict of str to object
        Functions and classes of ``__main__`` that have been pickled, by their names there.
    """

    dispatch_table = cloudpickle.Pickler.dispatch_table.new_child({types.CodeType: _reduce_code})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.files: set[str] = set()
        self.of_main: dict[str, types.FunctionType | type] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Reduce objects that cloudpickle does not reduce, or not in the way that workers need."""
        # A program that has a tensor has imported torch, but another thread may be importing torch just now.
        torch = sys.modules.get("torch")
        kinds = (getattr(torch, "Tensor", None), getattr(getattr(torch, "nn", None), "Parameter", None))
        if torch is not None and type(obj) in kinds and _is_plain(torch, obj):
            return _reduce_tensor(torch, obj)
        if _is_of_main(obj):
            self._note(obj)
        elif isinstance(obj, types.FunctionType | type) and obj.__module__:  # exec() can leave it None
            _send_by_value_if_only_here(obj.__module__)
        if type(obj) is types.FunctionType:
            self.files.add(obj.__code__.co_filename)
        elif type(obj) is functools._lru_cache_wrapper and _is_sent_by_value(obj):
            return _reduce_cached(obj)
        elif type(obj) is weakref.WeakKeyDictionary:  # functools.singledispatch uses one
            return weakref.WeakKeyDictionary, (dict(obj),)
        elif type(obj) is types.MappingProxyType:
            return types.MappingProxyType, (gc.get_referents(obj)[0],)
        elif issubclass(type(obj), BaseException) and (base := _plain_base(type(obj))) is not None:
            _, args, *state = obj.__reduce__()
            return _exception, (type(obj), base, args), *state
        elif type(obj) is functools.cached_property:  # it has a lock up to Python 3.11
            return functools.cached_property, (obj.func,), {"attrname": obj.attrname, "__doc__": obj.__doc__}
        return super().reducer_override(obj)

    def _note(self, obj: types.FunctionType | type) -> None:
        name = obj.__qualname__
        if vars(sys.modules["__main__"]).get(name) is obj:
            self.of_main[name] = obj


@functools.cache
def _send_by_value_if_only_here(name: str) -> None:
    """Have a module of the user be pickled by value if no other process could import it by its name.

    A program may load a file under another name, as programs with plug-ins do, or create a module itself.
    """
    package = name.partition(".")[0]
    if name not in sys.modules or is_installed(name) or is_installed(package) or package in _MAINS:
        return
    parent = sys.modules.get(name.rpartition(".")[0])
    path = getattr(parent, "__path__", None)
    if not any(_finds(finder, name, path) for finder in sys.meta_path):
        _cloudpickle._PICKLE_BY_VALUE_MODULES.add(name)


def _finds(finder: Any, name: str, path: Sequence[str] | None) -> bool:
    try:
        return finder.find_spec(name, path) is not None
    except Exception:  # the finder does not handle such names
        return False


def dump(obj: object, *, with_main: bool = False) -> Packed:
    """Pickle an object.

    Parameters
    ----------
    obj : object
    with_main : bool
        Whether to add the names by which ``__main__`` knows the objects that are pickled by value; then
        :func:`fedexec._channel.unpickling.load_with_main` reads the pickle.

    Returns
    -------
    Packed
    """
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = Pickler(file, protocol=5, buffer_callback=buffers.append)
    # These names are pickled last, because only then all of them are known.
    pickler.dump((obj, pickler.of_main) if with_main else obj)
    return Packed(file.getvalue(), [buffer.raw() for buffer in buffers], _sources(pickler.files))


def dumps(obj: object) -> bytes:
    """Pickle an object without buffers beside the pickle, and by value what ``__main__`` defines.

    Parameters
    ----------
    obj : object

    Returns
    -------
    bytes
    """
    file = io.BytesIO()
    Pickler(file, protocol=5).dump(obj)
    return file.getvalue()


def _sources(files: Iterable[str]) -> Sources:
    """Return the lines of those files that do not exist on disk but that linecache knows: notebook cells."""
    return tuple(
        (name, tuple(linecache.getlines(name)))
        for name in sorted(files)
        if name in linecache.cache and not os.path.exists(name)  # noqa: PTH110
    )


def show_sources(sources: Sources) -> None:
    """Have tracebacks in this process show these source lines.

    Parameters
    ----------
    sources : Sources
    """
    for name, lines in sources:
        linecache.cache[name] = (sum(map(len, lines)), None, list(lines), name)


# ---------------------------------------------------------------- tensors


def _is_plain(torch: types.ModuleType, tensor: Any) -> bool:
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


def _reduce_tensor(torch: types.ModuleType, tensor: Any) -> tuple[Any, ...]:
    raw = tensor.detach().view(-1).view(torch.uint8).numpy()
    is_parameter = type(tensor) is torch.nn.Parameter
    shape = tuple(tensor.shape)
    return _tensor, (pickle.PickleBuffer(raw), tensor.dtype, shape, tensor.requires_grad, is_parameter)


def _tensor(buffer: Any, dtype: Any, shape: tuple[int, ...], requires_grad: bool, is_parameter: bool) -> Any:
    """Rebuild a tensor on the memory in which its bytes lie."""
    torch = import_module("torch")
    writable = buffer if not memoryview(buffer).readonly else bytearray(buffer)
    tensor = torch.frombuffer(writable, dtype=torch.uint8).view(dtype).view(shape)
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad)


# ---------------------------------------------------------------- exceptions


def _plain_base(cls: type[BaseException]) -> type[BaseException] | None:
    """Return the built-in base of an exception class, if the class pickles as that base does; else None."""
    base = next(ancestor for ancestor in cls.__mro__ if ancestor.__module__ == "builtins")
    reduces: list[object] = [base.__reduce__, object.__reduce_ex__]
    return base if base is not cls and [cls.__reduce__, cls.__reduce_ex__] == reduces else None


def _exception(cls: type[BaseException], base: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """Rebuild an exception without calling its ``__init__``, which may take other arguments than `args`."""
    maker: type[BaseException] = cls
    while maker.__module__ != "builtins":  # not always `base`: of several built-in bases one makes the object
        assert maker.__base__ is not None
        maker = maker.__base__
    error = maker.__new__(cls, *args)
    base.__init__(error, *args)
    return error


# ---------------------------------------------------------------- functools.lru_cache


def _is_sent_by_value(function: object) -> bool:
    name = getattr(function, "__qualname__", None)
    if getattr(function, "__module__", None) in _MAINS:
        return True
    return name is not None and _cloudpickle._lookup_module_and_qualname(function, name=name) is None


def _reduce_cached(cached: Any) -> tuple[Any, ...]:
    """Pickle a function with a cache; its shell comes first, because the function may call itself by name."""
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
    """The function inside the shell of a rebuilt cached function."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _empty_cached(maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(_Called())


def _fill_cached(cached: Any, function: Callable[..., Any]) -> Any:
    cached.__wrapped__.function = function
    return functools.update_wrapper(cached, function)


# ---------------------------------------------------------------- functions and classes of __main__


def send_main_by_value() -> None:
    """Have multiprocessing send functions and classes of ``__main__`` by value from this process, a worker.

    Processes that a task spawns do not run the user's script, so they would not find these by name.
    """
    forking_pickler: Any = reduction.ForkingPickler
    if getattr(forking_pickler, "reducer_override", None) is not _reduce_of_main:
        forking_pickler.reducer_override = _reduce_of_main


def _is_of_main(obj: object) -> bool:
    return isinstance(obj, types.FunctionType | type) and obj.__module__ in _MAINS


def _reduce_of_main(_: object, obj: object) -> Any:
    if _is_of_main(obj):
        return _load_of_main, (dump(obj, with_main=True)[0],)
    return NotImplemented


def _load_of_main(data: bytes) -> Any:
    send_main_by_value()  # this process may send such functions and classes too
    return load_with_main(data)
