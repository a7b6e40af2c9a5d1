"""A Flower client whose ``fit`` and ``evaluate`` run on an executor."""

import concurrent.futures
import logging
import numbers
import threading
from collections.abc import Callable
from typing import Any

from flwr.client import Client, NumPyClient
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    NDArrays,
    Parameters,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)

from fedexec._system.error_text import one_line
from fedexec.executor import Executor
from fedexec.flower.grpc.client_auth import CHALLENGE, PROOF, REFUSED, prove
from fedexec.flower.task_recorder import TaskRecorder

__all__ = ["ExecutorClient", "decoded", "failed_evaluation", "failed_fit", "require_executor"]

log = logging.getLogger("fedexec.flower")

_OK = Status(Code.OK, "Success")

Config = dict[str, Scalar]
Fit = Callable[[NDArrays, Config], tuple[NDArrays, int, Config]]
Evaluate = Callable[[NDArrays, Config], tuple[float, int, Config]]


class ExecutorClient(NumPyClient):
    """A NumPyClient that does its work on an executor.

    If a task raises, dies or takes too long, the server gets a failed result, and the client stays connected.

    Parameters
    ----------
    executor : concurrent.futures.Executor
        Shared by all clients of a machine, so that its ``max_workers`` limits how many tasks run at once.
    fit : callable
        ``fit(parameters, config) -> (parameters, num_examples, metrics)``, as NumPyClient's.
    evaluate : callable, optional
        ``evaluate(parameters, config) -> (loss, num_examples, metrics)``.
    index : int, optional
        This client's number, which the server gets as the property ``client``. Flower's own ids are random,
        but a run is reproducible only if clients are sampled and averaged in a fixed order.
    secret : bytes, optional
        Shared with the server, which admits only clients that know it; see :func:`fedexec.flower.grpc.serve`.
    recorder : TaskRecorder, optional
        Records what each task costs, if the executor is fedexec's; the clients and the server of a process
        may share it.

    Raises
    ------
    TypeError
        `fit` or `evaluate` is no function, or `executor` no executor.
    """

    def __init__(
        self,
        executor: concurrent.futures.Executor,
        *,
        fit: Fit,
        evaluate: Evaluate | None = None,
        index: int | None = None,
        secret: bytes | None = None,
        recorder: TaskRecorder | None = None,
    ) -> None:
        if not callable(fit) or not (evaluate is None or callable(evaluate)):
            name, wrong = ("evaluate", evaluate) if callable(fit) else ("fit", fit)
            raise TypeError(f"{name} must be a function, got {wrong!r}")
        require_executor(executor)
        if isinstance(executor, Executor) and index is not None:
            executor = executor.with_options(tag=f"client {index}")
        self._executor = executor
        self._recorder = recorder or TaskRecorder()
        self._fit = fit
        self._evaluate = evaluate
        self._secret = secret
        self.index = index
        self.parameters: NDArrays = []
        self.refusal: str | None = None  # the reason that the server has given
        self.has_worked = False

    def get_properties(self, config: Config) -> Config:
        """Send the server this client's number and the answer to its challenge.

        Parameters
        ----------
        config : dict

        Returns
        -------
        dict
        """
        properties: Config = {} if self.index is None else {"client": self.index}
        if config.get(REFUSED):
            self.refusal = str(config[REFUSED])
        if self._secret is not None and CHALLENGE in config:
            properties[PROOF] = prove(self._secret, str(config[CHALLENGE]))
        return properties

    def get_parameters(self, config: Config) -> NDArrays:
        """Return the latest weights.

        Parameters
        ----------
        config : dict
            Not used.

        Returns
        -------
        list of ndarray
            Empty before the first round.
        """
        return self.parameters

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, Config]:
        """Train in a worker.

        Parameters
        ----------
        parameters : list of ndarray
        config : dict

        Returns
        -------
        tuple of (list of ndarray, int, dict)
            New weights, number of samples, metrics.
        """
        self.has_worked = True
        self.parameters = parameters
        new, examples, metrics = self._call("fit", self._fit, parameters, config, list)
        self.parameters = new
        return new, examples, metrics

    def evaluate(self, parameters: NDArrays, config: Config) -> tuple[float, int, Config]:
        """Evaluate in a worker.

        Parameters
        ----------
        parameters : list of ndarray
        config : dict

        Returns
        -------
        tuple of (float, int, dict)
            Loss, number of samples, metrics.

        Raises
        ------
        TypeError
            The client has no `evaluate` function.
        """
        if self._evaluate is None:
            raise TypeError("this client was made without evaluate=")
        self.has_worked = True
        self.parameters = parameters
        loss, examples, metrics = self._call("evaluate", self._evaluate, parameters, config, numbers.Real)
        return float(loss), examples, metrics

    def to_client(self) -> Client:
        """Return the Client that Flower's ``start_client`` expects."""
        return _ReportingClient(self)

    def _call(
        self, kind: str, fn: Callable[..., Any], parameters: NDArrays, config: Config, first: type
    ) -> Any:
        config = dict(config)  # With Flower's own class, each worker would have to import Flower.
        server_round = config.get("server_round")
        result = self._recorder.result_of(
            self._executor.submit(fn, parameters, config), kind=kind, client=self.index,
            server_round=server_round if isinstance(server_round, int) else None,
        )  # fmt: skip
        match result:
            case (value, int(), dict() as metrics) if isinstance(value, first):
                for name, metric in metrics.items():
                    if not isinstance(metric, bool | bytes | float | int | str):
                        raise TypeError(f"{kind}: metric {name!r} is a {type(metric).__name__}, not a scalar")
                return result
        raise TypeError(f"{kind} must return what NumPyClient.{kind} does; got {result!r:.80}")


def require_executor(executor: object) -> None:
    """Raise TypeError if an argument is no executor.

    Parameters
    ----------
    executor : object
    """
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(f"executor must be an executor, got {executor!r}")


_decoding = threading.Lock()


def decoded(parameters: Parameters) -> NDArrays:
    """Decode arrays, in one thread at a time.

    numpy parses an array's header with ``ast``. Python 3.11 counts the parser's recursion depth once for all
    threads: if two threads parse at the same time and the garbage collector runs, one gets a SystemError.

    Parameters
    ----------
    parameters : Parameters

    Returns
    -------
    list of ndarray
    """
    with _decoding:
        return parameters_to_ndarrays(parameters)


class _ReportingClient(Client):
    """Turns exceptions into failed results, because an exception of a Client would end its process."""

    def __init__(self, client: ExecutorClient) -> None:
        self._client = client

    def get_properties(self, ins: GetPropertiesIns) -> GetPropertiesRes:
        return GetPropertiesRes(_OK, self._client.get_properties(ins.config))

    def get_parameters(self, ins: GetParametersIns) -> GetParametersRes:
        return GetParametersRes(_OK, ndarrays_to_parameters(self._client.get_parameters(ins.config)))

    def fit(self, ins: FitIns) -> FitRes:
        try:
            new, examples, metrics = self._client.fit(decoded(ins.parameters), ins.config)
            return FitRes(_OK, ndarrays_to_parameters(new), examples, metrics)
        except Exception as exc:
            return failed_fit(self._report("fit", exc))

    def evaluate(self, ins: EvaluateIns) -> EvaluateRes:
        try:
            loss, examples, metrics = self._client.evaluate(decoded(ins.parameters), ins.config)
            return EvaluateRes(_OK, loss, examples, metrics)
        except Exception as exc:
            return failed_evaluation(self._report("evaluate", exc))

    def _report(self, what: str, error: Exception) -> str:
        reason = one_line(error)
        log.warning("client %s: %s failed: %s", self._client.index, what, reason)
        log.debug("client %s", self._client.index, exc_info=error)
        return reason


def failed_fit(reason: str) -> FitRes:
    """Make the result of a failed fit: Flower has no code for it, but any code except OK is a failure.

    Parameters
    ----------
    reason : str

    Returns
    -------
    FitRes
    """
    empty = Parameters(tensors=[], tensor_type="numpy.ndarray")
    return FitRes(Status(Code.FIT_NOT_IMPLEMENTED, reason), empty, num_examples=0, metrics={})


def failed_evaluation(reason: str) -> EvaluateRes:
    """Make the result of a failed evaluation.

    Parameters
    ----------
    reason : str

    Returns
    -------
    EvaluateRes
    """
    return EvaluateRes(Status(Code.EVALUATE_NOT_IMPLEMENTED, reason), loss=0.0, num_examples=0, metrics={})
