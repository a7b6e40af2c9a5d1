"""The options of the commands that run a federation: run, server, client and simulate."""

import argparse

from fedexec._cli.number_arguments import above_zero, clients, count, positive
from fedexec._cli.options import ADDRESS, add_quiet

__all__ = ["add_checkpoint", "add_client", "add_federation", "add_hosting", "add_simulation"]


def add_federation(parser: argparse.ArgumentParser) -> None:
    """What the server decides."""
    group = parser.add_argument_group("federation")
    group.add_argument(
        "--clients", type=clients, default=10, metavar="N", help="how many there are (default: %(default)s)"
    )
    group.add_argument(
        "--available-clients",
        type=clients,
        metavar="N",
        help="how many must have connected before round 1 (default: all)",
    )
    group.add_argument(
        "--fit-clients", type=clients, metavar="N", help="how many train in each round (default: all)"
    )
    group.add_argument(
        "--evaluate-clients", type=count, default=0, metavar="N",
        help="evaluate on N clients after each round (default: only on the server)",
    )  # fmt: skip
    group.add_argument(
        "--min-results", type=clients, default=1, metavar="N",
        help="fail if fewer clients of a round give a result (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--round-timeout", type=above_zero, metavar="SECONDS",
        help="a client that takes longer to answer fails, and takes part no more (default: what --timeout "
        "allows for the tasks of a round, one after the other where clients are elsewhere, and a minute)",
    )  # fmt: skip
    group.add_argument(
        "--rounds", type=positive, default=5, metavar="N", help="how many (default: %(default)s)"
    )
    group.add_argument(
        "--epochs",
        type=positive,
        default=5,
        metavar="N",
        help="how often a client goes over its data in a round (default: %(default)s)",
    )
    group.add_argument(
        "--batch-size", type=positive, default=32, metavar="N",
        help="samples of one training step (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--learning-rate",
        type=above_zero,
        default=0.02,
        metavar="X",
        help="of the clients' SGD (default: %(default)s)",
    )
    group.add_argument(
        "--certificates", nargs=3, metavar=("CA", "CERT", "KEY"), help="PEM files: serve with TLS"
    )
    _add_secret(group)


def add_simulation(parser: argparse.ArgumentParser) -> None:
    """Which app, and on how many nodes."""
    parser.add_argument(
        "app", nargs="*", metavar="APP",
        help="a directory with a Flower app (default: this one), an installed app (publisher/app), or SERVER "
        "CLIENT as module:app module:app",
    )  # fmt: skip
    parser.add_argument(
        "--federation", metavar="NAME",
        help="which federation of the app's pyproject.toml says how many nodes there are, and what each "
        "client needs (default: its default)",
    )  # fmt: skip
    parser.add_argument(
        "--nodes", type=clients, metavar="N",
        help="how many (default: options.num-supernodes of the app's federation, or 10)",
    )  # fmt: skip
    parser.add_argument(
        "--run-config", action="append", metavar="KEY=VALUE",
        help="override the app's config, as for `flwr run`: 'num-rounds=5 lr=0.1', or a TOML file",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=count, default=0, metavar="N",
        help="all random numbers follow from it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="for an app that caches its data in a module: handle the first message of each type once more, "
        "before it is sent, so that all workers are born with what it leaves in memory",
    )
    parser.add_argument("--flower-log", action="store_true", help="show what Flower's server logs too")


def add_hosting(parser: argparse.ArgumentParser) -> None:
    """How clients reach the server."""
    parser.add_argument(
        "--connect-timeout", type=above_zero, default=30.0, metavar="SECONDS",
        help="wait that long for the server (default: %(default)g)",
    )  # fmt: skip


def _add_secret(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--client-secret", metavar="FILE",
        help="the same on both sides: the server lets only clients take part that know it; - is stdin. "
        "Without TLS it does not stop who relays or changes what both send",
    )  # fmt: skip


def add_client(parser: argparse.ArgumentParser) -> None:
    """Which clients this machine hosts."""
    parser.add_argument("--address", default=ADDRESS, help="the server's (default: %(default)s)")
    parser.add_argument(
        "--clients",
        type=clients,
        default=10,
        metavar="N",
        help="how many there are on all machines together (default: %(default)s)",
    )
    parser.add_argument(
        "--first",
        type=count,
        default=0,
        metavar="I",
        help="number of the first that runs here (default: 0)",
    )
    parser.add_argument("--host", type=clients, metavar="N", help="how many run here (default: the rest)")
    parser.add_argument("--root-certificates", metavar="CA", help="PEM file: connect with TLS")
    _add_secret(parser)
    parser.add_argument("--json", metavar="FILE", help="write what each task cost; - is stdout")
    add_quiet(parser)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """How a run goes on that was ended."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--checkpoint", metavar="DIR", help="write the state of the run there after each round"
    )
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in that directory")
