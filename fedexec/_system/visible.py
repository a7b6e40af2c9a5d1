"""Text of others, as errors, names and files have it: what would steer a terminal is shown, not obeyed."""

import logging
import re

__all__ = ["show_in_log", "visible"]

# Controls of both sets, with escape and CSI; halves of characters; what turns the direction of the text.
_STEERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object, *, lines: bool = False) -> str:
    r"""Return text that a terminal writes as it is; an escape reads ``\x1b``.

    Parameters
    ----------
    text : object
        Or what has one.
    lines : bool
        It may have several lines, and tabs.
    """
    kept = "\n\t" if lines else ""
    return _STEERS.sub(lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1], str(text))


def show_in_log(record: logging.LogRecord) -> bool:
    """Make a record's message visible; a filter of a logger, which lets everything through."""
    record.msg, record.args = visible(record.getMessage(), lines=True), ()
    return True
