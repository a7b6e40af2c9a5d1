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
from typing import Any, cast

from cloudpickle import cloudpickle as _cloudpickle

__all__ = ["call_and_keep_globals", "load_with_main", "loads"]


def load_with_main(data: bytes, buffers: Iterable[object] | None = None, *, is_task: bool = False) -> Any:
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
    is_task : bool
        Whether this is a task of this worker, and not what a task receives from another process. Only then do
        its functions share their globals with the initializer.

    Returns
    -------
    object
    """
    unpickler = _Unpickler(
        io.BytesIO(data), buffers=buffers, kept_classes=_classes_of_initializers, shares_globals=is_task
    )
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
_globals_of_initializers: dict[str, dict[str, Any]] = {}
"""The globals of each module. Tasks use the same, because methods of a model that an initializer made do."""

# Values that can only be replaced. Any other value may have been changed without being replaced.
_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, range, type, types.NoneType),
    *(types.BuiltinFunctionType, types.MethodType, types.ModuleType),
)


def call_and_keep_globals(data: bytes) -> None:
    """Unpickle a function, call it, and keep the globals that it sets for later tasks.

    Also kept are attributes of functions (``task.queue = queue`` is a common way to hand a task what cannot
    be pickled) and of classes. A list, a dictionary or another object that can be changed in place is kept if
    the function refers to it, for nobody can say whether it was changed. So is a tuple that holds such an
    object, and a function: many decorators keep a cache in the functions that they return.

    Parameters
    ----------
    data : bytes
        The pickle of a function without parameters.

    Raises
    ------
    Exception
        Whatever unpickling or the function raises.
    """
    unpickler = _Unpickler(
        io.BytesIO(data), buffers=None, kept_classes=_classes_of_initializers, shares_globals=True
    )
    fn = unpickler.load()
    for (module, function), namespace in unpickler.namespaces.items():
        if not function:
            _globals_of_initializers.setdefault(module, namespace)
    before = {name: dict(namespace) for name, namespace in unpickler.namespaces.items()}
    main = vars(sys.modules["__main__"])  # `sys.modules[__name__].model = model` sets it there
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
    return value is not before or not _is_constant(value, set())


def _is_constant(value: object, seen: set[int]) -> bool:
    """Return whether neither a value nor what it holds can be changed without being replaced."""
    if id(value) in seen:  # a function that refers to itself
        return True
    seen.add(id(value))
    held: list[object] = []
    if issubclass(type(value), tuple | frozenset):
        held += cast(Iterable[object], value)
    elif type(value) is types.FunctionType:
        empty = types.CellType()  # as the cell of a name that has no value yet
        held += (cell.cell_contents for cell in value.__closure__ or () if cell != empty)
        held += value.__defaults__ or ()
        held += (value.__kwdefaults__ or {}).values()
        if not _has_name(value):  # otherwise its attributes are kept by its name
            held += vars(value).values()
    elif not issubclass(type(value), _CONSTANTS):
        return False
    return all(_is_constant(each, seen) for each in held)


def _has_name(function: types.FunctionType) -> bool:
    """Return whether a function has a name of its own: lambdas do not, nor does what a decorator returns."""
    return "<" not in function.__qualname__


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
        self,
        file: io.BytesIO,
        *,
        buffers: Iterable[object] | None,
        kept_classes: set[type] | None,
        shares_globals: bool = False,
    ) -> None:
        """`kept_classes` are not changed; None stands for all that exist before."""
        super().__init__(file, buffers=buffers)
        self._keeps_all = kept_classes is None
        self._kept = set(kept_classes or ())
        self.made: set[type] = set()  # a class that refers to itself occurs again
        self.namespaces: dict[_Namespace, dict[str, Any]] = {}
        self._shares_globals = shares_globals
        self._first_globals: dict[str, dict[str, Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        named = super().find_class(module, name)
        if named is _cloudpickle._make_skeleton_class or named is _cloudpickle._make_skeleton_enum:
            return functools.partial(self._find_or_make, named)
        if named is _cloudpickle._class_setstate:
            return self._set_class_state
        if named is _cloudpickle._make_function:
            return self._make_function
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

    def _make_function(
        self, code: types.CodeType, globals_: dict[str, Any], *args: object
    ) -> types.FunctionType:
        module = globals_.get("__name__", "")
        if self._shares_globals and self._first_globals.setdefault(module, globals_) is globals_:
            globals_ = _globals_of_initializers.get(module, globals_)
        function: types.FunctionType = _cloudpickle._make_function(code, globals_, *args)
        return function

    def _set_function_state(self, function: types.FunctionType, state: object) -> None:
        _cloudpickle._function_setstate(function, state)
        module = function.__globals__.get("__name__")
        if module is None:
            return  # a bare exec() made it, as attrs does: many functions have such globals, each its own
        namespaces = {"": function.__globals__}
        if _has_name(function):
            namespaces[function.__qualname__] = vars(function)
        for name, namespace in namespaces.items():
            self.namespaces[module, name] = namespace
            namespace.update(_set_by_initializers.get((module, name), {}))
