"""The process that serves or hosts the built-in job: its executor, its log, and how it fails.

It never imports torch.
"""

import argparse
import contextlib
import functools
import ipaddress
import logging
import os

from fedexec import _registry
from fedexec._cli import options
from fedexec._cli.running import is_output_closed
from fedexec._system.error_text import one_line
from fedexec._worker.setup import environment
from fedexec._workload import jobs
from fedexec._workload.data import DataError, DataSpec
from fedexec.errors import FedexecError
from fedexec.executor import Executor
from fedexec.flower.grpc import split_address
from fedexec.flower.grpc.address import AddressError
from fedexec.interface import Capability, Hooks

__all__ = ["job_executor", "prepare_process", "told"]

log = logging.getLogger("fedexec")


def job_executor(arguments: argparse.Namespace, spec: DataSpec) -> Executor:
    """Make the executor that the command line asks for."""
    settings = options.executor_settings(arguments)
    if Capability.ISOLATED not in _registry.load_chosen(settings).capabilities:
        # Tasks run in this process, which is ours: hold it to a worker's share before torch is imported.
        os.environ.update(environment(settings))
    return Executor(settings, Hooks(warmup=functools.partial(_warm_up, spec)))


def _warm_up(spec: DataSpec) -> None:
    """Warm the template up; data that cannot be read is for the first task to report."""
    with contextlib.suppress(DataError):
        jobs.warm_up(spec)


def prepare_process(address: str | None) -> None:
    """Keep Flower quiet (its deprecation notices are ours to mind), and proxies away from this machine.

    Raises
    ------
    UsageError
        The address is none.
    """
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


def told(error: Exception, advice: str | None = None) -> Exception:
    """Make a failure one that the command line tells in one line: what a task raised can be anything.

    Parameters
    ----------
    error : Exception
    advice : str, optional
        What the user may do next, for a line of its own.
    """
    if is_output_closed(error):
        return error
    log.debug("the run failed", exc_info=error)
    if advice is None and isinstance(error, FedexecError | OSError):
        return error
    reason = str(error) if isinstance(error, FedexecError) else one_line(error)
    return FedexecError(f"{reason}\nfedexec: {advice}" if advice else reason)
