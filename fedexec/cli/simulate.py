"""``fedexec simulate``: a Flower app on this machine, every node's work in a worker."""

import argparse
import contextlib
import logging
import os
import sys
import traceback
from typing import Any

import numpy as np
from flwr.serverapp import ServerApp

from fedexec import __version__
from fedexec.cli import options
from fedexec.cli.display import Display
from fedexec.cli.ending import Ending
from fedexec.cli.output import as_dicts, digest, stdout_as_stderr, write, write_json
from fedexec.errors import FedexecError
from fedexec.executor import Executor
from fedexec.flower import (
    AppDirectoryError,
    FlowerApp,
    Journal,
    LoadClientAppError,
    LoadServerAppError,
    Round,
    Simulation,
    app_settings,
    read_app,
    simulate,
)
from fedexec.flower.simulation import start
from fedexec.memory.timeline import Timeline
from fedexec.settings import resolve

__all__ = ["command"]

log = logging.getLogger("fedexec")


def command(arguments: argparse.Namespace) -> int:
    """Simulate."""
    app = _app(arguments)
    report = options.writable("--json", arguments.json)
    weights_file = options.writable("--save", arguments.save)
    if not arguments.flower_log:
        logging.getLogger("flwr").setLevel(logging.ERROR)
    showing = Display(None, quiet=arguments.quiet, stderr=report == options.STDOUT)
    with contextlib.ExitStack() as stack:
        if report == options.STDOUT:
            stack.enter_context(stdout_as_stderr())
        display = stack.enter_context(showing)
        server, executor = _start(arguments, app)
        stack.enter_context(executor)
        display.chosen(executor.settings)
        timeline = stack.enter_context(Timeline(executor.devices))

        def progress(current: Round, done: int, planned: int | None) -> None:
            if current.seconds:  # it is over
                timeline.mark("round", current.server_round)
            display.progress(current, done, planned)

        def stop() -> None:
            display.hush()
            logging.getLogger("fedexec").setLevel(logging.CRITICAL)  # what fails now was ended by us
            executor.kill_workers()

        ending = Ending(stop)
        try:
            simulation = simulate(
                server,
                app.client,
                num_nodes=arguments.nodes,
                executor=executor,
                run_config=app.run_config,
                seed=arguments.seed,
                journal=Journal(progress),
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
        result = _result(arguments, app, executor, simulation) | {"memory": timeline.as_dict()}
    if weights_file is not None:
        arrays = _arrays(simulation)
        if arrays is None:
            raise FedexecError("--save: this app's strategy returned no weights")
        write(weights_file, lambda file: np.savez(file, **arrays))
    if report is not None:
        write_json(report, result)
    return 0


def _app(arguments: argparse.Namespace) -> FlowerApp:
    names = arguments.app or ["."]
    try:
        if len(names) == 1:
            app = read_app(names[0])
        elif len(names) == 2 and all(":" in name for name in names):
            sys.path.insert(0, os.getcwd())  # noqa: PTH109  # as `python -m` does
            app = FlowerApp(*names)
        else:
            raise options.UsageError(
                f"{' '.join(names)}: name a Flower app's directory, or server_module:app client_module:app"
            )
        return app.configured(arguments.run_config or [])
    except AppDirectoryError as exc:
        raise options.UsageError(str(exc)) from exc


def _start(arguments: argparse.Namespace, app: FlowerApp) -> tuple[ServerApp, Executor]:
    settings = resolve(flags=options.executor_flags(arguments), config=app_settings(app.run_config))
    try:
        return start(app.server, app.client, settings)
    except LoadServerAppError as exc:
        raise _reason(exc) from exc


def _reason(error: Exception) -> Exception:
    """Make a failure one line; before it goes where the app's own code failed."""
    log.debug("the simulation failed", exc_info=error)
    if isinstance(error, FedexecError | LoadServerAppError | LoadClientAppError):
        return error if isinstance(error, FedexecError) else FedexecError(str(error))
    traceback.print_exception(error)
    return FedexecError(f"the ServerApp raised {type(error).__name__}: {error}")


def _arrays(simulation: Simulation) -> dict[str, Any] | None:
    record = getattr(simulation.result, "arrays", None)
    return None if record is None else {name: array.numpy() for name, array in record.items()}


def _result(
    arguments: argparse.Namespace, app: FlowerApp, executor: Executor, simulation: Simulation
) -> dict[str, Any]:
    arrays = _arrays(simulation)
    return {
        "fedexec": __version__,
        "app": {"server": app.server, "client": app.client, "run_config": app.run_config},
        "nodes": arguments.nodes,
        "seed": arguments.seed,
        "settings": executor.settings.as_dict(),
        "rounds": as_dicts(simulation.rounds),
        "tasks": as_dicts(simulation.tasks),
        "stats": simulation.stats.as_dict(),
        "weights_sha256": None if arrays is None else digest(arrays.values()),
    }
