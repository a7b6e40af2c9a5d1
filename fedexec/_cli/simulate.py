"""``fedexec simulate``: a Flower app on this machine, every node's work in a worker."""

import argparse
import contextlib
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping

from flwr.serverapp import ServerApp

from fedexec import __version__, _registry
from fedexec._cli import options
from fedexec._cli.display import Display
from fedexec._cli.number_arguments import MOST_CLIENTS
from fedexec._cli.output import as_dicts, as_json, as_npz, digest, stdout_as_stderr, write
from fedexec._cli.round_log import RoundLog
from fedexec._cli.running import CLOSED, is_output_closed
from fedexec._system.available_resources import available_cores
from fedexec._system.control_characters import visible
from fedexec._system.error_text import one_line
from fedexec.devices import find_devices
from fedexec.errors import FedexecError
from fedexec.executor import Executor
from fedexec.flower import (
    AppDirectoryError,
    FlowerApp,
    LoadClientAppError,
    LoadServerAppError,
    Round,
    RunRecorder,
    Simulation,
    app_settings,
    installed_app,
    read_app,
    simulate,
)
from fedexec.flower.simulation.client_output import log_less_of_flower
from fedexec.flower.simulation.simulate import start
from fedexec.interface import Capability
from fedexec.memory.timeline import Timeline
from fedexec.settings import Settings, resolve

__all__ = ["command"]

log = logging.getLogger("fedexec")

NODES = 10


def command(arguments: argparse.Namespace) -> int:
    """Simulate."""
    app = _app(arguments)
    inputs = [*(f"{name}/pyproject.toml" for name in arguments.app or ["."]), *(arguments.run_config or ())]
    report, weights_file, lines = options.run_outputs(arguments, inputs)
    nodes, who = _nodes(arguments, app)
    showing = Display(
        None,
        quiet=arguments.quiet,
        stderr=report == options.STDOUT,
        failures_are_logged=True,
        on_closed=functools.partial(arguments.ending.leave, CLOSED),
    )
    with contextlib.ExitStack() as stack:
        if report == options.STDOUT:
            stack.enter_context(stdout_as_stderr())
        if not arguments.flower_log:
            stack.callback(log_less_of_flower(logging.ERROR))  # the display shows what a strategy tells
        display, ending = stack.enter_context(showing), arguments.ending
        round_log = stack.enter_context(RoundLog(arguments, lines))
        ending.prepare(hush=display.hush)
        with display.loading():
            server, executor = _start(arguments, app)
        stack.enter_context(executor)
        display.chosen(executor.settings, what=f"{nodes} nodes ({who})", machines=executor.nodes())
        timeline = stack.enter_context(Timeline(executor.devices))

        def progress(current: Round, done: int, planned: int | None) -> None:
            if current.seconds:  # it is over
                timeline.mark("round", current.server_round)
                round_log.write(current)
            display.progress(current, done, planned)

        ending.prepare(stop=executor.kill_workers)
        try:
            simulation = simulate(
                server,
                app.client,
                num_nodes=nodes,
                executor=executor,
                run_config=app.run_config,
                seed=arguments.seed,
                recorder=RunRecorder(progress),
                rehearse=arguments.rehearse,
            )
        except BaseException as exc:
            ending.settle()
            executor.kill_workers()
            if isinstance(exc, Exception):
                raise _reason(exc) from exc
            raise
        executor.shutdown()
        timeline.mark("shutdown")
        display.table(simulation.rounds, simulation.stats, simulation.tasks, timeline)
        arrays = {name: array.numpy() for name, array in (simulation.arrays or {}).items()}
        result = {
            "fedexec": __version__,
            "app": {"server": app.server, "client": app.client, "run_config": app.run_config},
            "nodes": nodes,
            "seed": arguments.seed,
            "settings": executor.settings.as_dict(),
            "rounds": as_dicts(simulation.rounds),
            "tasks": as_dicts(simulation.tasks),
            "stats": simulation.stats.as_dict(),
            "weights_sha256": digest(arrays.values()) if arrays else None,
            "memory": timeline.as_dict(),
        }
    write(
        (weights_file if arrays else None, lambda: as_npz(**arrays)),
        (report, lambda: as_json(result)),
    )
    if weights_file is not None and not arrays:
        raise FedexecError("--save: this app's strategy left no weights")
    _require_progress(simulation)
    return 0


def _require_progress(simulation: Simulation) -> None:
    """Raise FedexecError if all was in vain, so that a script notices; what there is has been written."""
    trained = [task for task in simulation.tasks if task.kind.partition(".")[0] == "train"]
    if trained and all(task.error for task in trained):
        raise FedexecError("no client has trained without an error: the weights are those at the start")
    if simulation.tasks and all(task.error for task in simulation.tasks):
        raise FedexecError("no task has ended without an error")


def _app(arguments: argparse.Namespace) -> FlowerApp:
    names = arguments.app or ["."]
    try:
        if len(names) == 1 and (":" not in names[0] or os.path.exists(names[0])):  # noqa: PTH110
            is_directory = os.path.exists(names[0])  # noqa: PTH110
            installed = None if is_directory else installed_app(names[0])
            app = read_app(installed or names[0], arguments.federation)
        elif arguments.federation is not None:
            raise options.UsageError("--federation: it is one of an app's directory; give --nodes instead")
        elif len(names) == 2 and all(":" in name for name in names):
            sys.path.insert(0, os.getcwd())  # noqa: PTH109  # as `python -m` does
            app = FlowerApp(*names)
        else:
            raise options.UsageError(
                f"{' '.join(names)}: name a Flower app's directory, an installed app (publisher/app), or "
                "server_module:app client_module:app"
            )
        return app.configured(arguments.run_config or [])
    except AppDirectoryError as exc:
        raise options.UsageError(str(exc)) from exc


def _nodes(arguments: argparse.Namespace, app: FlowerApp) -> tuple[int, str]:
    """Return how many nodes there are, and who chose that."""
    if arguments.nodes is not None:
        return arguments.nodes, "flag"
    if app.num_nodes is None:
        return NODES, "default"
    if app.num_nodes > MOST_CLIENTS:
        raise options.UsageError(
            f"options.num-supernodes in pyproject.toml must be at most {MOST_CLIENTS:,}, got {app.num_nodes}"
        )
    return app.num_nodes, "pyproject.toml"


def _start(arguments: argparse.Namespace, app: FlowerApp) -> tuple[ServerApp, Executor]:
    settings = _settings(arguments, app)
    try:
        if arguments.quiet:
            logging.disable(logging.INFO)
            prepare: Callable[[], object] | None = functools.partial(logging.disable, logging.INFO)
        else:
            prepare = None if arguments.flower_log else log_less_of_flower
        return start(app.server, app.client, settings, prepare)
    except LoadServerAppError as exc:
        raise _reason(exc) from exc


def _settings(arguments: argparse.Namespace, app: FlowerApp) -> Settings:
    """Return the executor's settings; the resources that an app asks for each client bound how many run."""
    flags, config = options.executor_flags(arguments), app_settings(app.run_config)
    settings = resolve(flags=flags, config=config)
    if Capability.REMOTE in _registry.load_chosen(settings).capabilities:
        return settings  # what this machine has says nothing about the nodes of a cluster
    at_once = _at_once(app.resources, settings)
    return settings if at_once is None else resolve(flags=flags, config={"max_workers": at_once, **config})


def _at_once(resources: Mapping[str, float], settings: Settings) -> int | None:
    """Return how many clients this machine has the resources for; None if an app does not ask for any."""
    bounds = []
    if "num-cpus" in resources:
        bounds.append(available_cores() / resources["num-cpus"])
    if "num-gpus" in resources:
        number = len(find_devices(settings.device))
        if number:
            of_each = 1 / resources["num-gpus"]
            bounds.append(number * int(of_each) if of_each >= 1 else number * of_each)
        else:
            log.warning("the app asks for %g GPU(s) for each client; there is none", resources["num-gpus"])
    return max(1, int(min(bounds))) if bounds else None


def _reason(error: Exception) -> Exception:
    """Make a failure one line; before it goes where the app's own code failed."""
    log.debug("the simulation failed", exc_info=error)
    if is_output_closed(error):
        return error
    if isinstance(error, FedexecError | LoadServerAppError | LoadClientAppError):
        return error if isinstance(error, FedexecError) else FedexecError(str(error))
    told = "".join(traceback.format_exception(error))
    print(visible(told, lines=True), end="", file=sys.stderr)
    return FedexecError(f"the ServerApp raised {one_line(error)}")
