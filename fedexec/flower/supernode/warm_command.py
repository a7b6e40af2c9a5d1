"""A command of Flower in a warm process: the worker becomes what the launcher would have been."""

import functools
import importlib.util
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points

from fedexec._worker.threads import THREAD_VARIABLES
from fedexec.devices.device import LEDGER_VARIABLE
from fedexec.flower.offloading import set_isolated, warm_torch
from fedexec.interface import once

__all__ = ["run", "warm"]

# What the executor has set for its workers: their share of the cores, and the device that this one has.
_OF_THE_WORKER = (
    *THREAD_VARIABLES,
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "FEDEXEC_DEVICE",
    LEDGER_VARIABLE,
)


@functools.cache
def _entry_point(name: str) -> Callable[[], object]:
    (entry,) = entry_points(group="console_scripts", name=name)
    loaded: Callable[[], object] = entry.load()
    return loaded


def warm(name: str) -> None:
    """Load the command in the template, and torch if it is installed.

    Parameters
    ----------
    name : str
        Of a console script.
    """
    _entry_point(name)
    if importlib.util.find_spec("torch") is not None:
        __import__("torch")
    warm_torch()


@once  # its token is good for one run
def run(lender: tuple[str, bytes], command: Sequence[str], cwd: str, environ: Mapping[str, str]) -> int:
    """Run a command with the standard streams that a launcher has lent.

    Parameters
    ----------
    lender : tuple of (str, bytes)
        Address of the host's socket, and what to say there to get the streams.
    command : sequence of str
        Name of a console script, and its arguments.
    cwd : str
    environ : mapping of str to str

    Returns
    -------
    int
        The exit code.
    """
    address, ticket = lender
    with socket.socket(socket.AF_UNIX) as host:
        host.connect(address)
        host.sendall(ticket)
        _, streams, _, _ = socket.recv_fds(host, 1, 3)
    if not streams:
        raise ConnectionError("the launcher is gone")
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    own = {name: os.environ[name] for name in _OF_THE_WORKER if name in os.environ}
    os.environ.clear()
    os.environ.update({**environ, **own})
    os.chdir(cwd)
    sys.argv = [*command]
    set_isolated()
    try:
        return _exit_code(_entry_point(command[0])())
    except SystemExit as exc:
        return _exit_code(exc.code)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for output in (sys.stdout, sys.stderr):
            output.flush()


def _exit_code(result: object) -> int:
    """Return what a console script's result means, as `sys.exit` sees it."""
    if result is None or isinstance(result, int):
        return int(result or 0) & 0xFF
    print(result, file=sys.stderr)
    return 1
