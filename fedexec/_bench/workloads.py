"""What a client computes: three jobs of ours, or a function of the user's."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedexec._bench import tasks
from fedexec._system.error_text import message_of, one_line
from fedexec._system.find_by_name import find_attribute, split_name
from fedexec._workload import jobs
from fedexec.errors import FedexecError

__all__ = ["BUILT_IN", "OwnTask", "TaskError", "Workload", "find", "workload"]


class TaskError(FedexecError, ValueError):
    """A function of the user's that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A job.

    Attributes
    ----------
    fn : callable
        Computes one client.
    initial : callable or None
        Runs in a worker and returns the weights that all clients get; `fn` gets them and the client.
    factory : callable or None
        Instead: takes the client and returns the arguments.
    preload : tuple of str
        What a worker has imported before.
    warmup : callable or None
        What is done once where workers are forked from.
    charges : bool
        Whether it enters its tensors into the books of an EMULATED device.
    """

    name: str
    fn: Callable[..., Any]
    initial: Callable[[], Any] | None = None
    factory: Callable[[int], Any] | None = None
    preload: tuple[str, ...] = ()
    warmup: Callable[[], object] | None = None
    charges: bool = False
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        """The first package it needs that is not installed."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)

    def arguments(self, call: Callable[..., Any], clients: int) -> list[tuple[Any, ...]]:
        """Return the arguments of each client; `call` runs something in a worker."""
        if self.initial is not None:
            weights = call(self.initial)
            return [(weights, client) for client in range(clients)]
        if self.factory is None:
            return [()] * clients
        return [_as_tuple(self.factory(client)) for client in range(clients)]


@dataclass(frozen=True, slots=True)
class OwnTask:
    """The names of the user's function and of what makes its arguments, ``module:function``."""

    task: str
    arguments: str | None = None

    @property
    def modules(self) -> list[str]:
        """Where they stand."""
        return sorted({name.partition(":")[0] for name in (self.task, self.arguments) if name})


_CNN = {
    "initial": tasks.initial_weights,
    "preload": (*jobs.PRELOAD, "fedexec._bench.tasks"),
    "warmup": tasks.warm_up_cnn,
    "charges": True,
    "needs": ("torch",),
}

BUILT_IN = {
    made.name: made
    for made in (
        Workload(name="cnn", fn=functools.partial(tasks.fit, "cnn"), **_CNN),  # type: ignore[arg-type]
        Workload(name="cnn-short", fn=functools.partial(tasks.fit, "cnn-short"), **_CNN),  # type: ignore[arg-type]
        Workload(
            name="resnet18",
            fn=tasks.fit_resnet,
            initial=tasks.initial_resnet,
            preload=(*jobs.PRELOAD, "torchvision.models", "fedexec._bench.tasks"),
            warmup=tasks.warm_up_resnet,
            charges=True,
            needs=("torch", "torchvision"),
        ),
        Workload(
            name="numpy",
            fn=tasks.fit_numpy,
            initial=tasks.initial_numpy,
            preload=("numpy", "fedexec._bench.tasks"),
        ),
    )
}


def workload(name: str, own: OwnTask | None) -> Workload:
    """Return a job by its name; the user's bears the name of its function."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    assert own is not None
    factory = find("--arguments", own.arguments) if own.arguments else None
    module = own.task.partition(":")[0]
    return Workload(
        name=own.task, fn=find("--task", own.task), factory=factory, preload=(module, "fedexec._bench.tasks")
    )


def find(option: str, name: str) -> Callable[..., Any]:
    """Import a function by ``module:function``, also from the current directory.

    Raises
    ------
    TaskError
        There is none.
    """
    try:
        module, attribute = split_name(name)
    except ValueError as exc:
        raise TaskError(f"{option} {name}: write it like package.module:function") from exc
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        fn = find_attribute(module, attribute)
    except (ImportError, AttributeError) as exc:
        raise TaskError(f"{option} {name}: {message_of(exc)}") from exc
    except (Exception, SystemExit) as exc:  # a script that runs when it is imported
        raise TaskError(f"{option} {name}: importing it failed: {one_line(exc)}") from exc
    if not callable(fn):
        raise TaskError(f"{option} {name}: that is a {type(fn).__name__}, not a function")
    return fn  # type: ignore[no-any-return]


def _as_tuple(arguments: Any) -> tuple[Any, ...]:
    if not isinstance(arguments, tuple):
        raise TaskError(
            f"--arguments returned a {type(arguments).__name__}; it is to return the arguments as a tuple"
        )
    return arguments
