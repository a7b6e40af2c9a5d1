"""What a ClientApp prints and logs, marked with its partition: the lines of many workers come mixed."""

import contextlib
import functools
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from fedexec.flower.flower_internals import is_file_of_flower

__all__ = ["log_less_of_flower", "marked"]

_LINE_END = re.compile(r"[\r\n]")


class _Marked:
    """A text stream that writes whole lines only, each with a mark and in one call; all else is the stream's.

    Parameters
    ----------
    stream : TextIO
    mark : str
    """

    def __init__(self, stream: TextIO, mark: str) -> None:
        self._stream, self._mark = stream, mark
        self._begun: dict[int, str] = {}  # thread -> its line that is not whole yet
        self._pid = os.getpid()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the lines of a text that are whole."""
        thread = threading.get_ident()
        begun = self._begun.pop(thread, "") + text
        end = max((match.end() for match in _LINE_END.finditer(begun)), default=0)
        if end < len(begun):
            self._begun[thread] = begun[end:]
        if not end:
            return len(text)
        whole = begun[:end]
        lines = re.split(r"(?<=[\r\n])", whole)
        self._stream.write("".join(f"{self._mark}{line}" if line.strip() else line for line in lines))
        self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Write out what is whole; in a process that the client has forked, all, because it may end now."""
        if os.getpid() != self._pid:
            self.close()
        self._stream.flush()

    def writelines(self, lines: Any) -> None:
        """Write lines."""
        for line in lines:
            self.write(line)

    def close(self) -> None:
        """Write what has begun, and do not close the stream."""
        for begun in [self._begun.pop(thread) for thread in tuple(self._begun)]:
            self.write(f"{begun}\n")


@contextlib.contextmanager
def marked(partition: int | None) -> Iterator[None]:
    """Mark the lines that Python code of this process writes to stdout and stderr, and what it logs there.

    Parameters
    ----------
    partition : int or None
        None: change nothing.

    Yields
    ------
    None
    """
    if partition is None:
        yield
        return
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    marks = {name: _Marked(stream, f"[partition {partition}] ") for name, stream in streams.items() if stream}
    handlers = [
        (handler, name) for handler in _stream_handlers() for name in marks if handler.stream is streams[name]
    ]
    for name, mark in marks.items():
        setattr(sys, name, mark)
    for handler, name in handlers:
        handler.setStream(marks[name])
    try:
        yield
    finally:
        for name, mark in marks.items():
            mark.close()
            if getattr(sys, name) is mark:
                setattr(sys, name, streams[name])
        for handler, name in handlers:
            handler.setStream(streams[name])


def log_less_of_flower(level: int = logging.WARNING) -> Callable[[], None]:
    """Leave out what Flower's own code logs below a level; apps use the same logger, and are shown.

    Parameters
    ----------
    level : int

    Returns
    -------
    callable
        Undoes it.
    """

    def is_shown(record: logging.LogRecord) -> bool:
        return record.levelno >= level or not is_file_of_flower(record.pathname)

    logger = logging.getLogger("flwr")
    logger.addFilter(is_shown)
    return functools.partial(logger.removeFilter, is_shown)


def _stream_handlers() -> Iterator["logging.StreamHandler[Any]"]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        if isinstance(logger, logging.Logger):
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler):
                    yield handler
