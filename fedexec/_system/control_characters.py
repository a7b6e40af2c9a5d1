"""Makes text of other people harmless for a terminal: control characters are shown and have no effect."""

import logging
import re

__all__ = ["show_in_log", "visible"]

# Control characters, including escape and CSI; lone surrogates; characters that change the text's direction.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object, *, lines: bool = False) -> str:
    r"""Return text that has no control characters; an escape character is written as ``\x1b``.

    Parameters
    ----------
    text : object
        Text, or an object whose text is taken.
    lines : bool
        Whether to keep line breaks and tabs.

    Returns
    -------
    str
    """
    kept = "\n\t" if lines else ""
    return _CONTROLS.sub(lambda match: match[0] if match[0] in kept else ascii(match[0])[1:-1], str(text))


def show_in_log(record: logging.LogRecord) -> bool:
    """Make the message of a log record visible text; a logging filter that keeps all records.

    Parameters
    ----------
    record : logging.LogRecord

    Returns
    -------
    bool
        Always True.
    """
    try:
        message = record.getMessage()
    except Exception:  # The arguments do not fit the message; the handler of the record says so.
        return True
    record.msg, record.args = visible(message, lines=True), ()
    return True
