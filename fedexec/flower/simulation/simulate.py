"""Simulation of a ServerApp and its ClientApps: the server runs here, each message in a worker."""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedexec import _registry
from fedexec._scheduling.futures import Stats
from fedexec._system.error_text import one_line
from fedexec._worker.seeding import seeded
from fedexec._worker.setup import environment
from fedexec._worker.threads import limit_threads
from fedexec.executor import Executor
from fedexec.flower.flower_internals import SUPERLINK_NODE_ID, LoadServerAppError, become_server, has_main
from fedexec.flower.history import Round, TaskRecord
from fedexec.flower.offloading import app_settings
from fedexec.flower.simulation.client_app import AppFirst, AppRef, check, import_app, place_of, warm
from fedexec.flower.simulation.grid import ExecutorGrid
from fedexec.flower.simulation.nodes import NodeConfig, NodeResources
from fedexec.flower.simulation.run_recorder import RunRecorder
from fedexec.flower.simulation.strategy_hooks import observed
from fedexec.interface import Capability, Hooks, function_name
from fedexec.settings import Settings, resolve

__all__ = ["Simulation", "app_executor", "simulate", "start"]

log = logging.getLogger("fedexec.flower")

RUN_ID = 1
_one_at_a_time = threading.Lock()  # Flower has one task identity per process.


@dataclass(frozen=True, slots=True)
class Simulation:
    """The outcome of a simulation.

    Attributes
    ----------
    result : flwr.serverapp.strategy.Result, flwr.server.History or None
        What the last strategy's ``start`` returned, or a History from an older app; None if there was
        neither.
    rounds : list of Round
        Their ``clients`` are partitions; ``start`` tells them apart if an app starts several strategies.
    tasks : list of TaskRecord
        One per message, with its usage.
    stats : Stats
        Statistics of the executor.
    context : flwr.app.Context
        The ServerApp's context at its end.
    arrays : flwr.app.ArrayRecord or None
        The strategy's final global model; None if there was none.
    """

    result: Any
    rounds: list[Round]
    tasks: list[TaskRecord]
    stats: Stats
    context: Context
    arrays: ArrayRecord | None = None


def simulate(
    server_app: ServerApp | str,
    client_app: ClientApp | str,
    *,
    num_nodes: int,
    executor: Executor | None = None,
    run_config: Mapping[str, Any] | None = None,
    node_config: NodeConfig | None = None,
    node_resources: NodeResources | None = None,
    seed: int | None = None,
    recorder: RunRecorder | None = None,
    on_round: Callable[[Round], object] | None = None,
    rehearse: bool = False,
) -> Simulation:
    """Run a ServerApp against `num_nodes` nodes of a ClientApp, each message in a worker.

    Parameters
    ----------
    server_app, client_app : ServerApp, ClientApp, or str
        Apps as for Flower's own engine, with the message API or with ``server_fn`` and ``client_fn``; or
        their places: ``"module:attribute"``.
    num_nodes : int
    executor : Executor, optional
        Default: one for this simulation, whose workers start with the ClientApp imported; its settings come
        from the environment, or from ``executor-backend`` and similar keys of `run_config`.
    run_config : mapping, optional
        What both apps find in ``context.run_config``.
    node_config : mapping, or callable ``(partition_id) -> mapping``, optional
        What a node finds in ``context.node_config``, in addition to ``partition-id`` and ``num-partitions``.
    node_resources : mapping, or callable ``(partition_id) -> mapping``, optional
        What a node's messages need: `memory` and `device_memory` (such as ``"2GiB"``), `threads`. A message
        waits until messages that run leave so much of what they asked for; see
        :meth:`fedexec.Executor.with_options`.
    seed : int, optional
        Two runs with the same seed are equal on every backend: the seed determines the node ids, and the
        global random generators (Python, numpy, torch) are seeded here and for each message in its worker. On
        backends without isolation, the generators of a ClientApp are not seeded.
    recorder : RunRecorder, optional
        Records what happens, while it happens.
    on_round : callable ``(round) -> object``, optional
        Called with each round as soon as it is over, for instance to send its metrics to another tool. If it
        raises, that is logged, and the run goes on.
    rehearse : bool
        For a ClientApp that keeps something costly in a module, such as its data set. The first message of
        each type is also handled once in the template, before it is sent, and workers inherit what that
        leaves in memory. :meth:`fedexec.Executor.rehearse` describes the disadvantages.

    Returns
    -------
    Simulation

    Raises
    ------
    LoadServerAppError, LoadClientAppError
        An app does not exist, or is not an app. The classes are Flower's.
    SettingsError
        A node needs more than this machine has.
    TooFewNodesError
        The strategy would wait for ever.
    Exception
        Any exception of the ServerApp. An exception of a ClientApp, or the death of its worker, is an error
        reply.
    """
    if executor is not None and not isinstance(executor, Executor):
        made = f" Make one: create_executor({executor!r})." if isinstance(executor, str) else ""
        raise TypeError(f"executor must be an Executor of fedexec, got {type(executor).__name__}.{made}")
    if recorder is not None and on_round is not None:
        raise TypeError("give either recorder or on_round: a recorder has its own on_progress")
    if on_round is not None:
        recorder = RunRecorder(functools.partial(_tell, on_round))
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
    config = dict(run_config or {})
    with _one_at_a_time, contextlib.ExitStack() as stack:
        if executor is None:
            settings = resolve(config=app_settings(config))
            server, chosen = start(server_app, client_app, settings)
            stack.enter_context(_ending(chosen))
        else:
            server, chosen = _load_server(server_app), executor
            _warm_workers_of(chosen, client_app)
        become_server(RUN_ID)
        grid = ExecutorGrid(
            chosen,
            client_app,
            num_nodes=num_nodes,
            run_config=config,
            node_config=node_config,
            node_resources=node_resources,
            seed=seed,
            recorder=recorder,
            rehearse=rehearse,
            run_id=RUN_ID,
        )
        chosen.submit(check, grid.app).result()
        context = Context(RUN_ID, SUPERLINK_NODE_ID, {}, RecordDict(), config)
        try:
            with observed(grid), seeded(seed):
                server(grid, context)
        finally:
            grid.close()
            grid.recorder.finish()
        recorded = grid.recorder
        return Simulation(
            recorded.result, recorded.rounds, recorded.tasks, chosen.stats(), context, recorded.arrays
        )


def start(
    server_app: ServerApp | str,
    client_app: ClientApp | str,
    settings: Settings,
    prepare: Callable[[], object] | None = None,
) -> tuple[ServerApp, Executor]:
    """Load the ServerApp and make an executor for the ClientApp at the same time: each takes seconds.

    Without isolation, this process gets the number of threads of a worker, because that number changes how
    torch rounds.

    Parameters
    ----------
    server_app : ServerApp or str
    client_app : ClientApp or str
    settings : Settings
    prepare : callable, optional
        Called in each worker before the ClientApp is imported.

    Returns
    -------
    tuple of (ServerApp, Executor)
    """
    if Capability.ISOLATED not in _registry.load_chosen(settings).capabilities:
        limit_threads(environment(settings))
    with ThreadPoolExecutor(1) as background:
        starting = background.submit(app_executor, settings, client_app, prepare)
        try:
            server = _load_server(server_app)
        except BaseException:
            starting.result().kill_workers()
            raise
        return server, starting.result()


def app_executor(
    settings: Settings, client_app: ClientApp | str, prepare: Callable[[], object] | None = None
) -> Executor:
    """Make an executor whose workers start with a ClientApp imported.

    Parameters
    ----------
    settings : Settings
    client_app : ClientApp or str
    prepare : callable, optional
        Called in each worker before the ClientApp is imported.

    Returns
    -------
    Executor
    """
    return Executor(settings, Hooks(prepare, warmup=functools.partial(warm, _ref(client_app), prepare)))


def _warm_workers_of(executor: Executor, client_app: ClientApp | str) -> None:
    """Load the app in the template of a user's executor, as :func:`app_executor` does by its warm-up."""
    settings = executor.settings
    if settings.learn and settings.start_method == "forkserver":
        ref = _ref(client_app)
        executor.rehearse(AppFirst(ref, functools.partial(warm, ref)))


def _ref(app: ClientApp | str) -> AppRef:
    return AppRef(app) if isinstance(app, str) else AppRef.of(app)


def _tell(on_round: Callable[[Round], object], current: Round, done: int, planned: int | None) -> None:
    """Tell a user's function of a round that is over."""
    if current.seconds:
        try:
            on_round(current)
        except Exception as exc:
            name, said = function_name(on_round), f"{one_line(exc)}{place_of(exc)}"
            log.warning(
                "on_round=%s failed in round %d, the run goes on: %s", name, current.server_round, said
            )


@contextlib.contextmanager
def _ending(executor: Executor) -> Iterator[None]:
    """Shut an executor down at the end; end its workers at once after an exception."""
    try:
        yield
    except BaseException:
        executor.kill_workers()
        raise
    executor.shutdown()


def _load_server(app: ServerApp | str) -> ServerApp:
    """Return the app itself; raise LoadServerAppError, which names the app, if it cannot be loaded."""
    name = app if isinstance(app, str) else "the ServerApp"
    try:
        server = import_app(app) if isinstance(app, str) else app
    except (Exception, SystemExit) as exc:
        error = f"{one_line(exc)}{place_of(exc)}"
        raise LoadServerAppError(f"The ServerApp {name!r} cannot be loaded: {error}") from exc
    if not isinstance(server, ServerApp):
        raise LoadServerAppError(f"{name!r} is not a ServerApp, it is a {type(server).__name__}.")
    if not has_main(server):
        raise LoadServerAppError(f"{name!r} has nothing to run: give it a function with @app.main().")
    return server
