"""The server of the tutorial's way: it evaluates on an executor, and a failed round ends the run."""

import concurrent.futures
import logging
from collections.abc import Callable

from flwr.common import NDArrays, Scalar
from flwr.server import History, Server
from flwr.server.strategy import Strategy

from fedexec.errors import WorkerError
from fedexec.flower.grpc.address import check_listening
from fedexec.flower.grpc.client import Evaluate, require_executor
from fedexec.flower.grpc.client_auth import STRANGERS, AdmittedClients
from fedexec.flower.grpc.service import start_service
from fedexec.flower.task_recorder import TaskRecorder

__all__ = ["executor_evaluate_fn", "serve"]

log = logging.getLogger("fedexec.flower")

ROOM_AT_LEAST = 1000  # clients
FAREWELL_SECONDS = 10.0  # time limit for disconnecting the clients
STOP_SECONDS = 3.0  # time limit for connections to end
LARGEST_MESSAGE = 512 << 20  # as in Flower
BESIDE_MODEL = 4 << 20  # for metrics, and for the reason of a failure

Config = dict[str, Scalar]
EvaluateFn = Callable[[int, NDArrays, Config], tuple[float, Config]]


def executor_evaluate_fn(
    executor: concurrent.futures.Executor, evaluate: Evaluate, *, recorder: TaskRecorder | None = None
) -> EvaluateFn:
    """Make a strategy's ``evaluate_fn`` from a function that is to run in a worker.

    The function is run once more if its worker dies, or exceeds its time or memory.

    Parameters
    ----------
    executor : concurrent.futures.Executor
    evaluate : callable
        ``evaluate(parameters, config) -> (loss, num_examples, metrics)``, as a client's.
    recorder : TaskRecorder, optional
        Records what each evaluation costs, if the executor is fedexec's.

    Returns
    -------
    callable
        ``evaluate_fn(server_round, parameters, config) -> (loss, metrics)``.
    """
    require_executor(executor)
    tasks = recorder or TaskRecorder()

    def evaluate_fn(server_round: int, parameters: NDArrays, config: Config) -> tuple[float, Config]:
        def evaluated() -> tuple[float, int, Config]:
            future = executor.submit(evaluate, parameters, config)
            return tasks.result_of(future, kind="server evaluate", server_round=server_round)

        try:
            loss, _, metrics = evaluated()
        except WorkerError as exc:
            log.warning("round %s: server evaluation is tried again: %s", server_round, str(exc))
            loss, _, metrics = evaluated()
        return float(loss), metrics

    return evaluate_fn


def serve(
    strategy: Strategy,
    *,
    address: str,
    num_rounds: int,
    max_clients: int,
    round_timeout: float | None = None,
    numbers: int | None = None,
    message_bytes: int | None = None,
    certificates: tuple[bytes, bytes, bytes] | None = None,
    secret: bytes | None = None,
    on_ready: Callable[[], object] = lambda: None,
) -> History:
    """Run a Flower server for some rounds.

    Parameters
    ----------
    strategy : flwr.server.strategy.Strategy
    address : str
        ``host:port`` to listen at.
    num_rounds : int
    max_clients : int
        How many clients the server may talk to at once; Flower's default would serve six at a time on two
        cores.
    round_timeout : float, optional
        Seconds that a client has to train, or to evaluate; a client that takes longer is a failure of the
        round, and no longer takes part.
    numbers : int, optional
        Clients whose number is not below this one are refused, and so is a second client with the same
        number.
    message_bytes : int, optional
        The largest message that a client may send; by default it follows from the strategy's
        `initial_parameters`.
    certificates : tuple of (bytes, bytes, bytes), optional
        CA certificate, server certificate, private key, in PEM: serve with TLS.
    secret : bytes, optional
        Admit only clients that know it; see :class:`fedexec.flower.grpc.ExecutorClient`. It does not encrypt:
        beyond one machine, use TLS too.
    on_ready : callable
        Called when clients can connect.

    Returns
    -------
    flwr.server.History

    Raises
    ------
    AddressError
        Listening is not possible there.
    Exception
        Any exception of the strategy, raised after the clients have been disconnected.
    """
    check_listening(address)
    room = max(ROOM_AT_LEAST, max_clients)
    clients = AdmittedClients(secret, numbers=numbers, room=room)
    server = Server(client_manager=clients, strategy=strategy)
    server.set_max_workers(max_clients)
    service = start_service(
        clients,
        address,
        room=room + 2 * STRANGERS,  # Clients that are leaving count, too.
        message_bytes=message_bytes or _message_bytes(strategy),
        certificates=certificates,
    )
    try:
        on_ready()
        history, _ = server.fit(num_rounds, round_timeout)
    finally:
        server.disconnect_all_clients(FAREWELL_SECONDS)
        service.stop(grace=1).wait(STOP_SECONDS)  # A client that reads nothing more would delay the stop.
    return history


def _message_bytes(strategy: Strategy) -> int:
    """Return the largest message that a client may send: twice the model, plus room for metrics."""
    model = getattr(strategy, "initial_parameters", None)
    if model is None:
        return LARGEST_MESSAGE
    return min(LARGEST_MESSAGE, 2 * sum(map(len, model.tensors)) + BESIDE_MODEL)
