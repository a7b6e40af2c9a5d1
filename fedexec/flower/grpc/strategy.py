"""FedAvg for reproducible runs, with a record of each round.

Flower's node ids are random, and results arrive in any order. So clients are identified by the property
``client`` of :class:`~fedexec.flower.grpc.ExecutorClient`, and are sampled and averaged in that order.
"""

import logging
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from flwr.common import (
    Code,
    EvaluateIns,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from fedexec._system.error_text import one_line
from fedexec.errors import WorkerError
from fedexec.flower.grpc.client_proxy import Awaited, NumberedProxy, ask_index
from fedexec.flower.grpc.result_checks import (
    DueMetrics,
    RoundFailedError,
    UnsoundError,
    as_model,
    check_evaluation,
    check_fit,
    limits_of,
    mean_evaluation,
)
from fedexec.flower.history import Round
from fedexec.flower.round_recorder import RoundRecorder

__all__ = ["FedAvgMp"]

log = logging.getLogger("fedexec.flower")

LONGEST_REASON = 20_000  # number of characters, because a client may have written the reason

Results = list[tuple[ClientProxy, Any]]
Failures = list[tuple[ClientProxy, Any] | BaseException]


class FedAvgMp(FedAvg):
    """FedAvg with seeded sampling, and without client evaluation by default (as in the tutorial).

    Parameters
    ----------
    fit_clients : int
        How many clients train in each round; fewer if fewer are connected.
    available_clients : int
        How many clients must be connected before the first round.
    seed : int
        Together with the round and the connected clients, it determines which clients are sampled.
    evaluate_clients : int
        How many clients evaluate after each round; 0 means none.
    on_progress : callable
        ``on_progress(round, done)``, called after each sampled client's answer and when a round is over.
    on_waiting : callable
        ``on_waiting(there, needed)``, called once per second while clients are awaited; it raises to give up.
    min_results : int
        How many clients must return a result; otherwise the round fails, and the run with it.
    stall_seconds : float
        After this time without an answer in a round, the log names the clients that the server waits for.
    done : sequence of Round
        Rounds of a run that is resumed; `initial_parameters` is the model after the last of them.
    **fedavg
        Arguments of Flower's FedAvg.

    Raises
    ------
    TypeError, ValueError
        A number of clients is not a whole number, or too small.
    """

    def __init__(
        self,
        *,
        fit_clients: int,
        available_clients: int,
        seed: int = 0,
        evaluate_clients: int = 0,
        on_progress: Callable[[Round, int], object] = lambda round_, done: None,
        on_waiting: Callable[[int, int], object] = lambda there, needed: None,
        min_results: int = 1,
        stall_seconds: float = 60.0,
        done: Sequence[Round] = (),
        **fedavg: Any,
    ) -> None:
        for name, number, least in (
            ("fit_clients", fit_clients, 1),
            ("available_clients", available_clients, 1),
            ("evaluate_clients", evaluate_clients, 0),
            ("min_results", min_results, 1),
        ):
            _require_number(name, number, least)
        super().__init__(min_available_clients=available_clients, **fedavg)
        self._recorder = RoundRecorder(
            1, lambda current, done, planned: on_progress(current, done), by_strategy=True, rounds=done
        )
        self._before = done[-1].server_round if done else 0  # number of rounds that Flower does not know of
        self._min_results = min_results
        self.parameters: Parameters | None = None  # the global model at its last evaluation
        self._fit_clients = fit_clients
        self._evaluate_clients = evaluate_clients
        self._seed = seed
        self._on_waiting = on_waiting
        self._indices: dict[str, int] = {}  # cid -> client number
        self._awaited = Awaited(stall_seconds)
        self._answers = threading.Lock()  # guards what the threads that talk to clients record

    @property
    def rounds(self) -> list[Round]:
        """The rounds so far; round 0 is the initial model."""
        return self._recorder.rounds

    # ------------------------------------------------------------ called by Flower, in this order

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Sample the clients that train.

        Parameters
        ----------
        server_round : int
            Flower's count.
        parameters : Parameters
            The global model.
        client_manager : ClientManager

        Returns
        -------
        list of tuple of (ClientProxy, FitIns)

        Raises
        ------
        RoundFailedError
            No client is connected.
        """
        server_round += self._before
        if server_round == self._before + 1:
            needed = self.min_available_clients
            while (there := client_manager.num_available()) < needed:
                self._on_waiting(there, needed)
                client_manager.wait_for(needed, timeout=1)
        current = self._recorder.round(server_round)
        self.parameters = parameters
        sampled = self._sample(server_round, "fit", self._fit_clients, client_manager)
        if not sampled:
            raise RoundFailedError(server_round, ())
        self._recorder.trains(current, [client.index for client in sampled])
        ins = FitIns(parameters, self._config(server_round))
        return [(client, ins) for client in sampled]

    def aggregate_fit(
        self, server_round: int, results: Results, failures: Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Average the results that fit the model, in the order of the clients' numbers.

        Parameters
        ----------
        server_round : int
            Flower's count.
        results : list of tuple of (ClientProxy, FitRes)
        failures : list
            Failed results and exceptions.

        Returns
        -------
        tuple of (Parameters or None, dict)
            The new global model, and metrics.

        Raises
        ------
        RoundFailedError
            Too few results are usable, or the average overflows.
        """
        server_round += self._before
        assert self.parameters is not None
        model = parameters_to_ndarrays(self.parameters)
        limits = limits_of(model)
        due = DueMetrics.of([res.metrics for _, res in results], {})

        def check(res: FitRes) -> str | None:
            if self.fit_metrics_aggregation_fn is not None:
                due.check(res.metrics)
            return check_fit(model, limits, res)

        sound, failures = self._sift(results, failures, check)
        parameters, metrics = self._average(server_round, sound, failures)
        if parameters is None:
            return None, metrics
        average = as_model(model, parameters_to_ndarrays(parameters))
        if average is None:  # Average again without suspicious results, which may be the cause.
            sound = self._without_odd(sound)
            parameters, metrics = self._average(server_round, sound, failures)
            average = None if parameters is None else as_model(model, parameters_to_ndarrays(parameters))
            if average is None:
                raise RoundFailedError(server_round, ("The average overflows.",))
        return ndarrays_to_parameters(average), metrics

    def _average(
        self, server_round: int, sound: Results, failures: Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        if len(sound) < self._min_results:
            reasons = tuple(str(failure["reason"]) for failure in self.rounds[-1].failures)
            raise RoundFailedError(server_round, reasons, len(sound), self._min_results)
        return super().aggregate_fit(server_round, sound, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate the global model on the server.

        Parameters
        ----------
        server_round : int
            Flower's count.
        parameters : Parameters
            The global model.

        Returns
        -------
        tuple of (float, dict) or None
            Loss and metrics; None if there is no evaluation, or if its worker has failed.
        """
        self.parameters = parameters
        if server_round == 0 and self.rounds:  # The run was resumed, so its initial model has been evaluated.
            last = self.rounds[-1]
            return None if last.loss is None else (last.loss, last.metrics)
        server_round += self._before
        current = self._recorder.round(server_round)
        try:
            result = super().evaluate(server_round, parameters)
        except WorkerError as exc:  # The model is not lost, so the run continues.
            result = None
            self._recorder.failed(current, None, f"server evaluation: {exc}")
            log.warning("round %s: server evaluation failed: %s", server_round, str(exc))
        if result is not None:
            self._recorder.evaluated(server_round, *result, closes=False)
        if server_round == 0 or not self._evaluate_clients:
            self._recorder.close_now()
        return result

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Sample the clients that evaluate; by default there are none.

        Parameters
        ----------
        server_round : int
            Flower's count.
        parameters : Parameters
            The global model.
        client_manager : ClientManager

        Returns
        -------
        list of tuple of (ClientProxy, EvaluateIns)
        """
        server_round += self._before
        if not self._evaluate_clients:
            return []
        sampled = self._sample(server_round, "evaluate", self._evaluate_clients, client_manager)
        ins = EvaluateIns(parameters, self._config(server_round))
        return [(client, ins) for client in sampled]

    def aggregate_evaluate(
        self, server_round: int, results: Results, failures: Failures
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Average the clients' losses and numeric metrics, weighted by numbers of samples.

        Parameters
        ----------
        server_round : int
            Flower's count.
        results : list of tuple of (ClientProxy, EvaluateRes)
        failures : list
            Failed results and exceptions.

        Returns
        -------
        tuple of (float or None, dict)
            Loss and metrics.
        """
        server_round += self._before
        due = DueMetrics.of([res.metrics for _, res in results], self.rounds[-1].metrics)
        total = sum(max(0, res.num_examples) for _, res in results)
        ordered, failures = self._sift(results, failures, partial(check_evaluation, due, total))
        loss: float | None = None
        metrics: dict[str, Scalar] = {}
        if ordered and (self.accept_failures or not failures):
            loss, metrics = mean_evaluation([res for _, res in ordered])
        self._recorder.evaluated_by_clients(server_round, loss, metrics)
        self._recorder.close_now()
        return loss, metrics

    # ------------------------------------------------------------ the record

    def _sift(
        self, results: Results, failures: Failures, check: Callable[[Any], str | None]
    ) -> tuple[Results, Failures]:
        """Move unusable results to the failures, and record failures and suspicious results."""
        sound: Results = []
        failures = list(failures)
        for client, res in _in_order(results):
            index = getattr(client, "index", None)
            try:
                odd = check(res)
            except UnsoundError as exc:
                res.status = Status(Code.FIT_NOT_IMPLEMENTED, str(exc))
                failures.append((client, res))
                log.warning("client %s: %s", index, exc)
                continue
            sound.append((client, res))
            if odd is not None:
                self.rounds[-1].remarks.append({"client": index, "reason": odd})
                log.warning("client %s: %s; it counts all the same", index, odd)
        for failure in failures:
            index, reason = _reason(failure)
            self._recorder.failed(self.rounds[-1], index, reason)
        return sound, failures

    def _without_odd(self, sound: Results) -> Results:
        """Move suspicious results to the failures after all, because their average overflows."""
        current = self.rounds[-1]
        odd, current.remarks = current.remarks, []
        for remark in odd:
            self._recorder.failed(current, remark["client"], f"{remark['reason']}; the average overflows")
        odd_clients = {remark["client"] for remark in odd}
        return [(client, res) for client, res in sound if getattr(client, "index", None) not in odd_clients]

    def _answered(self, index: int, *, trained: bool) -> None:
        """Note one more answer; called in the thread that talked to that client."""
        self._awaited.answered(index)
        if trained:
            with self._answers:
                self._recorder.answered(self.rounds[-1], "train")

    # ------------------------------------------------------------ who takes part

    def _config(self, server_round: int) -> dict[str, Scalar]:
        config = self.on_fit_config_fn(server_round) if self.on_fit_config_fn else {}
        return {"server_round": server_round, **config}

    def _sample(
        self, server_round: int, purpose: str, count: int, client_manager: ClientManager
    ) -> list["NumberedProxy"]:
        clients = self._numbered(client_manager)
        rng = random.Random(f"{self._seed}/{server_round}/{purpose}")
        sampled = rng.sample(clients, min(count, len(clients)))
        self._awaited.begin(server_round, {client.index for client in sampled})
        return sorted(sampled, key=lambda client: client.index)

    def _numbered(self, client_manager: ClientManager) -> list["NumberedProxy"]:
        """Return every connected client with its number; clients without one come last, by Flower's id."""
        proxies = sorted(client_manager.all().values(), key=lambda proxy: proxy.cid)
        unknown = [proxy for proxy in proxies if proxy.cid not in self._indices]
        if unknown:
            with ThreadPoolExecutor(max_workers=min(32, len(unknown))) as pool:
                answers = list(pool.map(ask_index, unknown))
            spare = 1 + max(
                [*self._indices.values(), *(index for index in answers if index is not None)], default=-1
            )
            for proxy, index in zip(unknown, answers, strict=True):
                if index is None:
                    index, spare = spare, spare + 1
                self._indices[proxy.cid] = index
        numbered = [NumberedProxy(proxy, self._indices[proxy.cid], self._answered) for proxy in proxies]
        return sorted(numbered, key=lambda client: client.index)


def _require_number(name: str, number: object, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be a whole number, got {number!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")


def _in_order(results: Results) -> Results:
    return sorted(results, key=lambda result: getattr(result[0], "index", 0))


def _reason(failure: tuple[ClientProxy, Any] | BaseException) -> tuple[int | None, str]:
    if isinstance(failure, BaseException):
        return None, one_line(failure)
    client, res = failure
    return getattr(client, "index", None), str(res.status.message)[:LONGEST_REASON]
