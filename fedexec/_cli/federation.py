"""``fedexec run``, ``server`` and ``client``: the tutorial's job, end to end.

This process hosts the server and the clients, a thread each; they share one executor, so that ``max_workers``
bounds what runs at once on this machine, whatever Flower samples.
"""

import argparse
import secrets

from fedexec._cli import options
from fedexec._cli.hosting import ClientProcesses, Elsewhere, clients_of
from fedexec._cli.job_process import job_executor, prepare_process, told
from fedexec._cli.output import as_dicts, as_json, write
from fedexec._cli.secret import read_authority, read_secret
from fedexec._cli.serving import serve_job
from fedexec.executor import Executor
from fedexec.flower import TaskRecord, TaskRecorder
from fedexec.flower.grpc import ClientHost

__all__ = ["client", "run", "server"]


def run(arguments: argparse.Namespace) -> int:
    """Server and clients on this machine."""
    spec = options.data_spec(arguments)
    # Whoever else is on this machine stays out.
    secret = read_secret(arguments.client_secret) or secrets.token_bytes(32)
    if arguments.processes:
        return serve_job(
            arguments, spec, lambda executor, recorder: ClientProcesses(arguments, secret, recorder), secret
        )

    authority = arguments.certificates[0] if arguments.certificates else None

    def hosting(executor: Executor, recorder: TaskRecorder) -> ClientHost:
        return ClientHost(
            clients_of(executor, recorder, spec, range(arguments.clients), secret),
            server_address=arguments.address,
            root_certificates=read_authority(authority, "--certificates"),
            connect_timeout=arguments.connect_timeout,
        )

    return serve_job(arguments, spec, hosting, secret)


def server(arguments: argparse.Namespace) -> int:
    """The server alone."""
    spec = options.data_spec(arguments)
    secret = read_secret(arguments.client_secret)
    return serve_job(arguments, spec, lambda executor, recorder: Elsewhere(), secret)


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
    root = read_authority(arguments.root_certificates, "--root-certificates")
    secret = read_secret(arguments.client_secret)
    prepare_process(arguments.address)
    with job_executor(arguments, spec) as executor:
        recorder = TaskRecorder()
        host = ClientHost(
            clients_of(executor, recorder, spec, range(arguments.first, last), secret),
            server_address=arguments.address,
            root_certificates=root,
            connect_timeout=arguments.connect_timeout,
        )
        # A signal ends this process at once, and its workers with it: nobody is told of tasks that failed.
        try:
            host.start()
            host.join()
        except Exception as exc:
            raise told(exc) from exc
        if not arguments.quiet:
            print(_summary(recorder.tasks, arguments.first, last - 1))
        result = {"tasks": as_dicts(recorder.tasks), "stats": executor.stats().as_dict()}
        write((report, lambda: as_json(result)))
    return 0


def _summary(tasks: list[TaskRecord], first: int, last: int) -> str:
    failed = sum(task.error is not None for task in tasks)
    counted = f", {failed} of them failed" if failed else ""
    return f"{len(tasks)} tasks done for clients {first} to {last}{counted}"
