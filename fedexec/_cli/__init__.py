"""The entry of the command ``fedexec``: it hears Ctrl+C before anything is imported that takes time."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # type checkers take it for typing's
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType


def _say_less(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show an exception, but of Ctrl+C no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("\nfedexec: SIGINT\n")
    else:
        sys.__excepthook__(kind, error, trace)


_before, sys.excepthook = sys.excepthook, _say_less
from fedexec._cli.signals import Ending  # noqa: E402  # what this imports takes a while itself

sys.excepthook = _before

__all__ = ["entry", "main"]


def entry() -> int:
    """Run the command of this process, whose signals stay ours to its very end; return the exit code."""
    return _run(None, Ending())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command within a program that goes on afterwards.

    Parameters
    ----------
    argv : sequence of str, optional
        Defaults to ``sys.argv[1:]``.

    Returns
    -------
    int
        The exit code; ``fedexec --help`` says what each means.

    Raises
    ------
    SystemExit
        After ``--help`` and ``--version``, and where the usage is wrong.
    """
    with Ending() as ending:
        return _run(argv, ending)


def _run(argv: Sequence[str] | None, ending: Ending) -> int:
    from fedexec._cli.running import run

    return run(argv, ending)
