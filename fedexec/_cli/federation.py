"""``fedexec run``, ``server`` and ``client``: the tutorial's job, end to end.

This process hosts the server and the clients, a thread each; they share one executor, so that ``max_workers``
bounds what runs at once on this machine, whatever Flower samples. It never imports torch.
"""

import argparse
import contextlib
import functools
import ipaddress
import json
import logging
import math
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from fedexec import __version__, _registry
from fedexec._cli import options
from fedexec._cli.display import Display
from fedexec._cli.output import as_dicts, as_json, as_npz, digest, write
from fedexec._cli.resuming import Resuming
from fedexec._cli.running import CLOSED
from fedexec._cli.secret import read_certificate, read_key, read_secret
from fedexec._system.error_text import one_line
from fedexec._worker.setup import environment
from fedexec._workload import jobs
from fedexec._workload.data import DataError, DataSpec
from fedexec.errors import FedexecError
from fedexec.executor import Executor
from fedexec.flower import Round, TaskRecord
from fedexec.flower.grpc import (
    ClientHost,
    ExecutorClient,
    FedAvgMp,
    RecordingExecutor,
    executor_evaluate_fn,
    serve,
    split_address,
)
from fedexec.flower.grpc.address import AddressError, free_address
from fedexec.interface import Capability, Hooks
from fedexec.memory.timeline import Timeline
from fedexec.settings import Settings

__all__ = ["client", "run", "server"]

log = logging.getLogger("fedexec")

STARTING_SECONDS = 60.0  # that workers may take, once a round
ENDING_SECONDS = 5.0  # that a worker may take which has exceeded its time


def run(arguments: argparse.Namespace) -> int:
    """Server and clients on this machine."""
    spec = options.data_spec(arguments)
    # Whoever else is on this machine stays out.
    secret = read_secret(arguments.client_secret) or secrets.token_bytes(32)
    if arguments.processes:
        return _serve(arguments, spec, functools.partial(_ClientProcesses, arguments, secret), secret)
    root = read_certificate(arguments.certificates[0]) if arguments.certificates else None

    def hosting(tasks: RecordingExecutor) -> ClientHost:
        return ClientHost(
            _clients(tasks, spec, range(arguments.clients), secret),
            server_address=arguments.address,
            root_certificates=root,
            connect_timeout=arguments.connect_timeout,
        )

    return _serve(arguments, spec, hosting, secret)


def server(arguments: argparse.Namespace) -> int:
    """The server alone."""
    spec = options.data_spec(arguments)
    return _serve(arguments, spec, lambda tasks: _Elsewhere(), read_secret(arguments.client_secret))


def client(arguments: argparse.Namespace) -> int:
    """The clients of one machine."""
    spec = options.data_spec(arguments)
    last = spec.clients if arguments.host is None else arguments.first + arguments.host
    if not arguments.first < last <= spec.clients:
        raise options.UsageError(
            f"clients {arguments.first} to {last - 1} are not among 0 to {spec.clients - 1}: "
            "see --clients, --first and --host"
        )
    inputs = (arguments.root_certificates, arguments.client_secret)
    report = options.outputs({"--json": arguments.json}, inputs)["--json"]
    root = read_certificate(arguments.root_certificates) if arguments.root_certificates else None
    secret = read_secret(arguments.client_secret)
    _prepare_process(arguments.address)
    with _executor(arguments, spec) as executor:
        tasks = RecordingExecutor(executor)
        host = ClientHost(
            _clients(tasks, spec, range(arguments.first, last), secret),
            server_address=arguments.address,
            root_certificates=root,
            connect_timeout=arguments.connect_timeout,
        )
        # A signal ends this process at once, and its workers with it: nobody is told of tasks that failed.
        try:
            host.start()
            host.join()
        except Exception as exc:
            raise _reason(exc) from exc
        if not arguments.quiet:
            print(f"{len(tasks.records)} tasks done for clients {arguments.first} to {last - 1}")
        result = {"tasks": as_dicts(tasks.records), "stats": executor.stats().as_dict()}
        write((report, lambda: as_json(result)))
    return 0


# ---------------------------------------------------------------- the server's life


class _Elsewhere:
    """Clients that somebody else starts."""

    def start(self) -> None:
        """Nothing to start."""

    def check(self) -> None:
        """Nothing to check: they may come at any time."""

    def join(self) -> None:
        """Nothing to wait for."""

    def kill(self) -> None:
        """Nothing to end."""


_Hosting = Callable[[RecordingExecutor], Any]


def _serve(arguments: argparse.Namespace, spec: DataSpec, hosting: _Hosting, secret: bytes | None) -> int:
    for name in ("available_clients", "fit_clients", "evaluate_clients", "min_results"):
        number = getattr(arguments, name) or 0
        if number > spec.clients:
            option = f"--{name.replace('_', '-')}"
            raise options.UsageError(f"{option} {number} are more than --clients {spec.clients}")
    names = {"--json": arguments.json, "--save": arguments.save}
    inputs = [*(arguments.certificates or ()), arguments.client_secret]
    report, weights_file = options.outputs(names, inputs).values()
    certificates: tuple[bytes, bytes, bytes] | None = None
    if arguments.certificates:
        ca, certificate, key = arguments.certificates
        certificates = read_certificate(ca), read_certificate(certificate), read_key(key)
    _prepare_process(arguments.address)

    ending = arguments.ending
    showing = Display(
        arguments.rounds,
        quiet=arguments.quiet,
        stderr=report == options.STDOUT,
        on_closed=functools.partial(ending.leave, CLOSED),
    )
    ending.prepare(hush=showing.hush)
    with (
        contextlib.closing(Resuming(arguments, spec)) as resuming,
        contextlib.ExitStack() as stack,
        showing as display,
        _executor(arguments, spec) as executor,
    ):
        display.chosen(executor.settings)
        timeline = stack.enter_context(Timeline(executor.devices))
        tasks = RecordingExecutor(executor)
        host: Any = _Elsewhere()

        def stop() -> None:
            host.kill()
            executor.kill_workers()

        ending.prepare(stop=stop, advice=resuming.advice)
        try:
            initial = tasks.call(jobs.prepare, spec, kind="prepare", client=None, server_round=None)
            if resuming.last is not None:
                initial = resuming.last.weights
            if arguments.address is None:  # as late as possible: until the server listens, it may be taken
                arguments.address = free_address()
            host = hosting(tasks)

            def progress(current: Round, done: int) -> None:
                if current.seconds:  # it is over
                    timeline.mark("round", current.server_round)
                    resuming.save(strategy.rounds, _weights(strategy))
                display.progress(current, done)

            strategy = _strategy(arguments, spec, tasks, initial, progress, host.check, resuming.rounds)
            serve(
                strategy,
                address=arguments.address,
                num_rounds=arguments.rounds - len(resuming.rounds[1:]),
                max_clients=spec.clients,
                numbers=spec.clients,
                round_timeout=_round_timeout(arguments, executor.settings, isinstance(host, ClientHost)),
                certificates=certificates,
                secret=secret,
                on_ready=host.start,
            )
            host.join()
        except Exception as exc:
            ending.settle()
            host.kill()
            raise _reason(exc) from exc
        executor.shutdown()
        timeline.mark("shutdown")
        final = _weights(strategy)
        result = {
            "fedexec": __version__,
            "settings": _settings(arguments, executor.settings, spec),
            "resumed_from": resuming.last.server_round if resuming.last is not None else None,
            "rounds": as_dicts(strategy.rounds),
            "tasks": as_dicts(tasks.records),
            "stats": executor.stats().as_dict(),
            "memory": timeline.as_dict(),
            "weights_sha256": digest(final),
        }
        display.table(strategy.rounds, executor.stats(), tasks.records, timeline)
    write((weights_file, lambda: as_npz(*final)), (report, lambda: as_json(result)))
    return 0


def _round_timeout(arguments: argparse.Namespace, settings: Settings, shared: bool) -> float | None:
    """Return how long a client may take: as told, or what the tasks of a round may take; None is for ever."""
    given: float | None = arguments.round_timeout
    if given is not None or settings.timeout is None:
        return given
    asked = max(arguments.fit_clients or arguments.clients, arguments.evaluate_clients)
    at_once = settings.max_workers if shared and not settings.auto else 1
    turns = math.ceil(asked / at_once) * (1 + settings.retries)
    seconds: float = STARTING_SECONDS + turns * (settings.timeout + ENDING_SECONDS)
    return seconds


def _strategy(
    arguments: argparse.Namespace,
    spec: DataSpec,
    tasks: RecordingExecutor,
    initial: jobs.Weights,
    on_progress: Callable[[Round, int], None],
    still_coming: Callable[[], object],
    done: list[Round],
) -> FedAvgMp:
    from flwr.common import ndarrays_to_parameters

    training = {
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
    }
    return FedAvgMp(
        fit_clients=arguments.fit_clients or spec.clients,
        available_clients=arguments.available_clients or spec.clients,
        min_results=arguments.min_results,
        done=done,
        evaluate_clients=arguments.evaluate_clients,
        seed=spec.seed,
        on_progress=on_progress,
        still_coming=still_coming,
        evaluate_fn=executor_evaluate_fn(tasks, functools.partial(jobs.test, data=spec)),
        on_fit_config_fn=lambda server_round: dict(training),
        initial_parameters=ndarrays_to_parameters(initial),
    )


# ---------------------------------------------------------------- clients


def _clients(
    tasks: RecordingExecutor, spec: DataSpec, indices: range, secret: bytes | None
) -> list[ExecutorClient]:
    return [
        ExecutorClient(
            tasks,
            fit=functools.partial(jobs.train, data=spec, client=index),
            evaluate=functools.partial(jobs.test, data=spec, client=index),
            index=index,
            secret=secret,
        )
        for index in indices
    ]


class _ClientProcesses:
    """The tutorial's form: a process for each client, with an executor of its own."""

    def __init__(self, arguments: argparse.Namespace, secret: bytes, tasks: RecordingExecutor) -> None:
        self._arguments = arguments
        self._secret = secret
        self._tasks = tasks
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start `fedexec client` once for each client."""
        for index in range(self._arguments.clients):
            process = subprocess.Popen(self._command(index), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._processes.append(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # it has ended: see check()
                stdin.write(self._secret)
            process.stdin = None  # communicate() shall not look for it

    def check(self) -> None:
        """Raise if one has ended, which before the first round only a failure does."""
        for index, process in enumerate(self._processes):
            if process.poll() is not None:
                raise ConnectionError(f"client {index} ended with exit code {process.returncode}")

    def join(self) -> None:
        """Wait for their end and take over what their tasks cost.

        One that failed has nothing to tell; the round it was missing in has noted it.
        """
        for process in self._processes:
            output, _ = process.communicate()
            rows = json.loads(output)["tasks"] if output else []
            self._tasks.records += [TaskRecord.from_dict(row) for row in rows]

    def kill(self) -> None:
        """End them; their workers notice."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _command(self, index: int) -> list[str]:
        given = self._arguments
        command = [sys.executable, "-m", "fedexec", "client", "--quiet", "--json", "-"]
        command += ["--first", str(index), "--host", "1", "--client-secret", "-"]
        for name in (
            "address",
            "clients",
            "data",
            "data_dir",
            "partition",
            "alpha",
            "seed",
            "connect_timeout",
        ):
            command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
        flags = options.executor_flags(given) | {"max_workers": 1}
        if "threads_per_worker" not in flags:
            flags["threads_per_worker"] = options.executor_settings(given).threads_per_worker
        for name, value in flags.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        if given.certificates:
            command += ["--root-certificates", given.certificates[0]]
        return command


# ---------------------------------------------------------------- this process


def _executor(arguments: argparse.Namespace, spec: DataSpec) -> Executor:
    settings = options.executor_settings(arguments)
    if Capability.ISOLATED not in _registry.load_chosen(settings).capabilities:
        # Tasks run in this process, which is ours: hold it to a worker's share before torch is imported.
        os.environ.update(environment(settings))
    return Executor(settings, Hooks(warmup=functools.partial(_warm_up, spec)))


def _warm_up(spec: DataSpec) -> None:
    """Warm the template up; data that cannot be read is for the first task to report."""
    with contextlib.suppress(DataError):
        jobs.warm_up(spec)


def _prepare_process(address: str | None) -> None:
    """Keep Flower quiet (its deprecation notices are ours to mind), and proxies away from this machine."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        host, _ = split_address(address) if address is not None else ("127.0.0.1", 0)
    except AddressError as exc:
        raise options.UsageError(f"--address: {exc}") from exc
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if local:
        excluded = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
        os.environ["no_grpc_proxy"] = ",".join(filter(None, [excluded, host]))


def _reason(error: Exception) -> Exception:
    """Make a failure one that the command line reports in one line: what a task raised can be anything."""
    if isinstance(error, FedexecError | OSError):
        return error
    log.debug("the run failed", exc_info=error)
    return FedexecError(one_line(error))


# ---------------------------------------------------------------- what a run leaves


def _settings(arguments: argparse.Namespace, settings: Settings, spec: DataSpec) -> dict[str, Any]:
    own = ("rounds", "epochs", "batch_size", "learning_rate", "fit_clients", "available_clients",
           "evaluate_clients", "address")  # fmt: skip
    return settings.as_dict() | {"data": spec.as_dict()} | {name: getattr(arguments, name) for name in own}


def _weights(strategy: FedAvgMp) -> jobs.Weights:
    from flwr.common import parameters_to_ndarrays

    assert strategy.parameters is not None
    return parameters_to_ndarrays(strategy.parameters)
