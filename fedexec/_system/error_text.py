"""An exception in one line, as logs, records of tasks and the command line show it."""

__all__ = ["message_of", "one_line"]


def one_line(error: BaseException) -> str:
    """Return an exception's class and message in one line: ``"ValueError: no such file"``."""
    message = message_of(error)
    name = type(error).__name__
    return f"{name}: {message}" if message else name


def message_of(error: BaseException) -> str:
    """Return an exception's message in one line, without its class."""
    return " ".join(str(error).split())
