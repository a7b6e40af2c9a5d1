"""Hooks that record what a ServerApp does not return: its strategy's result and evaluations, as they happen.

``ServerApp.main`` returns nothing, and a strategy does not report its evaluations. So during a simulation,
``Strategy.start`` is hooked and, for older apps, ``Server.fit`` and ``DefaultWorkflow``. The hooks act only
on the simulation's own grid; within these calls, a strategy's evaluations are recorded, too.
"""

import contextlib
import functools
import inspect
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.common import Parameters, parameters_to_ndarrays
from flwr.server import Server
from flwr.server.strategy import Strategy as OlderStrategy
from flwr.serverapp.strategy import Strategy

from fedexec.errors import FedexecError
from fedexec.flower.flower_internals import DefaultWorkflow, workflow_arrays
from fedexec.flower.simulation.client_metrics import metrics_of_replies, weighted_means
from fedexec.flower.simulation.grid import ExecutorGrid

__all__ = ["TooFewNodesError", "observed"]


class TooFewNodesError(FedexecError, ValueError):
    """A strategy waits for more nodes than there are, and so would wait for ever.

    Parameters
    ----------
    strategy : str
        Name of its class.
    attribute : str
        The strategy's attribute that demands the nodes.
    wanted, there : int
        Number of nodes that are demanded, and that exist.
    """

    def __init__(self, strategy: str, attribute: str, wanted: int, there: int) -> None:
        super().__init__(strategy, attribute, wanted, there)
        self.strategy, self.attribute, self.wanted, self.there = strategy, attribute, wanted, there

    def __str__(self) -> str:
        return (
            f"{self.strategy} waits for {self.wanted} nodes ({self.attribute}={self.wanted}), but there are "
            f"{self.there}. Simulate {self.wanted}, or lower {self.attribute}."
        )


@contextlib.contextmanager
def observed(grid: ExecutorGrid) -> Iterator[None]:
    """Hook the strategies' methods, so that the grid's recorder learns of results and evaluations.

    Parameters
    ----------
    grid : ExecutorGrid

    Yields
    ------
    None
    """
    observer = _Observer(grid)
    with contextlib.ExitStack() as stack:
        for base, name, hook in (
            (Strategy, "start", observer.start),
            (Strategy, "aggregate_train", observer.aggregate_train),
            (Strategy, "aggregate_evaluate", observer.aggregate_evaluate),
            (Server, "fit", observer.fit),
            (DefaultWorkflow, "__call__", observer.work),
            (OlderStrategy, "evaluate", observer.evaluate),
            (OlderStrategy, "aggregate_fit", observer.aggregate_train),
            (OlderStrategy, "aggregate_evaluate", observer.aggregate_evaluate),
        ):
            for kind in _with_subclasses(base):
                if name in vars(kind):
                    original = vars(kind)[name]
                    setattr(kind, name, _hooked(original, _LocalHook(hook)))
                    stack.callback(setattr, kind, name, original)
        yield


def _with_subclasses(kind: Any) -> Iterator[Any]:
    yield kind
    for child in kind.__subclasses__():
        yield from _with_subclasses(child)


class _LocalHook:
    """Holds a hook in this process only: a class that is pickled with its methods arrives without hooks."""

    def __init__(self, hook: Callable[..., Any] | None = None) -> None:
        self.hook = hook

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def _hooked(original: Callable[..., Any], holder: _LocalHook) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if holder.hook is None:
            return original(self, *args, **kwargs)
        return holder.hook(original, self, *args, **kwargs)

    return method


def _bind(
    function: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[inspect.BoundArguments, ChainMap[str, Any]]:
    """Return a call's arguments, and all of them by name, including those within ``**options``."""
    signature = inspect.signature(function)
    call = signature.bind(*args, **kwargs)
    call.apply_defaults()
    rest = [
        name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD
    ]
    return call, ChainMap(call.arguments, *(call.arguments[name] for name in rest))


class _Observer:
    def __init__(self, grid: ExecutorGrid) -> None:
        self._grid = grid
        self._recorder = grid.recorder

    def start(self, original: Callable[..., Any], strategy: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces ``Strategy.start``."""
        call, given = _bind(original, strategy, *args, **kwargs)
        if given.get("grid") is not self._grid:
            return original(strategy, *args, **kwargs)
        _check_nodes(strategy, self._grid.num_nodes)
        evaluate_fn = given.get("evaluate_fn")
        if evaluate_fn is not None:
            where = next(place for place in given.maps if "evaluate_fn" in place)
            where["evaluate_fn"] = self._reported(evaluate_fn)
        with self._recorder.start(given.get("num_rounds")) as start:
            result = original(*call.args, **call.kwargs)
        self._recorder.returned(start, result, getattr(result, "arrays", None) or None)
        return result

    def fit(self, original: Callable[..., Any], server: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces ``Server.fit``."""
        _, given = _bind(original, server, *args, **kwargs)
        _check_nodes(server.strategy, self._grid.num_nodes)
        sorting = _sorted_results(server.strategy, self._grid.get_node_ids())
        with self._recorder.start(given.get("num_rounds")) as start, sorting:
            answer = original(server, *args, **kwargs)
        history = answer[0] if isinstance(answer, tuple) else answer
        self._recorder.returned(start, history, _arrays(getattr(server, "parameters", None)))
        return answer

    def work(self, original: Callable[..., Any], workflow: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces ``DefaultWorkflow.__call__``."""
        _, given = _bind(original, workflow, *args, **kwargs)
        context = given["context"]
        if given["grid"] is not self._grid or not hasattr(context, "strategy"):
            return original(workflow, *args, **kwargs)
        _check_nodes(context.strategy, self._grid.num_nodes)
        with self._recorder.start(context.config.num_rounds) as start:
            answer = original(workflow, *args, **kwargs)
        self._recorder.returned(start, context.history, workflow_arrays(context))
        return answer

    def evaluate(self, original: Callable[..., Any], strategy: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces ``evaluate`` of an older strategy, which evaluates the global model on the server."""
        answer = original(strategy, *args, **kwargs)
        if answer is not None and self._recorder.within() is not None:
            self._recorder.evaluated(_server_round(args, kwargs), *answer)
        return answer

    def aggregate_train(self, original: Callable[..., Any], strategy: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces ``aggregate_train``, and ``aggregate_fit`` of older strategies: arrays and metrics."""
        answer, means = _with_means(original, strategy, args, kwargs)
        metrics = (answer[1] if isinstance(answer, tuple) and len(answer) == 2 else None) or means()
        if self._recorder.within() is not None and metrics:
            self._recorder.trained(_server_round(args, kwargs), metrics)
        return answer

    def aggregate_evaluate(
        self, original: Callable[..., Any], strategy: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Replaces ``aggregate_evaluate``, which returns metrics; in older strategies, a loss and metrics."""
        answer, means = _with_means(original, strategy, args, kwargs)
        loss, metrics = answer if isinstance(answer, tuple) else (None, answer)
        metrics = metrics or means()
        if self._recorder.within() is not None and (loss is not None or metrics):
            self._recorder.evaluated_by_clients(_server_round(args, kwargs), loss, metrics)
        return answer

    def _reported(self, evaluate_fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(evaluate_fn)
        def evaluate(server_round: int, *args: Any, **kwargs: Any) -> Any:
            answer = evaluate_fn(server_round, *args, **kwargs)
            metrics = dict(answer) if isinstance(answer, Mapping) else {}
            loss = metrics.pop("loss") if isinstance(metrics.get("loss"), int | float) else None
            self._recorder.evaluated(server_round, loss, metrics, closes=True)
            return answer

        return evaluate


def _with_means(
    original: Callable[..., Any], strategy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Callable[[], dict[str, float]]]:
    """Let a strategy aggregate; also return what gives the clients' means, if the strategy gives none."""
    replies = args[1] if len(args) > 1 else kwargs.get("replies", kwargs.get("results", ()))
    seen: list[tuple[Mapping[str, Any], float]] = []
    if isinstance(replies, Sequence):
        answer = original(strategy, *args, **kwargs)
        return answer, lambda: weighted_means(metrics_of_replies(replies))

    def passing() -> Iterator[Any]:  # a strategy may take the replies one by one, to hold few of them
        for reply in replies:
            seen.extend(metrics_of_replies([reply]))
            yield reply

    if len(args) > 1:
        args = (args[0], passing(), *args[2:])
    else:
        kwargs = {**kwargs, "replies": passing()}
    return original(strategy, *args, **kwargs), lambda: weighted_means(seen)


def _server_round(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return int(args[0] if args else kwargs["server_round"])


def _arrays(parameters: Parameters | None) -> ArrayRecord | None:
    """Return an older app's parameters as an ArrayRecord; tensors that are not arrays become bytes."""
    if parameters is None:
        return None
    try:
        arrays = parameters_to_ndarrays(parameters)
    # The tensors may be anything (an XGBoost tree, for instance), and numpy raises different exceptions for
    # them.
    except Exception:
        arrays = [np.frombuffer(tensor, np.uint8) for tensor in parameters.tensors]
    return ArrayRecord(arrays) if arrays else None


@contextlib.contextmanager
def _sorted_results(strategy: Any, node_ids: list[int]) -> Iterator[None]:
    """Let an older strategy aggregate in the order of the partitions, not of arrival."""
    rank = {str(node_id): index for index, node_id in enumerate(node_ids)}

    def in_order(aggregate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(aggregate)
        def ordered(server_round: int, results: list[Any], failures: list[Any]) -> Any:
            results = sorted(results, key=lambda result: rank.get(result[0].cid, -1))
            return aggregate(server_round, results, failures)

        return ordered

    names = ("aggregate_fit", "aggregate_evaluate")
    for name in names:
        setattr(strategy, name, in_order(getattr(strategy, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(strategy, name)


def _check_nodes(strategy: Any, there: int) -> None:
    """Raise TooFewNodesError if one of Flower's own attributes makes the strategy wait for too many nodes."""
    for attribute, fraction in (
        ("min_available_nodes", None),
        ("min_train_nodes", "fraction_train"),
        ("min_evaluate_nodes", "fraction_evaluate"),
        ("min_available_clients", None),
        ("min_fit_clients", "fraction_fit"),
        ("min_evaluate_clients", "fraction_evaluate"),
    ):
        minimum = getattr(strategy, attribute, 0)
        used = fraction is None or getattr(strategy, fraction, 1.0) > 0
        if isinstance(minimum, int) and minimum > there and used:
            raise TooFewNodesError(type(strategy).__name__, attribute, minimum, there)
    inner = getattr(strategy, "strategy", None)  # A strategy may wrap another one.
    if inner is not None:
        _check_nodes(inner, there)
