"""The command ``fedexec``. 0 done, 1 failed, 2 wrong usage, 3 not whole, 130 Ctrl+C, 143 SIGTERM."""

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fedexec import __version__
from fedexec._cli import backends, doctor, options, probe, report
from fedexec._cli.ending import Ending
from fedexec._system.files import IS_FULL
from fedexec._system.visible import show_in_log, visible
from fedexec.errors import FedexecError, SettingsError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Defaults to ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit code.
    """
    arguments = _parser().parse_args(argv)
    for name in ("fedexec", "fedexec.flower", "flwr"):
        logging.getLogger(name).addFilter(show_in_log)
    with Ending() as arguments.ending:
        try:
            code = int(arguments.command(arguments))
            sys.stdout.flush()
            return code
        except (SettingsError, options.UsageError) as exc:
            return _complain(exc, 2)
        except (FedexecError, OSError) as exc:
            return _complain(exc, 1)


def _complain(error: Exception, code: int) -> int:
    says = str(error)
    if isinstance(error, OSError) and error.errno in IS_FULL:  # files are named: see fedexec._system.files
        says = f"{error.filename or 'standard output'}: {error.strerror}; free some space there"
    print(f"fedexec: error: {visible(says, lines=True)}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter would try again
    return code


class _Parser(argparse.ArgumentParser):
    """Complains in one line; the usage is there for who asks."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {visible(message)} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fedexec", description="Federated learning with every client in its own process.")
    parser.add_argument("--version", action="version", version=f"fedexec {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="train: server and clients on this machine")
    options.add_federation(run)
    options.add_hosting(run)
    options.add_data(run)
    options.add_executor(run)
    options.add_output(run)
    options.add_checkpoint(run)
    run.add_argument("--address", help="where the server listens (default: a free port of 127.0.0.1)")
    run.add_argument("--processes", action="store_true", help="one process per client, as in the tutorial")
    run.set_defaults(command=_run)

    server = commands.add_parser("server", help="only the server; its clients run elsewhere")
    options.add_federation(server)
    options.add_data(server)
    options.add_executor(server)
    options.add_output(server)
    options.add_checkpoint(server)
    server.add_argument("--address", default=options.ADDRESS, help="where to listen (default: %(default)s)")
    server.set_defaults(command=_server)

    client = commands.add_parser("client", help="only the clients of this machine")
    options.add_hosting(client)
    options.add_data(client)
    options.add_executor(client)
    options.add_client(client)
    client.set_defaults(command=_client)

    probing = commands.add_parser("probe", help="how much one task takes, and how many the machine holds")
    options.add_probe(probing)
    options.add_data(probing)
    options.add_executor(probing)
    probing.set_defaults(command=probe.command)

    looking = commands.add_parser("doctor", help="find what may spoil a run, and what crashes have left")
    looking.add_argument("--clean", action="store_true", help="end our processes whose caller has ended")
    looking.add_argument("--json", action="store_true", help="print JSON")
    looking.set_defaults(command=doctor.command)

    simulation = commands.add_parser("simulate", help="run a Flower app: its server, and many nodes")
    options.add_simulation(simulation)
    options.add_executor(simulation)
    options.add_output(simulation)
    simulation.set_defaults(command=_simulate)

    benching = commands.add_parser("bench", help="measure every backend here, with our jobs or yours")
    options.add_bench(benching)
    benching.set_defaults(command=_bench)

    reporting = commands.add_parser("report", help="read benchmarks, and say which backend to use")
    options.add_report(reporting)
    reporting.set_defaults(command=report.command)

    listing = commands.add_parser(
        "backends", help="list the backends, their promises, and how to install them"
    )
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(command=backends.command)
    return parser


def _bench(arguments: argparse.Namespace) -> int:
    from fedexec._cli import bench

    return bench.command(arguments)


def _run(arguments: argparse.Namespace) -> int:
    _need("demo", "flwr", "torch", "rich")
    from fedexec._cli import federation

    return federation.run(arguments)


def _server(arguments: argparse.Namespace) -> int:
    _need("demo", "flwr", "torch", "rich")
    from fedexec._cli import federation

    return federation.server(arguments)


def _client(arguments: argparse.Namespace) -> int:
    _need("demo", "flwr", "torch", "rich")
    from fedexec._cli import federation

    return federation.client(arguments)


def _simulate(arguments: argparse.Namespace) -> int:
    _need("flower", "flwr", "rich")
    from fedexec._cli import simulate

    return simulate.command(arguments)


def _need(extra: str, *packages: str) -> None:
    """Raise FedexecError, before anything heavy is imported, if a package of an extra is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise FedexecError(f"{package} is not installed. Install it with: pip install 'fedexec[{extra}]'")
