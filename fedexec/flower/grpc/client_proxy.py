"""Clients identified by their numbers, and a watch over clients that have not answered."""

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

from fedexec._system.error_text import one_line
from fedexec.flower.grpc.client import failed_evaluation, failed_fit

__all__ = ["Awaited", "NumberedProxy", "ask_index"]

log = logging.getLogger("fedexec.flower")


class NumberedProxy(ClientProxy):
    """A connected client with its number; a lost connection becomes a failed result of that client.

    Parameters
    ----------
    inner : ClientProxy
        Flower's own proxy.
    index : int
        The client's number.
    on_answer : callable
        ``on_answer(index, trained=...)``, called after each fit and each evaluation.
    """

    def __init__(self, inner: ClientProxy, index: int, on_answer: Callable[..., object]) -> None:
        super().__init__(inner.cid)
        self.index = index
        self._inner = inner
        self._on_answer = on_answer

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Let the client train.

        Parameters
        ----------
        ins : FitIns
        timeout : float or None
            Seconds.
        group_id : int or None
            The round.

        Returns
        -------
        FitRes
            A failed one if the client is lost.
        """
        try:
            return self._inner.fit(ins, timeout, group_id)
        except Exception as exc:
            return failed_fit(f"lost: {one_line(exc)}")
        finally:
            self._on_answer(self.index, trained=True)

    def evaluate(self, ins: EvaluateIns, timeout: float | None, group_id: int | None) -> EvaluateRes:
        """Let the client evaluate.

        Parameters
        ----------
        ins : EvaluateIns
        timeout : float or None
            Seconds.
        group_id : int or None
            The round.

        Returns
        -------
        EvaluateRes
            A failed one if the client is lost.
        """
        try:
            return self._inner.evaluate(ins, timeout, group_id)
        except Exception as exc:
            return failed_evaluation(f"lost: {one_line(exc)}")
        finally:
            self._on_answer(self.index, trained=False)

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        """Ask the client for its properties.

        Parameters
        ----------
        ins : GetPropertiesIns
        timeout : float or None
            Seconds.
        group_id : int or None
            The round.

        Returns
        -------
        GetPropertiesRes
        """
        return self._inner.get_properties(ins, timeout, group_id)

    def get_parameters(
        self, ins: GetParametersIns, timeout: float | None, group_id: int | None
    ) -> GetParametersRes:
        """Ask the client for its weights.

        Parameters
        ----------
        ins : GetParametersIns
        timeout : float or None
            Seconds.
        group_id : int or None
            The round.

        Returns
        -------
        GetParametersRes
        """
        return self._inner.get_parameters(ins, timeout, group_id)

    def reconnect(self, ins: ReconnectIns, timeout: float | None, group_id: int | None) -> DisconnectRes:
        """Disconnect the client.

        Parameters
        ----------
        ins : ReconnectIns
        timeout : float or None
            Seconds.
        group_id : int or None
            The round.

        Returns
        -------
        DisconnectRes
        """
        return self._inner.reconnect(ins, timeout, group_id)


def ask_index(proxy: ClientProxy) -> int | None:
    """Return a client's number; an admitted client is not asked again.

    Parameters
    ----------
    proxy : ClientProxy

    Returns
    -------
    int or None
        None if the client has no number, or is lost.
    """
    if "client" in proxy.properties:
        admitted = proxy.properties["client"]
        return admitted if isinstance(admitted, int) else None
    try:
        index = proxy.get_properties(GetPropertiesIns({}), timeout=60, group_id=None).properties.get("client")
    except Exception:  # The connection was lost; the client's fit will fail and report the reason.
        return None
    return index if isinstance(index, int) else None


class Awaited:
    """The clients that have not answered; if no client answers for a while, the log names them.

    Parameters
    ----------
    seconds : float
        Time without an answer until the log names them.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()  # guards everything below
        self._server_round = 0
        self._clients: set[int] = set()
        self._timer: threading.Timer | None = None

    def begin(self, server_round: int, clients: set[int]) -> None:
        """Wait for these clients.

        Parameters
        ----------
        server_round : int
        clients : set of int
        """
        with self._lock:
            self._server_round, self._clients = server_round, clients
            self._watch()

    def answered(self, client: int) -> None:
        """Note that a client has answered.

        Parameters
        ----------
        client : int
        """
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
                    "round %s: no answer for %g s; waiting for clients %s",
                    self._server_round, self._seconds, sorted(self._clients),
                )  # fmt: skip
            self._watch()
