"""The server of the built-in job, from its start to what it leaves."""

import argparse
import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

from fedexec import __version__
from fedexec._cli import options
from fedexec._cli.display import Display
from fedexec._cli.hosting import Elsewhere, Hosting
from fedexec._cli.job_process import job_executor, prepare_process, told
from fedexec._cli.output import as_dicts, as_json, as_npz, digest, write
from fedexec._cli.resuming import Resuming
from fedexec._cli.round_log import RoundLog
from fedexec._cli.running import CLOSED
from fedexec._cli.secret import read_tls
from fedexec._workload import jobs
from fedexec._workload.data import DataSpec
from fedexec.executor import Executor
from fedexec.flower import Round, TaskRecorder
from fedexec.flower.grpc import ClientHost, FedAvgMp, executor_evaluate_fn, serve
from fedexec.flower.grpc.address import free_address
from fedexec.memory.timeline import Timeline
from fedexec.settings import Settings

__all__ = ["serve_job"]

STARTING_SECONDS = 60.0  # that workers may take, once a round
ENDING_SECONDS = 5.0  # that a worker may take which has exceeded its time

Certificates = tuple[bytes, bytes, bytes]
MakeHosting = Callable[[Executor, TaskRecorder], Hosting]

_NOTED = (
    "rounds", "epochs", "batch_size", "learning_rate", "fit_clients", "available_clients",
    "evaluate_clients", "address",
)  # fmt: skip


def serve_job(
    arguments: argparse.Namespace,
    spec: DataSpec,
    hosting: MakeHosting,
    secret: bytes | None,
) -> int:
    """Serve the rounds that the command line asks for, and write what it names.

    Parameters
    ----------
    arguments : argparse.Namespace
    spec : DataSpec
    hosting : callable
        Makes what hosts the clients, once the server's address is known.
    secret : bytes or None
        What clients must know to take part.

    Returns
    -------
    int
        The exit code.
    """
    _check_numbers(arguments, spec)
    inputs = [*(arguments.certificates or ()), arguments.client_secret]
    report, weights_file, lines = options.run_outputs(arguments, inputs)
    certificates = read_tls(*arguments.certificates) if arguments.certificates else None
    prepare_process(arguments.address)
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
        showing as display,
        RoundLog(arguments, lines, goes_on=arguments.resume) as round_log,
        job_executor(arguments, spec) as executor,
        Timeline(executor.devices) as timeline,
    ):
        display.chosen(executor.settings, machines=executor.nodes())
        job = _ServedJob(arguments, spec, executor, resuming, display, timeline, round_log)
        ending.prepare(stop=job.stop, advice=resuming.advice)
        try:
            job.serve(hosting, certificates, secret)
        except Exception as exc:
            ending.settle()
            job.host.kill()
            raise told(exc, resuming.advice()) from exc
        executor.shutdown()
        timeline.mark("shutdown")
        weights, result = job.weights(), job.result()
        display.table(job.strategy.rounds, executor.stats(), job.recorder.tasks, timeline)
    write((weights_file, lambda: as_npz(*weights)), (report, lambda: as_json(result)))
    return 0


class _ServedJob:
    """One run: a server, its clients, and what is noted of both."""

    strategy: FedAvgMp

    def __init__(
        self,
        arguments: argparse.Namespace,
        spec: DataSpec,
        executor: Executor,
        resuming: Resuming,
        display: Display,
        timeline: Timeline,
        round_log: RoundLog,
    ) -> None:
        self._round_log = round_log
        self._arguments, self._spec, self._executor = arguments, spec, executor
        self._resuming, self._display, self._timeline = resuming, display, timeline
        self.recorder = TaskRecorder()
        self.host: Hosting = Elsewhere()

    def stop(self) -> None:
        """End everything at once."""
        self.host.kill()
        self._executor.kill_workers()

    def serve(
        self,
        hosting: MakeHosting,
        certificates: Certificates | None,
        secret: bytes | None,
    ) -> None:
        """Serve until all rounds are done, and the clients of this machine have ended."""
        arguments, spec = self._arguments, self._spec
        initial = self.recorder.result_of(self._executor.submit(jobs.prepare, spec), kind="prepare")
        if self._resuming.last is not None:
            initial = self._resuming.last.weights
        if arguments.address is None:  # as late as possible: until the server listens, it may be taken
            arguments.address = free_address()
        self.host = hosting(self._executor, self.recorder)
        shared = isinstance(self.host, ClientHost)
        self.strategy = self._make_strategy(initial)
        serve(
            self.strategy,
            address=arguments.address,
            num_rounds=arguments.rounds - len(self._resuming.rounds[1:]),
            max_clients=spec.clients,
            numbers=spec.clients,
            round_timeout=round_timeout(arguments, self._executor.settings, shared=shared),
            certificates=certificates,
            secret=secret,
            on_ready=self.host.start,
        )
        self.host.join()

    def weights(self) -> jobs.Weights:
        """Return the global model."""
        assert self.strategy.parameters is not None
        return parameters_to_ndarrays(self.strategy.parameters)

    def result(self) -> dict[str, Any]:
        """Return what ``--json`` writes."""
        own = {name: getattr(self._arguments, name) for name in _NOTED}
        last = self._resuming.last
        return {
            "fedexec": __version__,
            "settings": self._executor.settings.as_dict() | {"data": self._spec.as_dict()} | own,
            "resumed_from": last.server_round if last is not None else None,
            "rounds": as_dicts(self.strategy.rounds),
            "tasks": as_dicts(self.recorder.tasks),
            "stats": self._executor.stats().as_dict(),
            "memory": self._timeline.as_dict(),
            "weights_sha256": digest(self.weights()),
        }

    def _progress(self, current: Round, done: int) -> None:
        if current.seconds:  # it is over
            self._timeline.mark("round", current.server_round)
            self._resuming.save(self.strategy.rounds, self.weights())
            self._round_log.write(current)
        self._display.progress(current, done)

    def _wait(self, there: int, needed: int) -> None:
        self.host.check()
        written = isinstance(self.host, Elsewhere)
        self._display.waiting(self._arguments.address, there, needed, written=written)

    def _make_strategy(self, initial: jobs.Weights) -> FedAvgMp:
        arguments, spec = self._arguments, self._spec
        training = {name: getattr(arguments, name) for name in ("epochs", "batch_size", "learning_rate")}
        return FedAvgMp(
            fit_clients=arguments.fit_clients or spec.clients,
            available_clients=arguments.available_clients or spec.clients,
            min_results=arguments.min_results,
            done=self._resuming.rounds,
            evaluate_clients=arguments.evaluate_clients,
            seed=spec.seed,
            on_progress=self._progress,
            on_waiting=self._wait,
            evaluate_fn=executor_evaluate_fn(
                self._executor, functools.partial(jobs.test, data=spec), recorder=self.recorder
            ),
            on_fit_config_fn=lambda server_round: dict(training),
            initial_parameters=ndarrays_to_parameters(initial),
        )


def _check_numbers(arguments: argparse.Namespace, spec: DataSpec) -> None:
    """Raise UsageError if more clients are asked for than there are."""
    for name in ("available_clients", "fit_clients", "evaluate_clients", "min_results"):
        number = getattr(arguments, name) or 0
        if number > spec.clients:
            option = f"--{name.replace('_', '-')}"
            raise options.UsageError(f"{option} {number} are more than --clients {spec.clients}")


def round_timeout(arguments: argparse.Namespace, settings: Settings, *, shared: bool) -> float | None:
    """Return how many seconds a client may take to answer; None is for ever.

    Parameters
    ----------
    arguments : argparse.Namespace
    settings : Settings
        Of the executor.
    shared : bool
        Clients run here, on that executor, so that as many work at once as it has workers.
    """
    given: float | None = arguments.round_timeout
    if given is not None or settings.timeout is None:
        return given
    asked = max(arguments.fit_clients or arguments.clients, arguments.evaluate_clients)
    at_once = settings.max_workers if shared and not settings.auto else 1
    turns = math.ceil(asked / at_once) * (1 + settings.retries)
    seconds: float = STARTING_SECONDS + turns * (settings.timeout + ENDING_SECONDS)
    return seconds
