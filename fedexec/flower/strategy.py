"""FedAvg for a run that can be repeated, and that tells what happened in each round.

Flower's node ids are random and results arrive in any order. So clients are told apart by the property
``client`` of :class:`~fedexec.flower.ExecutorClient`; they are sampled and averaged in that order.
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flwr.common import (
    DisconnectRes,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    ReconnectIns,
    Scalar,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from fedexec.errors import FedexecError
from fedexec.flower.client import failed_evaluation, failed_fit
from fedexec.flower.history import Round

__all__ = ["FedAvgMp", "RoundFailedError"]

Results = list[tuple[ClientProxy, Any]]
Failures = list[tuple[ClientProxy, Any] | BaseException]


class RoundFailedError(FedexecError, RuntimeError):
    """No client of a round gave a result.

    Parameters
    ----------
    server_round : int
    reasons : tuple of str
        One a client.
    """

    def __init__(self, server_round: int, reasons: tuple[str, ...]) -> None:
        super().__init__(server_round, reasons)
        self.server_round, self.reasons = server_round, reasons

    def __str__(self) -> str:
        first = self.reasons[0] if self.reasons else "no client is connected"
        return f"Round {self.server_round}: no client gave a result, of {len(self.reasons)}. {first}"


class FedAvgMp(FedAvg):
    """FedAvg without client evaluation unless asked for (the tutorial's choice), sampling by seed.

    Parameters
    ----------
    fit_clients : int
        How many train in each round; fewer if fewer are connected.
    available_clients : int
        How many must be connected before the first round.
    seed : int
        Which clients are sampled follows from it, the round, and the clients that are there.
    evaluate_clients : int
        How many evaluate after each round; 0 is none.
    on_progress : callable
        ``on_progress(round, done)`` after each sampled client's answer and, with the number of sampled
        clients, when the round is over.
    still_coming : callable
        Called once a second while clients are awaited; raises to give up.
    **fedavg
        What Flower's FedAvg takes.
    """

    def __init__(
        self,
        *,
        fit_clients: int,
        available_clients: int,
        seed: int = 0,
        evaluate_clients: int = 0,
        on_progress: Callable[[Round, int], object] = lambda round_, done: None,
        still_coming: Callable[[], object] = lambda: None,
        **fedavg: Any,
    ) -> None:
        super().__init__(min_available_clients=available_clients, **fedavg)
        self.rounds: list[Round] = []
        self.parameters: Parameters | None = None  # the global model, as last evaluated
        self._fit_clients = fit_clients
        self._evaluate_clients = evaluate_clients
        self._seed = seed
        self._on_progress = on_progress
        self._still_coming = still_coming
        self._indices: dict[str, int] = {}  # cid -> index
        self._started = time.perf_counter()
        self._done = 0
        self._done_lock = threading.Lock()

    # ------------------------------------------------------------ what Flower calls, in its order

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Choose who trains."""
        if server_round == 1:
            while not client_manager.wait_for(self.min_available_clients, timeout=1):
                self._still_coming()
        self._begin(server_round)
        chosen = self._sample(server_round, "fit", self._fit_clients, client_manager)
        if not chosen:
            raise RoundFailedError(server_round, ())
        self.rounds[-1].clients = [client.index for client in chosen]
        self._on_progress(self.rounds[-1], 0)
        ins = FitIns(parameters, self._config(server_round))
        return [(client, ins) for client in chosen]

    def aggregate_fit(
        self, server_round: int, results: Results, failures: Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Average what came back, in the order of the clients' numbers."""
        self._note(failures)
        if not results:
            raise RoundFailedError(server_round, tuple(_reason(failure)[1] for failure in failures))
        return super().aggregate_fit(server_round, _in_order(results), failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate the global model on the server."""
        self.parameters = parameters
        if server_round == 0:
            self._begin(0)
        result = super().evaluate(server_round, parameters)
        if result is not None:
            self.rounds[-1].loss, self.rounds[-1].metrics = result
        if server_round == 0 or not self._evaluate_clients:
            self._end()
        return result

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Choose who evaluates: nobody, unless asked for."""
        if not self._evaluate_clients:
            return []
        chosen = self._sample(server_round, "evaluate", self._evaluate_clients, client_manager)
        ins = EvaluateIns(parameters, self._config(server_round))
        return [(client, ins) for client in chosen]

    def aggregate_evaluate(
        self, server_round: int, results: Results, failures: Failures
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Average the clients' losses and numeric metrics, weighted by their samples."""
        self._note(failures)
        ordered = _in_order(results)
        loss, _ = super().aggregate_evaluate(server_round, ordered, failures)
        metrics = _mean_metrics([res for _, res in ordered])
        self.rounds[-1].client_loss, self.rounds[-1].client_metrics = loss, metrics
        self._end()
        return loss, metrics

    # ------------------------------------------------------------ the record

    def _begin(self, server_round: int) -> None:
        self._started = time.perf_counter()
        self.rounds.append(Round(server_round))

    def _end(self) -> None:
        current = self.rounds[-1]
        current.seconds = time.perf_counter() - self._started
        self._on_progress(current, len(current.clients))

    def _note(self, failures: Failures) -> None:
        for failure in failures:
            client, reason = _reason(failure)
            self.rounds[-1].failures.append({"client": client, "reason": reason})

    def _client_done(self) -> None:
        """Note one more answer; called from the thread that talked to that client."""
        with self._done_lock:
            self._done += 1
            self._on_progress(self.rounds[-1], self._done)

    # ------------------------------------------------------------ who takes part

    def _config(self, server_round: int) -> dict[str, Scalar]:
        config = self.on_fit_config_fn(server_round) if self.on_fit_config_fn else {}
        return {"server_round": server_round, **config}

    def _sample(
        self, server_round: int, purpose: str, wanted: int, client_manager: ClientManager
    ) -> list["_NumberedClient"]:
        self._done = 0
        clients = self._numbered(client_manager)
        rng = random.Random(f"{self._seed}/{server_round}/{purpose}")
        chosen = rng.sample(clients, min(wanted, len(clients)))
        return sorted(chosen, key=lambda client: client.index)

    def _numbered(self, client_manager: ClientManager) -> list["_NumberedClient"]:
        """Return every connected client with its number; those without one come last, by Flower's id."""
        proxies = sorted(client_manager.all().values(), key=lambda proxy: proxy.cid)
        unknown = [proxy for proxy in proxies if proxy.cid not in self._indices]
        if unknown:
            with ThreadPoolExecutor(max_workers=min(32, len(unknown))) as pool:
                answers = list(pool.map(_ask_index, unknown))
            spare = 1 + max(
                [*self._indices.values(), *(index for index in answers if index is not None)], default=-1
            )
            for proxy, index in zip(unknown, answers, strict=True):
                if index is None:
                    index, spare = spare, spare + 1
                self._indices[proxy.cid] = index
        numbered = [_NumberedClient(proxy, self._indices[proxy.cid], self._client_done) for proxy in proxies]
        return sorted(numbered, key=lambda client: client.index)


class _NumberedClient(ClientProxy):
    """A connected client with its number. One that is lost makes a failed result, which knows who it was."""

    def __init__(self, inner: ClientProxy, index: int, on_done: Callable[[], object]) -> None:
        super().__init__(inner.cid)
        self.index = index
        self._inner = inner
        self._on_done = on_done

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        try:
            return self._inner.fit(ins, timeout, group_id)
        except Exception as exc:
            return failed_fit(f"lost: {type(exc).__name__}: {exc}")
        finally:
            self._on_done()

    def evaluate(self, ins: EvaluateIns, timeout: float | None, group_id: int | None) -> EvaluateRes:
        try:
            return self._inner.evaluate(ins, timeout, group_id)
        except Exception as exc:
            return failed_evaluation(f"lost: {type(exc).__name__}: {exc}")

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        return self._inner.get_properties(ins, timeout, group_id)

    def get_parameters(
        self, ins: GetParametersIns, timeout: float | None, group_id: int | None
    ) -> GetParametersRes:
        return self._inner.get_parameters(ins, timeout, group_id)

    def reconnect(self, ins: ReconnectIns, timeout: float | None, group_id: int | None) -> DisconnectRes:
        return self._inner.reconnect(ins, timeout, group_id)


def _ask_index(proxy: ClientProxy) -> int | None:
    try:
        index = proxy.get_properties(GetPropertiesIns({}), timeout=60, group_id=None).properties.get("client")
    except Exception:  # lost meanwhile: its fit will fail, and say why
        return None
    return index if isinstance(index, int) else None


def _in_order(results: Results) -> Results:
    return sorted(results, key=lambda result: getattr(result[0], "index", 0))


def _reason(failure: tuple[ClientProxy, Any] | BaseException) -> tuple[int | None, str]:
    if isinstance(failure, BaseException):
        return None, f"{type(failure).__name__}: {failure}"
    client, res = failure
    return getattr(client, "index", None), res.status.message


def _mean_metrics(results: list[EvaluateRes]) -> dict[str, Scalar]:
    """Average every numeric metric over the clients, weighted by their samples."""
    total = sum(res.num_examples for res in results)
    if not total:
        return {}
    names = [name for name, value in results[0].metrics.items() if isinstance(value, int | float)]
    return {
        name: sum(float(res.metrics[name]) * res.num_examples for res in results) / total for name in names
    }
