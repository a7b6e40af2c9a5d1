"""The rounds of a run as other tools read them, while it goes on: lines of JSON, and TensorBoard's files."""

import argparse
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fedexec._cli import options
from fedexec._cli.output import as_plain
from fedexec._system.error_text import one_line
from fedexec.flower import Round

__all__ = ["RoundLog"]

log = logging.getLogger("fedexec")


class RoundLog:
    """Writes each round that is over; a context manager. What cannot be written never ends a run.

    Parameters
    ----------
    arguments : argparse.Namespace
        With ``log`` and ``tensorboard``.
    file : Path or None
        Where the lines go.
    goes_on : bool
        Whether to append to the file, because the run goes on from an earlier one.

    Raises
    ------
    UsageError
        TensorBoard is not installed, or its directory cannot be made.
    """

    def __init__(self, arguments: argparse.Namespace, file: Path | None, *, goes_on: bool = False) -> None:
        self._sinks: list[Callable[[Round], None]] = []
        self._stack = contextlib.ExitStack()
        if arguments.tensorboard is not None:
            self._sinks.append(_TensorBoard(arguments.tensorboard, self._stack).write)
        if file is not None:
            opened = self._stack.enter_context(file.open("a" if goes_on else "w", encoding="utf-8"))
            self._sinks.append(_Lines(opened).write)

    def __enter__(self) -> "RoundLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._stack.close()
        except Exception as exc:
            log.warning("the log of the rounds is not whole: %s", one_line(exc))

    def write(self, current: Round) -> None:
        """Write a round.

        Parameters
        ----------
        current : Round
            It is over.
        """
        for sink in tuple(self._sinks):
            try:
                sink(current)
            except Exception as exc:
                self._sinks.remove(sink)
                log.warning("round %d and later ones are not logged: %s", current.server_round, one_line(exc))


class _Lines:
    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, current: Round) -> None:
        line = json.dumps({"time": time.time(), **current.as_dict()}, default=as_plain)
        self._file.write(line + "\n")
        self._file.flush()


class _TensorBoard:
    """Scalars, grouped by who has measured them. Each start of a strategy is a run of TensorBoard's."""

    def __init__(self, directory: str, stack: contextlib.ExitStack) -> None:
        try:
            from tensorboard.summary import Writer
        except ImportError as exc:
            raise options.UsageError(
                f"--tensorboard needs TensorBoard ({exc}): pip install 'fedexec[tensorboard]'"
            ) from exc
        self._directory, self._stack = Path(directory), stack
        self._make, self._writers = Writer, dict[int, Any]()
        try:
            self._writer(1)
        except OSError as exc:
            raise options.UsageError(f"--tensorboard {directory}: {exc.strerror or exc}") from exc

    def _writer(self, start: int) -> Any:
        if start not in self._writers:
            directory = self._directory / f"start-{start}" if start > 1 else self._directory
            directory.mkdir(parents=True, exist_ok=True)
            self._writers[start] = self._make(str(directory))
            self._stack.callback(self._writers[start].close)
        return self._writers[start]

    def write(self, current: Round) -> None:
        groups: dict[str, Mapping[str, object]] = {
            "server": {"loss": current.loss, **current.metrics},
            "clients": {"loss": current.client_loss, **current.client_metrics},
            "training": current.train_metrics,
            "round": {
                "seconds": current.seconds,
                "clients": len(current.clients),
                "failed": len(current.failures),
            },
        }
        writer = self._writer(current.start)
        for group, values in groups.items():
            for name, value in values.items():
                if isinstance(value, Real):
                    writer.add_scalar(f"{group}/{name}", float(value), current.server_round)
        writer.flush()
