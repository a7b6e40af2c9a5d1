"""Finds environment variables that look like settings but are none, and the names that may be meant."""

import functools
import logging
from collections.abc import Mapping, Sequence

from fedexec._system.control_characters import visible

__all__ = ["find", "warn_of"]

log = logging.getLogger("fedexec")


def find(environ: Mapping[str, str], prefix: str, known: Sequence[str]) -> dict[str, str]:
    """Find the variables that begin with a prefix but are not known.

    Parameters
    ----------
    environ : mapping of str to str
    prefix : str
    known : sequence of str
        Names of the variables that there are, without the prefix.

    Returns
    -------
    dict of str to str
        Advice by name of the variable.
    """
    unknown = {}
    for variable in environ:
        name = variable.removeprefix(prefix)
        if name not in (variable, *known):
            import difflib

            matches = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {prefix}{matches[0]}?" if matches else "known: {}"
            unknown[variable] = advice.format(", ".join(prefix + each for each in known))
    return unknown


@functools.cache
def warn_of(variable: str, advice: str) -> None:
    """Warn of a variable, once in this process.

    Parameters
    ----------
    variable : str
    advice : str
    """
    log.warning("%s is set, but fedexec has no such setting; %s", visible(variable), advice)
