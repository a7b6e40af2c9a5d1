"""Where the clients of a server run: elsewhere, as threads of this process, or in a process each."""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
from typing import Protocol

from fedexec import _registry
from fedexec._cli import options
from fedexec._scheduling.settings_checks import uses_limits
from fedexec._workload import jobs
from fedexec._workload.data import DataSpec
from fedexec.executor import Executor
from fedexec.flower import TaskRecord, TaskRecorder
from fedexec.flower.grpc import ExecutorClient
from fedexec.settings import unknown_variables

__all__ = ["ClientProcesses", "Elsewhere", "Hosting", "clients_of"]

_SAME_AS_OURS = ("address", "clients", "data", "data_dir", "partition", "alpha", "seed", "connect_timeout")
_LIMITS = ("memory_limit", "device_memory_limit")


class Hosting(Protocol):
    """What a server's run does with the clients of its machine."""

    def start(self) -> None:
        """Start them."""

    def check(self) -> None:
        """Raise what is wrong with them, before the first round."""

    def join(self) -> None:
        """Wait for their end."""

    def kill(self) -> None:
        """End them at once."""


class Elsewhere:
    """Clients that somebody else starts: they may come at any time."""

    def start(self) -> None:
        """Nothing to start."""

    def check(self) -> None:
        """Nothing to check."""

    def join(self) -> None:
        """Nothing to wait for."""

    def kill(self) -> None:
        """Nothing to end."""


def clients_of(
    executor: Executor, recorder: TaskRecorder, spec: DataSpec, indices: range, secret: bytes | None
) -> list[ExecutorClient]:
    """Make clients of the built-in job, which work on an executor."""
    return [
        ExecutorClient(
            executor,
            fit=functools.partial(jobs.train, data=spec, client=index),
            evaluate=functools.partial(jobs.test, data=spec, client=index),
            index=index,
            secret=secret,
            recorder=recorder,
        )
        for index in indices
    ]


class ClientProcesses:
    """The tutorial's form: a process for each client, with an executor of its own.

    Parameters
    ----------
    arguments : argparse.Namespace
        Of the command that serves.
    secret : bytes
        What clients must know.
    recorder : TaskRecorder
        Gets the records of the clients' tasks, too.
    """

    def __init__(self, arguments: argparse.Namespace, secret: bytes, recorder: TaskRecorder) -> None:
        self._arguments = arguments
        self._secret = secret
        self._recorder = recorder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start `fedexec client` once for each client."""
        misspelt = unknown_variables(os.environ)  # which this process has told already
        environ = {name: value for name, value in os.environ.items() if name not in misspelt}
        for index in range(self._arguments.clients):
            process = subprocess.Popen(
                self._command(index), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
            )
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
            self._recorder.tasks += [TaskRecord.from_dict(row) for row in rows]

    def kill(self) -> None:
        """End them; their workers notice."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _command(self, index: int) -> list[str]:
        given = self._arguments
        command = [sys.executable, "-m", "fedexec", "client", "--quiet", "--json", "-"]
        command += ["--first", str(index), "--host", "1", "--client-secret", "-", "--max-workers", "1"]
        for name in _SAME_AS_OURS:
            command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
        settings = options.executor_settings(given)
        flags = {"threads_per_worker": settings.threads_per_worker} | options.executor_flags(given)
        # What changes nothing is said by the server, once.
        are_used = uses_limits(settings, _registry.load_chosen(settings).capabilities)
        for name, value in flags.items():
            if name != "max_workers" and (are_used or name not in _LIMITS):
                command += [f"--{name.replace('_', '-')}", str(value)]
        if given.certificates:
            command += ["--root-certificates", given.certificates[0]]
        return command
