"""The commands: what each is for, its options and examples, and what it calls."""

import argparse
import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import TypeAlias

from fedexec import __version__
from fedexec._cli import federation_options, options
from fedexec._cli.parser import Parser
from fedexec.errors import FedexecError

__all__ = ["make_parser"]

_Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

_ABOUT = "Federated learning with every client in a process of its own, whose memory ends with it."
_EPILOG = """\
examples:
  fedexec run                            train the built-in job on this machine
  fedexec simulate my-app --nodes 20     run a Flower app of yours
  fedexec probe --task my_training:fit   measure one task of yours
  fedexec bench                          measure every backend on this machine
  fedexec report fedexec-bench.json      read that, and which backend to use

exit codes:
  0    it is done
  1    it failed: the last line on stderr says why
  2    the usage or a setting is wrong, and nothing was begun
  3    bench and report: something is missing from the results
  130  Ctrl+C, and 143 SIGTERM: everything was ended
  141  nobody reads the output any more, as behind `| head`
"""


def make_parser() -> Parser:
    """Return what reads the command line; it imports nothing that takes long."""
    parser = Parser(prog="fedexec", description=_ABOUT, epilog=_EPILOG)
    parser.add_argument("-V", "--version", action="version", version=f"fedexec {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_run, _server, _client, _simulate, _supernode):
        add(commands)
    for add in (_probe, _bench, _report, _backends, _nodes, _doctor):
        add(commands)
    return parser


def _command(
    commands: _Commands,
    name: str,
    summary: str,
    about: str,
    examples: str,
    *,
    calls: str,
    needs: tuple[str, ...] = (),
) -> Parser:
    """Add a command.

    Parameters
    ----------
    commands : argparse action
    name, summary : str
        As in the list of commands.
    about : str
        A sentence or two for its own ``--help``.
    examples : str
        Lines without indent.
    calls : str
        ``"module:function"`` of this package; the module is imported when the command runs.
    needs : tuple of str
        Packages without which it cannot run.
    """
    indented = "".join(f"  {line}\n" for line in examples.strip().splitlines())
    made: Parser = commands.add_parser(name, help=summary, description=about, epilog=f"examples:\n{indented}")
    made.set_defaults(command=_calling(calls, needs), parser=made, name_unknown_variables=True)
    return made


def _calling(target: str, needs: tuple[str, ...]) -> Callable[[argparse.Namespace], int]:
    module, _, name = target.partition(":")

    def call(arguments: argparse.Namespace) -> int:
        _need("demo" if "torch" in needs else "flower", *needs)
        code: int = getattr(import_module(f"fedexec._cli.{module}"), name)(arguments)
        return code

    return call


def _need(extra: str, *packages: str) -> None:
    """Raise FedexecError, before anything heavy is imported, if a package of an extra is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise FedexecError(f"{package} is not installed. Install it with: pip install 'fedexec[{extra}]'")


def _run(commands: _Commands) -> None:
    run = _command(
        commands,
        "run",
        "train: server and clients on this machine",
        "Train the built-in job: a server and its clients on this machine. What a client computes runs in a "
        "process of its own, and what that held ends with it.",
        """
fedexec run
fedexec run --clients 20 --fit-clients 5 --rounds 10 --json run.json
fedexec run --checkpoint state            # after an interruption: --resume
fedexec run --backend loky --max-workers 2
""",
        calls="federation:run",
        needs=("flwr", "torch", "rich"),
    )
    federation_options.add_federation(run)
    federation_options.add_hosting(run)
    options.add_data(run)
    options.add_executor(run)
    options.add_output(run)
    federation_options.add_checkpoint(run)
    run.add_argument("--address", help="where the server listens (default: a free port of 127.0.0.1)")
    run.add_argument("--processes", action="store_true", help="one process per client, as in the tutorial")


def _server(commands: _Commands) -> None:
    server = _command(
        commands,
        "server",
        "only the server; its clients run elsewhere",
        "Run only the server of the built-in job. It waits for its clients, which `fedexec client` runs "
        "elsewhere, and says how many of them are there.",
        """
fedexec server --address 0.0.0.0:8080 --clients 20 --client-secret secret \\
    --certificates ca.pem server.pem server.key
fedexec server --clients 20 --available-clients 10   # begin when 10 are there
""",
        calls="federation:server",
        needs=("flwr", "torch", "rich"),
    )
    federation_options.add_federation(server)
    options.add_data(server)
    options.add_executor(server)
    options.add_output(server)
    federation_options.add_checkpoint(server)
    server.add_argument("--address", default=options.ADDRESS, help="where to listen (default: %(default)s)")


def _client(commands: _Commands) -> None:
    client = _command(
        commands,
        "client",
        "only the clients of this machine",
        "Run only clients: those of this machine. Their server, which `fedexec server` runs, is elsewhere.",
        """
fedexec client --address server.example:8080 --clients 20 --host 10
fedexec client --address server.example:8080 --clients 20 --first 10 \\
    --client-secret secret --root-certificates ca.pem
""",
        calls="federation:client",
        needs=("flwr", "torch", "rich"),
    )
    federation_options.add_hosting(client)
    options.add_data(client)
    options.add_executor(client)
    federation_options.add_client(client)


def _simulate(commands: _Commands) -> None:
    simulate = _command(
        commands,
        "simulate",
        "run a Flower app: its server, and many nodes",
        "Run a Flower app on this machine: its ServerApp here, and its ClientApp, for each message, in a "
        "process of its own.",
        """
fedexec simulate                          # the app in this directory
fedexec simulate my-app --nodes 50 --run-config 'num-server-rounds=5 lr=0.1'
fedexec simulate my_app.server:app my_app.client:app --max-workers auto
""",
        calls="simulate:command",
        needs=("flwr", "rich"),
    )
    federation_options.add_simulation(simulate)
    options.add_executor(simulate)
    options.add_output(simulate)


def _supernode(commands: _Commands) -> None:
    supernode = _command(
        commands,
        "supernode",
        "Flower's SuperNodes, whose ClientApps start warm",
        "Run Flower's own SuperNodes on this machine, unchanged. Their ClientApps, which Flower would start "
        "in a cold interpreter for each message, start in warm processes. All of them together run as many "
        "at once as the memory allows, or --max-workers.",
        """
fedexec supernode -- --insecure --superlink 127.0.0.1:9092 --node-config 'partition-id=0 num-partitions=2'
fedexec supernode --max-workers 1 -- --insecure --port 9094 -- --insecure --port 9095
""",
        calls="supernode:command",
        needs=("flwr",),
    )
    supernode.add_argument(
        "flower", nargs="*", metavar="-- ARGUMENT",
        help="the arguments of flower-supernode, after --; another -- begins those of another SuperNode",
    )  # fmt: skip
    options.add_executor(supernode)


def _probe(commands: _Commands) -> None:
    probe = _command(
        commands,
        "probe",
        "how much one task takes, and how many the machine holds",
        "Run one task a few times, measure the memory that it takes, and say how many of them this machine "
        "holds at once.",
        """
fedexec probe
fedexec probe --task my_training:fit --arguments my_training:arguments
fedexec probe --calibrate                 # on a machine with a GPU
""",
        calls="probe:command",
    )
    options.add_probe(probe)
    options.add_data(probe)
    options.add_executor(probe)


def _bench(commands: _Commands) -> None:
    bench = _command(
        commands,
        "bench",
        "measure every backend here, with our jobs or yours",
        "Measure every backend on this machine, with the built-in jobs or with a task of yours. What is done "
        "is saved after each round: after Ctrl+C the same command goes on.",
        """
fedexec bench
fedexec bench --task my_training:fit --arguments my_training:arguments
fedexec bench --only standby,process
fedexec report fedexec-bench.json --html report.html
""",
        calls="bench:command",
    )
    options.add_bench(bench)


def _report(commands: _Commands) -> None:
    report = _command(
        commands,
        "report",
        "read benchmarks, and say which backend to use",
        "Read what `fedexec bench` has measured, and say which backend to use for which workload.",
        """
fedexec report fedexec-bench.json
fedexec report fedexec-bench.json --html report.html
fedexec report before.json after.json     # the second compared with the first
""",
        calls="report:command",
    )
    options.add_report(report)


def _backends(commands: _Commands) -> None:
    backends = _command(
        commands,
        "backends",
        "list the backends, their promises, and how to install them",
        "List the backends: where each runs a task, what it promises, and how to install it if missing.",
        """
fedexec backends
fedexec backends --json
""",
        calls="backends:command",
    )
    backends.add_argument("--json", action="store_true", help="print JSON")


def _nodes(commands: _Commands) -> None:
    nodes = _command(
        commands,
        "nodes",
        "list the machines of a Ray or Dask cluster",
        "List the machines of a cluster: how many tasks each runs at once, its cores, memory, devices and "
        "versions.",
        """
fedexec nodes --backend ray --ray-address 10.0.0.1:6379
fedexec nodes --backend dask --dask-address tcp://10.0.0.1:8786 --json
""",
        calls="nodes:command",
    )
    options.add_executor(nodes)
    nodes.add_argument("--json", action="store_true", help="print JSON")


def _doctor(commands: _Commands) -> None:
    doctor = _command(
        commands,
        "doctor",
        "find what may spoil a run, and what crashes have left",
        "Look for what may spoil a run, and for what crashes have left: at versions, variables, memory, "
        "devices, ports and processes. The exit code is 1 if something is wrong.",
        """
fedexec doctor
fedexec doctor --clean                    # end what a crash has left running
""",
        calls="doctor:command",
    )
    doctor.add_argument("--clean", action="store_true", help="end our processes whose caller has ended")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(name_unknown_variables=False)  # it finds them itself
