"""The plots of one run and workload. Those for which nothing was measured are left out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fedexec._report import numbers
from fedexec._report.reading import Measurement
from fedexec._report.scatter import scatter
from fedexec._report.schema import PHASES
from fedexec._report.summary import Section
from fedexec._report.svg import (
    WIDTH,
    Figure,
    Scale,
    colours,
    comparable,
    figure,
    grid,
    mark,
    spread,
    tag,
    text,
    ticks,
)
from fedexec._report.timeline import timeline

__all__ = ["plots"]

LEFT, RIGHT = 52, 10
NAMES = 112  # what names of strategies take beside bars
ROW = 30


def plots(section: Section) -> list[Figure]:
    """Draw what was measured.

    Parameters
    ----------
    section : Section

    Returns
    -------
    list of Figure
        The memory first, if it was measured.
    """
    names = {one.record.strategy for one in section.run.measurements}
    class_of = colours(names)
    drawn = [
        timeline(section, class_of),
        scatter(section, class_of),
        _phases(section, class_of),
        _rounds(section, class_of),
        _scaling(section, class_of, "workers"),
        _scaling(section, class_of, "clients"),
    ]
    return [one for one in drawn if one is not None]


def _phases(section: Section, class_of: Mapping[str, str]) -> Figure | None:
    shown = [one for one in section.run.of("round", section.workload) if one.record.phases]
    if not shown:
        return None
    shown.sort(key=lambda one: sum((one.record.phases or {}).values()))
    most = comparable([sum((one.record.phases or {}).values()) for one in shown])
    x = Scale(0, most, NAMES, WIDTH - 68)
    parts = [_legend()]
    for index, one in enumerate(shown):
        phases = one.record.phases or {}
        y, at = 30 + index * ROW, 0.0
        parts.append(_name(one.record.strategy, one.record.peer, y + 14, class_of))
        for phase in PHASES:
            seconds = phases.get(phase, 0.0)
            if seconds > 0 and at < most:
                words = f"{one.record.strategy}, {phase}: {numbers.seconds(seconds)}"
                left = x(min(at, most))
                parts.append(_segment(words, phase, left, y, x(min(at + seconds, most)) - left))
            at += seconds
        beside = at - phases.get("compute", 0.0)
        cut = " →" if at > most else ""
        parts.append(text(x(min(at, most)) + 6, y + 14, f"{numbers.seconds(beside)}{cut}", "tick"))
    words = "; ".join(
        f"{one.record.strategy} {numbers.seconds(sum((one.record.phases or {}).values()))}" for one in shown
    )
    caption = "One client alone, medians. The number: seconds beside computing. An arrow: the bar is cut."
    height = 36 + ROW * len(shown)
    return figure("Where a client's time goes", f"Seconds of one client: {words}.", caption, height, *parts)


def _segment(words: str, phase: str, left: float, y: float, width: float) -> Markup:
    bar = tag("rect", x=left, y=y, width=max(width, 0.6), height=20, class_=f"phase {phase}")
    return mark(words, bar, hit=tag("rect", x=left - 3, y=y - 4, width=width + 6, height=28, class_="hit"))


def _legend() -> Markup:
    drawn, at = [], 0.0
    for phase in PHASES:
        drawn.append(tag("rect", x=at, y=4, width=11, height=11, class_=f"phase {phase}"))
        drawn.append(text(at + 15, 14, phase, "tick"))
        at += 22 + 7.6 * len(phase)
    return Markup("").join(drawn)


def _name(strategy: str, peer: bool, y: float, class_of: Mapping[str, str]) -> Markup:
    dot = tag("circle", cx=NAMES - 10, cy=y - 4, r=4, class_="ring" if peer else "dot")
    return tag("g", text(NAMES - 20, y, strategy, "name", "end"), dot, class_=class_of[strategy])


def _rounds(section: Section, class_of: Mapping[str, str]) -> Figure | None:
    shown = [one for one in section.run.of("round", section.workload) if one.seconds]
    if not shown:
        return None
    shown.sort(key=lambda one: one.median)
    low, high = min(min(one.seconds) for one in shown), max(max(one.seconds) for one in shown)
    log = high > 8 * low
    bottom = 12 + ROW * len(shown)
    if log:
        values = [step * 10.0**power for power in range(-6, 5) for step in (1, 2, 5)]
        values = [value for value in values if low * 0.6 <= value <= high * 1.7][
            :: 2 if high > 100 * low else 1
        ]
        x = Scale(min(low, values[0]), max(high, values[-1]), NAMES + 6, WIDTH - 14, log=True)
    else:
        values = ticks(high * 1.02, 4)
        x = Scale(0, values[-1], NAMES + 6, WIDTH - 14)
    parts = []
    for value in values:
        parts.append(tag("line", x1=x(value), x2=x(value), y1=6, y2=bottom, class_="grid"))
        parts.append(text(x(value), bottom + 16, _duration(value), "tick", "middle"))
    for index, one in enumerate(shown):
        parts.append(_strip(one, 6 + (index + 0.5) * ROW, x, class_of))
    words = "; ".join(f"{one.record.strategy} median {numbers.seconds(one.median)}" for one in shown)
    caption = "Every round is a dot, the bar is the median." + (" Logarithmic." if log else "")
    return figure("Seconds of a round", f"{words}.", caption, bottom + 24, *parts)


def _duration(value: float) -> str:
    return "0" if value == 0 else f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _strip(one: Measurement, y: float, x: Scale, class_of: Mapping[str, str]) -> Markup:
    strategy = one.record.strategy
    dots = []
    for index, seconds in enumerate(one.seconds):
        at = y + (index % 5 - 2) * 2.4  # so that equal rounds do not hide each other
        dots.append(tag("circle", cx=x(seconds), cy=at, r=3.2, class_="faint"))
    median = tag("line", x1=x(one.median), x2=x(one.median), y1=y - 10, y2=y + 10, class_="median")
    words = (
        f"{strategy}: median {numbers.seconds(one.median)}, "
        f"95 % within {numbers.seconds(one.p95)}, "
        f"{numbers.count(len(one.seconds), 'round')}"
    )
    low, high = x(min(one.seconds)), x(max(one.seconds))
    hit = tag("rect", x=low - 12, y=y - 12, width=high - low + 24, height=24, class_="hit")
    return _name(strategy, one.record.peer, y + 4, class_of) + mark(
        words, Markup("").join((*dots, median)), class_of[strategy], hit=hit
    )


def _scaling(section: Section, class_of: Mapping[str, str], by: str) -> Figure | None:
    series = _series(section.run.of("scaling", section.workload), by)
    if not series:
        return None
    height, bottom, right = 270, 226, WIDTH - 108
    y_ticks = ticks(max(_rate(one) for line in series.values() for one in line) * 1.02)
    y = Scale(0, y_ticks[-1], bottom, 22)
    stops = sorted({getattr(one.record, by) for line in series.values() for one in line})
    x = Scale(0, max(1, len(stops) - 1), LEFT + 10, right)
    unit = f"{by} {'at once' if by == 'workers' else 'a round'}"
    parts = [
        grid(y_ticks, y, "{:g}".format, (LEFT, right + 6)),
        text(LEFT, 12, "clients/s", "label"),
        *(text(x(index), bottom + 16, f"{stop:,}", "tick", "middle") for index, stop in enumerate(stops)),
        text(right + 6, bottom + 32, unit, "label", "end"),
    ]
    ends = spread([y(_rate(line[-1])) for line in series.values()], 14, 22, bottom)
    for (strategy, line), end in zip(series.items(), ends, strict=True):
        places = [(x(stops.index(getattr(one.record, by))), y(_rate(one))) for one in line]
        name = text(right + 12, end + 4, strategy, "name")
        parts += _line(line, places, by, name, class_of[strategy])
    title = "More workers" if by == "workers" else "More clients"
    record = next(iter(series.values()))[0].record
    fixed = f"{record.clients} clients a round" if by == "workers" else f"{record.workers} workers at once"
    return figure(title, f"{title}: clients per second, by strategy.", f"With {fixed}.", height, *parts)


def _rate(one: Measurement) -> float:
    """Return the clients per second."""
    return one.record.clients / one.median


def _line(
    line: Sequence[Measurement], places: Sequence[tuple[float, float]], by: str, name: Markup, class_: str
) -> list[Markup]:
    """Draw what one strategy does with more and more; each point tells its numbers."""
    record = line[0].record
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    curve = tag("polyline", points=path, class_="line peer" if record.peer else "line")
    drawn = [tag("g", curve, name, class_=class_)]
    for one, (px, py) in zip(line, places, strict=True):
        many = numbers.count(getattr(one.record, by), by[:-1])
        words = f"{record.strategy}, {many}: {numbers.rate(_rate(one))} clients/s"
        dot = tag("circle", cx=px, cy=py, r=4, class_="ring" if record.peer else "dot")
        drawn.append(mark(words, dot, class_, hit=tag("circle", cx=px, cy=py, r=14, class_="hit")))
    return drawn


def _series(found: Iterable[Measurement], by: str) -> dict[str, list[Measurement]]:
    """Return those that differ in that quantity, by strategy; each of two points and more."""
    series: dict[str, dict[Any, Measurement]] = {}
    for one in found:
        if one.record.variant == by:
            series.setdefault(one.record.strategy, {})[getattr(one.record, by)] = one
    return {
        name: [line[key] for key in sorted(line)] for name, line in sorted(series.items()) if len(line) > 1
    }
