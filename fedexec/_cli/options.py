"""The command line's options, and what they become."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedexec import settings
from fedexec._system import files
from fedexec._workload.data import DATASETS, PARTITIONS, DataSpec
from fedexec._workload.jobs import PRELOAD
from fedexec.settings import Settings, resolve

__all__ = [
    "ADDRESS",
    "STDOUT",
    "UsageError",
    "add_bench",
    "add_checkpoint",
    "add_client",
    "add_data",
    "add_executor",
    "add_federation",
    "add_hosting",
    "add_output",
    "add_probe",
    "add_report",
    "add_simulation",
    "data_spec",
    "executor_flags",
    "executor_settings",
    "outputs",
]

ADDRESS = "127.0.0.1:8080"
STDOUT = Path("-")
DOCUMENTATION = "https://fedexec.readthedocs.io"


class UsageError(ValueError):
    """Options that make no sense together; exit code 2."""


def _number(
    kind: Callable[[str], float], minimum: float, *, exclusive: bool = False
) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not (value > minimum if exclusive else value >= minimum) or value == float("inf"):
            raise argparse.ArgumentTypeError(
                f"must be {'greater than' if exclusive else 'at least'} {minimum:g}, got {text}"
            )
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return read


_positive = _number(int, 1)
_count = _number(int, 0)
_above_zero = _number(float, 0, exclusive=True)


def add_executor(parser: argparse.ArgumentParser) -> None:
    """How tasks run. A flag wins over ``FEDEXEC_...``, which wins over the default."""
    group = parser.add_argument_group(
        "executor",
        "How tasks run. Each can also stand in the environment (--backend is FEDEXEC_BACKEND); all are "
        "explained at " + DOCUMENTATION + "/reference/settings/",
    )
    for option in _executor_options():
        text = f"{option.text} Default: {option.default}.".replace("`", "").replace("%", "%%")
        group.add_argument(option.flag, metavar=option.metavar, help=text)


def _executor_options() -> list[settings.Option]:
    """Return the settings that have a flag: all but the seed, which each command reads as its own."""
    return [option for option in settings.options() if option.name != "seed"]


def add_federation(parser: argparse.ArgumentParser) -> None:
    """What the server decides."""
    group = parser.add_argument_group("federation")
    group.add_argument("--clients", type=_positive, default=10, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--available-clients", type=_positive, metavar="N", help="connected before round 1 (default: all)"
    )
    group.add_argument("--fit-clients", type=_positive, metavar="N", help="sampled a round (default: all)")
    group.add_argument(
        "--evaluate-clients", type=_count, default=0, metavar="N",
        help="evaluate on N clients after each round (default: only on the server)",
    )  # fmt: skip
    group.add_argument(
        "--min-results", type=_positive, default=1, metavar="N",
        help="fail if fewer clients of a round give a result (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--round-timeout", type=_above_zero, metavar="SECONDS",
        help="a client that takes longer to answer fails, and takes part no more (default: what --timeout "
        "allows for the tasks of a round, one after the other where clients are elsewhere, and a minute)",
    )  # fmt: skip
    group.add_argument("--rounds", type=_positive, default=5, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--epochs", type=_positive, default=5, metavar="N", help="a client's (default: %(default)s)"
    )
    group.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--learning-rate", type=_above_zero, default=0.02, metavar="X", help="default: %(default)s"
    )
    group.add_argument(
        "--certificates", nargs=3, metavar=("CA", "CERT", "KEY"), help="PEM files: serve with TLS"
    )
    _add_secret(group)


def add_simulation(parser: argparse.ArgumentParser) -> None:
    """Which app, and on how many nodes."""
    parser.add_argument(
        "app", nargs="*", metavar="APP",
        help="a directory with a Flower app (default: this one), or SERVER CLIENT as module:app module:app",
    )  # fmt: skip
    parser.add_argument(
        "--nodes", type=_positive, metavar="N",
        help="how many (default: options.num-supernodes of the app's default federation, or 10)",
    )  # fmt: skip
    parser.add_argument(
        "--run-config", action="append", metavar="KEY=VALUE",
        help="override the app's config, as for `flwr run`: 'num-rounds=5 lr=0.1', or a TOML file",
    )  # fmt: skip
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="default: %(default)s")
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
        "--connect-timeout", type=_above_zero, default=30.0, metavar="SECONDS",
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
        "--clients", type=_positive, default=10, metavar="N", help="in all (default: %(default)s)"
    )
    parser.add_argument(
        "--first", type=_count, default=0, metavar="I", help="the first hosted here (default: 0)"
    )
    parser.add_argument(
        "--host", type=_positive, metavar="N", help="how many are hosted here (default: the rest)"
    )
    parser.add_argument("--root-certificates", metavar="CA", help="PEM file: connect with TLS")
    _add_secret(parser)
    parser.add_argument("--json", metavar="FILE", help="write what each task cost; - is stdout")
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def add_probe(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument(
        "--task", metavar="MODULE:FUNCTION",
        help="called without arguments (default: one client's fit of the built-in job)",
    )  # fmt: skip
    parser.add_argument(
        "--clients", type=_positive, default=10, metavar="N",
        help="that the built-in job's data is split among (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", action="store_true",
        help="measure the GPU instead, and print the FEDEXEC_DEVICE that emulates it elsewhere",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_bench(parser: argparse.ArgumentParser) -> None:
    """What is measured, and where it is kept."""
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--quick", dest="mode", action="store_const", const="quick", default="quick",
        help="every backend, in a few minutes (default)",
    )  # fmt: skip
    mode.add_argument(
        "--full", dest="mode", action="store_const", const="full",
        help="more jobs and rounds, and what else is installed: Ray, loky, ProcessPoolExecutor, the tutorial",
    )  # fmt: skip
    mode.add_argument(
        "--smoke", dest="mode", action="store_const", const="smoke", help="one small round each: does it run?"
    )
    parser.add_argument("--task", metavar="MODULE:FUNCTION", help="measure this client instead of our jobs")
    parser.add_argument(
        "--arguments", metavar="MODULE:FACTORY",
        help="called with a client's number, returns the tuple of its arguments (default: none)",
    )  # fmt: skip
    parser.add_argument("--only", metavar="NAMES", help="only these backends and peers, with commas")
    parser.add_argument(
        "--json", metavar="FILE", default="fedexec-bench.json",
        help="pytest-benchmark's JSON; if it is there, the run goes on (default: %(default)s)",
    )  # fmt: skip


def add_report(parser: argparse.ArgumentParser) -> None:
    """What is read, and what is written."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE",
        help="JSON of `fedexec bench` or `pytest bench`; each after the first is compared with it",
    )  # fmt: skip
    parser.add_argument("--html", metavar="OUT", help="write one page that needs nothing else; - is stdout")
    parser.add_argument("--markdown", metavar="OUT", help="write Markdown; - is stdout")
    parser.add_argument("--json", metavar="OUT", help="write the table and the verdict as JSON")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Which data, and how it is split."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=DATASETS, default="digits", help="default: %(default)s")
    group.add_argument(
        "--data-dir", default="dataset", metavar="DIR", help="of CIFAR-10 (default: %(default)s)"
    )
    group.add_argument("--download", action="store_true", help="allow to download CIFAR-10")
    group.add_argument("--partition", choices=PARTITIONS, default="iid", help="default: %(default)s")
    group.add_argument(
        "--alpha", type=_above_zero, default=0.5, metavar="X", help="of dirichlet (default: %(default)s)"
    )
    group.add_argument("--seed", type=_count, default=0, metavar="N", help="default: %(default)s")


def add_output(parser: argparse.ArgumentParser) -> None:
    """What a run leaves."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write settings, rounds, tasks and stats; - is stdout")
    group.add_argument("--save", metavar="FILE", help="write the final weights as .npz")
    group.add_argument("--quiet", action="store_true", help="print errors only")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """How a run goes on that was ended."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--checkpoint", metavar="DIR", help="write the state of the run there after each round"
    )
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in that directory")


def executor_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the executor's flags that were given."""
    names = (option.name for option in _executor_options())
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def executor_settings(arguments: argparse.Namespace) -> Settings:
    """Settle the executor's settings; the job's own preload is the default."""
    resolved = resolve(flags=executor_flags(arguments))
    if resolved.sources["preload"] == "default":
        resolved = replace(resolved, preload=PRELOAD)
    return resolved


def data_spec(arguments: argparse.Namespace) -> DataSpec:
    """Gather the data options."""
    return DataSpec(
        name=arguments.data,
        directory=arguments.data_dir,
        download=arguments.download,
        partition=arguments.partition,
        alpha=arguments.alpha,
        clients=arguments.clients,
        seed=arguments.seed,
    )


def outputs(names: Mapping[str, str | None], inputs: Iterable[str | None] = ()) -> dict[str, Path | None]:
    """Check, before any work is done, that what a command is to leave can be written.

    Parameters
    ----------
    names : mapping of str to (str or None)
        Option to the file's name.
    inputs : iterable of (str or None)
        Names of files that the command reads.

    Raises
    ------
    UsageError
        One cannot be written, is an input, or is another output.
    """
    taken = {name: "is also read" for name in inputs if name not in (None, str(STDOUT))}
    found: dict[str, Path | None] = dict.fromkeys(names)
    for option, name in names.items():
        if name is None:
            continue
        path = Path(name)
        if path == STDOUT or files.descriptor(path) == 1:
            found[option] = STDOUT
            continue
        for other, use in taken.items():
            if files.is_same(path, Path(other)):
                raise UsageError(f"{option} {name} {use}: name another file")
        try:
            files.attempt(path)
        except files.UnwritableError as exc:
            raise UsageError(f"{option} {exc}") from exc
        taken[name] = f"is also what {option} writes"
        found[option] = path
    return found
