"""Writes an exception in one line, as logs, records of tasks and the command line show it."""

__all__ = ["message_of", "one_line"]


def one_line(error: BaseException) -> str:
    """Return the class and the message of an exception in one line, as ``"ValueError: no such file"``.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    str
    """
    message = message_of(error)
    name = type(error).__name__
    return f"{name}: {message}" if message else name


def message_of(error: BaseException) -> str:
    """Return the message of an exception in one line, without the class.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    str
    """
    return " ".join(str(error).split())
