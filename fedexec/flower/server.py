"""The server's side of the tutorial's way: evaluation on an executor, a ``start_server`` that can fail."""

import concurrent.futures
import functools
import logging
import signal
from collections.abc import Callable

from flwr.common import NDArrays, Scalar
from flwr.server import ClientManager, History, Server, ServerConfig, SimpleClientManager, start_server
from flwr.server.strategy import Strategy

from fedexec.errors import WorkerError
from fedexec.flower.address import AddressError, check_listening
from fedexec.flower.client import Evaluate, TaskLog
from fedexec.flower.proof import ProvenClients

__all__ = ["executor_evaluate_fn", "serve"]

log = logging.getLogger("fedexec.flower")

Config = dict[str, Scalar]
EvaluateFn = Callable[[int, NDArrays, Config], tuple[float, Config]]


def executor_evaluate_fn(executor: concurrent.futures.Executor | TaskLog, evaluate: Evaluate) -> EvaluateFn:
    """Make the ``evaluate_fn`` a strategy takes out of a function that shall run in a worker.

    It is tried once more if its worker dies, runs out of time or of memory.

    Parameters
    ----------
    executor : concurrent.futures.Executor or TaskLog
    evaluate : callable
        ``evaluate(parameters, config) -> (loss, num_examples, metrics)``, as a client's.

    Returns
    -------
    callable
        ``evaluate_fn(server_round, parameters, config) -> (loss, metrics)``.
    """
    tasks = executor if isinstance(executor, TaskLog) else TaskLog(executor)

    def evaluate_fn(server_round: int, parameters: NDArrays, config: Config) -> tuple[float, Config]:
        call = functools.partial(
            tasks.call, evaluate, parameters, config,
            kind="server evaluate", client=None, server_round=server_round,
        )  # fmt: skip
        try:
            loss, _, metrics = call()
        except WorkerError as exc:
            log.warning("round %s: server evaluation is tried again: %s", server_round, str(exc))
            loss, _, metrics = call()
        return float(loss), metrics

    return evaluate_fn


def serve(
    strategy: Strategy,
    *,
    address: str,
    num_rounds: int,
    max_clients: int,
    round_timeout: float | None = None,
    certificates: tuple[bytes, bytes, bytes] | None = None,
    secret: bytes | None = None,
    on_ready: Callable[[], object] = lambda: None,
) -> History:
    """Run a Flower server for some rounds. Call it from the main thread (Flower installs signal handlers).

    Parameters
    ----------
    strategy : flwr.server.strategy.Strategy
    address : str
        ``host:port`` to listen at.
    num_rounds : int
    max_clients : int
        How many clients may be talked to at once; Flower's default would serve six at a time on two cores.
    round_timeout : float, optional
        Seconds.
    certificates : tuple of (bytes, bytes, bytes), optional
        CA certificate, server certificate, private key, in PEM: serve with TLS.
    secret : bytes, optional
        Let only clients take part that know it; see :class:`fedexec.flower.ExecutorClient`. It does not
        encrypt: beyond one machine, use TLS too.
    on_ready : callable
        Called when clients can connect.

    Returns
    -------
    flwr.server.History

    Raises
    ------
    AddressError
        Nobody can listen there.
    Exception
        Whatever the strategy raised; the clients are sent away first.
    """
    check_listening(address)
    manager = SimpleClientManager() if secret is None else ProvenClients(secret)
    server = _Server(manager, strategy, max_clients, on_ready)
    try:
        history = start_server(
            server_address=address,
            server=server,
            config=ServerConfig(num_rounds=num_rounds, round_timeout=round_timeout),
            certificates=certificates,
        )
    except SystemExit as exc:  # how start_server says that it cannot listen
        raise AddressError(str(exc)) from exc
    finally:
        server.restore_signals()
    if server.failure is not None:
        raise server.failure
    return history


class _Server(Server):
    """Flower's server, which says when it is ready and ends in good order when a round fails."""

    def __init__(
        self, manager: ClientManager, strategy: Strategy, max_clients: int, on_ready: Callable[[], object]
    ) -> None:
        super().__init__(client_manager=manager, strategy=strategy)
        self.set_max_workers(max_clients)
        self.failure: BaseException | None = None
        self._on_ready = on_ready
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Run the rounds. A failure is kept, so that start_server goes on to send the clients away."""
        self.restore_signals()  # start_server has just put its own there
        try:
            self._on_ready()
            return super().fit(num_rounds, timeout)
        except BaseException as exc:
            self.failure = exc
            return History(), 0.0

    def restore_signals(self) -> None:
        """Put the caller's signal handlers back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
