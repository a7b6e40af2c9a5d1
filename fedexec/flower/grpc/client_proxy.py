"""Clients that are told apart by their number, and a watch over those that have not answered."""

import logging
import threading
from collections.abc import Callable

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
    ReconnectIns,
)
from flwr.server.client_proxy import ClientProxy

from fedexec.flower.grpc.client import failed_evaluation, failed_fit

__all__ = ["Awaited", "NumberedProxy", "ask_index"]

log = logging.getLogger("fedexec.flower")


class NumberedProxy(ClientProxy):
    """A connected client with its number. One that is lost makes a failed result, which knows who it was."""

    def __init__(self, inner: ClientProxy, index: int, on_answer: Callable[..., object]) -> None:
        super().__init__(inner.cid)
        self.index = index
        self._inner = inner
        self._on_answer = on_answer

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Have it train."""
        try:
            return self._inner.fit(ins, timeout, group_id)
        except Exception as exc:
            return failed_fit(f"lost: {type(exc).__name__}: {exc}")
        finally:
            self._on_answer(self.index, trained=True)

    def evaluate(self, ins: EvaluateIns, timeout: float | None, group_id: int | None) -> EvaluateRes:
        """Have it evaluate."""
        try:
            return self._inner.evaluate(ins, timeout, group_id)
        except Exception as exc:
            return failed_evaluation(f"lost: {type(exc).__name__}: {exc}")
        finally:
            self._on_answer(self.index, trained=False)

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        """Ask for its properties."""
        return self._inner.get_properties(ins, timeout, group_id)

    def get_parameters(
        self, ins: GetParametersIns, timeout: float | None, group_id: int | None
    ) -> GetParametersRes:
        """Ask for its weights."""
        return self._inner.get_parameters(ins, timeout, group_id)

    def reconnect(self, ins: ReconnectIns, timeout: float | None, group_id: int | None) -> DisconnectRes:
        """Send it away."""
        return self._inner.reconnect(ins, timeout, group_id)


def ask_index(proxy: ClientProxy) -> int | None:
    """Return a client's number; None if it has none. One that was admitted has told it already."""
    if "client" in proxy.properties:
        admitted = proxy.properties["client"]
        return admitted if isinstance(admitted, int) else None
    try:
        index = proxy.get_properties(GetPropertiesIns({}), timeout=60, group_id=None).properties.get("client")
    except Exception:  # lost meanwhile: its fit will fail, and say why
        return None
    return index if isinstance(index, int) else None


class Awaited:
    """The clients that have not answered. If none does for a while, the log names them.

    Parameters
    ----------
    seconds : float
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()  # guards the next
        self._server_round = 0
        self._clients: set[int] = set()
        self._timer: threading.Timer | None = None

    def begin(self, server_round: int, clients: set[int]) -> None:
        """Wait for these."""
        with self._lock:
            self._server_round, self._clients = server_round, clients
            self._watch()

    def answered(self, client: int) -> None:
        """One of them has answered."""
        with self._lock:
            self._clients.discard(client)
            self._watch()

    def _watch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._clients:
            self._timer = threading.Timer(self._seconds, self._stalled)
            self._timer.daemon = True
            self._timer.start()

    def _stalled(self) -> None:
        with self._lock:
            if self._clients:
                log.warning(
                    "round %s: no answer for %g s; awaited are the clients %s",
                    self._server_round, self._seconds, sorted(self._clients),
                )  # fmt: skip
            self._watch()
