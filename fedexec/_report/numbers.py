"""Figures as people read them. What was not measured says so."""

from fedexec._system.sizes import format_size

__all__ = ["NOT_MEASURED", "about", "count", "percent", "rate", "round_size", "seconds", "size"]

NOT_MEASURED = "not measured"
size = format_size


def round_size(nbytes: float) -> str:
    """Write a round number of bytes, as on an axis."""
    return "0" if nbytes == 0 else size(round(nbytes)).replace(".0 ", " ")


def _digits(value: float) -> str:
    """Write three significant digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds(value: float | None) -> str:
    """Write a duration."""
    if value is None:
        return NOT_MEASURED
    if value >= 0.9995:
        return f"{_digits(value)} s"
    return f"{_digits(value * 1e3)} ms" if value >= 1e-3 else f"{_digits(value * 1e6)} µs"


def about(value: float) -> str:
    """Write an estimate of a duration: two significant digits."""
    unit, scale = ("s", 1.0) if value >= 0.0995 else ("ms", 1e3)
    value *= scale
    text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"
    return f"{text} {unit}"


def rate(value: float | None) -> str:
    """Write how many a second."""
    return NOT_MEASURED if value is None else _digits(value)


def percent(share: float | None, *, signed: bool = False) -> str:
    """Write a share of 1 as percent."""
    if share is None:
        return NOT_MEASURED
    value = 100 * share
    digits = 0 if abs(value) >= 9.95 else 1
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return f"{text.removesuffix('.0')} %".replace("-0 %", "0 %").replace("+0 %", "0 %")


def count(number: int, noun: str, plural: str = "") -> str:
    """Write a number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or f'{noun}s'}"
