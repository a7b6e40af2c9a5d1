"""One command, from its arguments to its exit code."""

import contextlib
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence

from fedexec import settings
from fedexec._cli.commands import make_parser
from fedexec._cli.options import UsageError
from fedexec._cli.signals import Ending
from fedexec._system.control_characters import show_in_log, visible
from fedexec._system.files import IS_FULL
from fedexec.errors import FedexecError, SettingsError

__all__ = ["CLOSED", "is_output_closed", "run"]

FAILED, USAGE = 1, 2
CLOSED = 128 + getattr(signal, "SIGPIPE", 13)
"""Exit code of a program whose reader has gone, as a shell shows it of one that SIGPIPE has ended."""


def run(argv: Sequence[str] | None, ending: Ending) -> int:
    """Run one command; return its exit code.

    Parameters
    ----------
    argv : sequence of str or None
        None is ``sys.argv[1:]``.
    ending : Ending
        Hears signals, and is told by the command what to end.
    """
    try:
        try:
            code = _obey(argv, ending)
        finally:
            _flush()
    except (SettingsError, UsageError) as exc:
        return _complain(exc, USAGE)
    except KeyboardInterrupt:  # pressed again while a command was ending by itself
        with contextlib.suppress(OSError):
            print("\nfedexec: SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except (FedexecError, OSError) as exc:
        if is_output_closed(exc):
            _forget_output()
            return CLOSED
        return _complain(exc, FAILED)
    return code


def is_output_closed(error: BaseException) -> bool:
    """Return whether an error says that nobody reads our standard output, or errors, any more."""
    return isinstance(error, BrokenPipeError) and any(map(_has_no_reader, (1, 2)))


def _obey(argv: Sequence[str] | None, ending: Ending) -> int:
    arguments = make_parser().read(argv)
    arguments.ending = ending
    for name in ("fedexec", "fedexec.flower", "flwr"):
        logging.getLogger(name).addFilter(show_in_log)
    if arguments.name_unknown_variables:
        settings.warn_of_unknown_variables(os.environ)
    return int(arguments.command(arguments))


def _complain(error: Exception, code: int) -> int:
    says = str(error)
    if isinstance(error, OSError) and error.errno in IS_FULL:  # files are named: see fedexec._system.files
        says = f"{error.filename or 'standard output'}: {error.strerror}; free some space there"
    with contextlib.suppress(OSError):  # nobody may read it
        print(f"fedexec: error: {visible(says, lines=True)}", file=sys.stderr)
    try:
        _flush()
    except OSError:
        _forget_output()
    return code


def _flush() -> None:
    if sys.stdout is not None:  # it may have been closed before we came
        sys.stdout.flush()


def _forget_output() -> None:
    """Throw away what could not be written: the interpreter would try again, and complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(null, stream.fileno())


def _has_no_reader(descriptor: int) -> bool:
    """Return whether the other end of a pipe or socket is closed."""
    if not hasattr(select, "poll"):
        return True  # there is no telling, and a broken pipe was seen
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
