"""Unpickles what came from another process, and keeps what this process has already.

- Unpickling a result never changes a class of the caller.
- A function of ``__main__`` travels by value, with the values that its globals have in the caller. Globals
  that the initializer of a worker has set keep their values there, as in a ``ProcessPoolExecutor``.
"""

import functools
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from cloudpickle import cloudpickle as _cloudpickle

__all__ = ["call_and_keep_globals", "load_with_main", "loads"]


def load_with_main(data: bytes, buffers: Iterable[object] | None = None) -> Any:
    """Unpickle, in a worker, what ``dump(with_main=True)`` has pickled with the names of ``__main__``.

    The functions and classes get these names in the ``__main__`` of this process too. So plain pickle finds
    a task's own functions and classes where it looks for them, for example in ``torch.save(net)`` and in what
    a task sends to processes that it forks.

    Parameters
    ----------
    data : bytes
        The pickle.
    buffers : iterable, optional
        The buffers beside the pickle.

    Returns
    -------
    object
    """
    unpickler = _Unpickler(io.BytesIO(data), buffers=buffers, kept_classes=_classes_of_initializers)
    obj, of_main = unpickler.load()
    main = sys.modules["__main__"]
    vars(main).update(of_main)
    for definition in of_main.values():
        sys.modules.setdefault(definition.__module__, main)
    return obj


def loads(data: bytes, buffers: Iterable[object] | None = None) -> Any:
    """Unpickle an object without changing a class that already exists in this process.

    cloudpickle sets the attributes of a class that it knows to the values that they have in the sender. So a
    result would undo changes that the caller has made meanwhile, and bring changes that a task has made to
    its copy of the class.

    Parameters
    ----------
    data : bytes
        The pickle.
    buffers : iterable, optional
        The buffers beside the pickle.

    Returns
    -------
    object
    """
    return _Unpickler(io.BytesIO(data), buffers=buffers, kept_classes=None).load()


# ---------------------------------------------------------------- what an initializer has set

_Namespace = tuple[str, str]
"""The name of a module, and of the function in it whose attributes are meant; "" for the module's globals."""

_set_by_initializers: dict[_Namespace, dict[str, Any]] = {}
_classes_of_initializers: set[type] = set()

# Values that can only be replaced. Any other value may have been changed without being replaced.
_CONSTANTS = (
    bool | int | float | complex | str | bytes | tuple | frozenset | range | type | None,
    types.FunctionType | types.BuiltinFunctionType | types.ModuleType,
)


def call_and_keep_globals(data: bytes) -> None:
    """Unpickle a function, call it, and keep the globals that it sets for later tasks.

    Also kept are attributes of functions (``task.queue = queue`` is a common way to hand a task what cannot
    be pickled) and of classes. A list, a dictionary or another object that can be changed in place is kept if
    the function refers to it, for nobody can say whether it was changed.

    Parameters
    ----------
    data : bytes
        The pickle of a function without parameters.

    Raises
    ------
    Exception
        Whatever unpickling or the function raises.
    """
    unpickler = _Unpickler(io.BytesIO(data), buffers=None, kept_classes=_classes_of_initializers)
    fn = unpickler.load()
    before = {name: dict(namespace) for name, namespace in unpickler.namespaces.items()}
    main = vars(
        sys.modules["__main__"]
    )  # of this process: `sys.modules[__name__].model = model` sets it there
    main_before = dict(main)
    fn()
    replaced = {key: value for key, value in main.items() if main_before.get(key, main) is not value}
    _set_by_initializers.setdefault(("__main__", ""), {}).update(replaced)
    for name, namespace in unpickler.namespaces.items():
        was = before[name]
        kept = {key: value for key, value in namespace.items() if _may_have_changed(was.get(key, was), value)}
        _set_by_initializers.setdefault(name, {}).update(kept)
    _classes_of_initializers.update(unpickler.made)


def _may_have_changed(before: object, value: object) -> bool:
    return value is not before or not isinstance(value, _CONSTANTS)


# ---------------------------------------------------------------- classes and functions sent by value


class _Unpickler(pickle.Unpickler):
    """Unpickles what cloudpickle has pickled, and does not make a class that already exists.

    cloudpickle makes a class before it looks for an existing one. So metaclasses and ``__init_subclass__``
    would see the class twice, and those that refuse a name that they already know would raise.

    Attributes
    ----------
    made : set of type
        Classes that were made here.
    namespaces : dict
        Globals and attributes of the functions that were made here.
    """

    def __init__(
        self, file: io.BytesIO, *, buffers: Iterable[object] | None, kept_classes: set[type] | None
    ) -> None:
        """`kept_classes` are not changed; None stands for all that exist before."""
        super().__init__(file, buffers=buffers)
        self._keeps_all = kept_classes is None
        self._kept = set(kept_classes or ())
        self.made: set[type] = set()  # a class that refers to itself occurs again
        self.namespaces: dict[_Namespace, dict[str, Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        named = super().find_class(module, name)
        if named is _cloudpickle._make_skeleton_class or named is _cloudpickle._make_skeleton_enum:
            return functools.partial(self._find_or_make, named)
        if named is _cloudpickle._class_setstate:
            return self._set_class_state
        return self._set_function_state if named is _cloudpickle._function_setstate else named

    def _find_or_make(self, make: Callable[..., type], *args: object) -> type:
        *_, identity, _ = args
        cls: type | None = _cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(identity)
        if cls is None:
            cls = make(*args)
            self.made.add(cls)
        elif cls not in self.made and self._keeps_all:
            self._kept.add(cls)
        return cls

    def _set_class_state(self, cls: type, state: object) -> type:
        return cls if cls in self._kept else _cloudpickle._class_setstate(cls, state)

    def _set_function_state(self, function: types.FunctionType, state: object) -> None:
        _cloudpickle._function_setstate(function, state)
        module = str(function.__globals__.get("__name__"))
        for name, namespace in (("", function.__globals__), (function.__qualname__, vars(function))):
            self.namespaces[module, name] = namespace
            namespace.update(_set_by_initializers.get((module, name), {}))
