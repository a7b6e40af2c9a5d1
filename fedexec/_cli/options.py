"""The command line's options, and what they become."""

import argparse
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedexec import settings
from fedexec._cli.number_arguments import above_zero, clients, count
from fedexec._system import files
from fedexec._workload.data import DATASETS, PARTITIONS, DataSpec
from fedexec._workload.jobs import PRELOAD
from fedexec.settings import Settings, resolve

__all__ = [
    "ADDRESS",
    "STDOUT",
    "UsageError",
    "add_bench",
    "add_data",
    "add_executor",
    "add_output",
    "add_probe",
    "add_quiet",
    "add_report",
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


def add_probe(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument(
        "--task", metavar="MODULE:FUNCTION",
        help="what is measured (default: one client's fit of the built-in job)",
    )  # fmt: skip
    _add_arguments(parser)
    parser.add_argument(
        "--clients", type=clients, default=10, metavar="N",
        help="that the built-in job's data is split among (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", action="store_true",
        help="measure the GPU instead, and print the FEDEXEC_DEVICE that emulates it elsewhere",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arguments", metavar="MODULE:FACTORY",
        help="makes the task's arguments: called with a client's number, it returns a tuple (default: none)",
    )  # fmt: skip


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
    _add_arguments(parser)
    parser.add_argument("--only", metavar="NAMES", help="only these backends and peers, with commas")
    parser.add_argument(
        "--json", metavar="FILE",
        help="pytest-benchmark's JSON; if it is there, the run goes on (default: fedexec-bench.json, or "
        "fedexec-bench-MODULE-FUNCTION.json with --task)",
    )  # fmt: skip
    add_quiet(parser)


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
    group.add_argument(
        "--data", choices=DATASETS, default="digits", help="what to train on (default: %(default)s)"
    )
    group.add_argument(
        "--data-dir", default="dataset", metavar="DIR", help="where CIFAR-10 lies (default: %(default)s)"
    )
    group.add_argument("--download", action="store_true", help="allow to download CIFAR-10")
    group.add_argument(
        "--partition", choices=PARTITIONS, default="iid",
        help="how it is split among the clients (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--alpha",
        type=above_zero,
        default=0.5,
        metavar="X",
        help="of dirichlet: the smaller, the more the clients' classes differ (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=count, default=0, metavar="N",
        help="all random numbers follow from it (default: %(default)s)",
    )  # fmt: skip


def add_output(parser: argparse.ArgumentParser) -> None:
    """What a run leaves."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write settings, rounds, tasks and stats; - is stdout")
    group.add_argument("--save", metavar="FILE", help="write the final weights as .npz")
    group.add_argument(
        "--log", metavar="FILE", help="write a line of JSON for each round as soon as the round is over"
    )
    group.add_argument(
        "--tensorboard",
        metavar="DIR",
        help="write each round for TensorBoard (pip install 'fedexec[tensorboard]')",
    )
    add_quiet(group)


def add_quiet(parser: argparse._ActionsContainer) -> None:
    """How little is said."""
    parser.add_argument("-q", "--quiet", action="store_true", help="show warnings and errors only")


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


def run_outputs(
    arguments: argparse.Namespace, inputs: Iterable[str | None]
) -> tuple[Path | None, Path | None, Path | None]:
    """Return where a run leaves its report, its weights and the lines of its rounds; see :func:`outputs`."""
    names = {"--json": arguments.json, "--save": arguments.save, "--log": arguments.log}
    report, weights, lines = outputs(names, inputs, binary=("--save",)).values()
    if lines == STDOUT:
        raise UsageError(
            f"--log {arguments.log} is the standard output, where progress is shown: name a file"
        )
    return report, weights, lines


def outputs(
    names: Mapping[str, str | None], inputs: Iterable[str | None] = (), *, binary: Container[str] = ()
) -> dict[str, Path | None]:
    """Check, before any work is done, that what a command is to leave can be written.

    Parameters
    ----------
    names : mapping of str to (str or None)
        Option to the file's name.
    inputs : iterable of (str or None)
        Names of files that the command reads.
    binary : container of str
        Options whose files are no text, so that they cannot be written to the standard output.

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
        if not name:
            raise UsageError(f"{option} needs the name of a file")
        path = Path(name)
        if path == STDOUT or files.descriptor(path) == 1:
            if option in binary:
                raise UsageError(
                    f"{option} {name} is the standard output, but what it writes is no text: name a file"
                )
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
