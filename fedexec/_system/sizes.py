"""Reads and writes numbers of bytes in the form that people use."""

import re

from fedexec.errors import SettingsError

__all__ = ["format_size", "parse_size"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Read a size in the form that people use.

    Parameters
    ----------
    text : str or int
        ``"512MiB"``, ``"1.5 GB"``, ``"800m"``, or a number of bytes. KiB, MiB, GiB and TiB are powers of
        1024. KB, MB, GB and TB, and a single letter, are powers of 1000.

    Returns
    -------
    int
        Bytes, greater than 0.

    Raises
    ------
    SettingsError
        The text is not a size.
    """
    match = _SIZE.fullmatch(str(text)) if not isinstance(text, bool) else None
    if match is None or (match[2] and match[2].lower() not in _UNITS):
        raise SettingsError(f"{text!r} is not a size. Write it like 512MiB, 1.5GB or a number of bytes")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise SettingsError(f"a size must be greater than 0, got {text!r}")
    return size


def format_size(size: int | None) -> str:
    """Write a size in the form that people use.

    Parameters
    ----------
    size : int or None
        Bytes; None if it was not measured.

    Returns
    -------
    str
        Such as ``"512 MiB"``, or ``"not measured"``.
    """
    if size is None:
        return "not measured"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
