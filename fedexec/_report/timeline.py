"""The tutorial's picture: how much memory was held when, one panel for each strategy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fedexec._report import numbers
from fedexec._report.columns import EMULATED
from fedexec._report.reading import Measurement
from fedexec._report.summary import Section
from fedexec._report.svg import WIDTH, Figure, Scale, comparable, mark, plot, tag, text, ticks

__all__ = ["timeline"]

LEFT, RIGHT = 52, 10
TOP, BOTTOM, HEIGHT = 30, 122, 156  # of the plot in a panel, and of the panel
MOST_POINTS = 240  # more than that is finer than the line is wide


@dataclass(frozen=True, slots=True)
class _Held:
    """What one strategy held of a memory.

    Attributes
    ----------
    seconds, nbytes : sequence of float, of int
        One after the other.
    marks : list of tuple of (str, float, int)
        When it is, in words, and its second and bytes.
    left : int or None
        The most bytes after a round.
    """

    strategy: str
    peer: bool
    seconds: Sequence[float]
    nbytes: Sequence[int]
    marks: list[tuple[str, float, int]]
    left: int | None

    @property
    def words(self) -> str:
        """The figures of the picture."""
        left = "" if self.left is None else f", left {numbers.size(self.left)}"
        return f"peak {numbers.size(max(self.nbytes))}{left}"


def timeline(section: Section, class_of: Mapping[str, str]) -> Figure | None:
    """Draw the memory of every strategy of which it was measured.

    Parameters
    ----------
    section : Section
    class_of : mapping of str to str
        Classes of the strategies' colours.

    Returns
    -------
    Figure or None
        fedexec's own backends at once and the peers on demand, in the order of the table.
    """
    found = [one for one in section.run.of("footprint", section.workload) if _timeline(one)]
    is_device = any(_device(one) for one in found)
    held = [each for each in (_held(one, is_device) for one in found) if each is not None]
    if not held:
        return None
    order = {row.strategy: index for index, row in enumerate(section.table)}
    held.sort(key=lambda each: order.get(each.strategy, len(order)))
    is_emulated = is_device and any(one.record.emulated for one in found)
    where = (
        f"device{f' {EMULATED}' if is_emulated else ''}" if is_device else "host (PSS of caller and workers)"
    )
    own, peers = [each for each in held if not each.peer], [each for each in held if each.peer]
    shown, hidden = (own, peers) if own else (peers, [])
    panels, others = (_panels(group, where, class_of) for group in (shown, hidden))
    caption = (
        "A dot marks the peak, rings mark what is left after each round and at the end. Peak and left are "
        "the most that was seen; left is after a round."
    )
    return Figure(f"Memory over time, {where}", caption, panels, others, is_wide=True)


def _panels(held: Sequence[_Held], where: str, class_of: Mapping[str, str]) -> list[Markup]:
    """Draw panels that have one scale."""
    if not held:
        return []
    y_ticks = ticks(max(max(each.nbytes) for each in held), 2, 1024)
    last = comparable([each.seconds[-1] for each in held])
    x = Scale(0, last, LEFT, WIDTH - RIGHT)
    y = Scale(0, y_ticks[-1], BOTTOM, TOP)
    return [_panel(each, x, y, y_ticks, where, class_of[each.strategy]) for each in held]


def _panel(each: _Held, x: Scale, y: Scale, y_ticks: Sequence[float], where: str, class_: str) -> Markup:
    drawn = [
        *_axes(x, y, y_ticks),
        text(LEFT, 16, each.strategy, "name"),
        text(WIDTH - RIGHT, 16, each.words, "tick", "end"),
        *_curve(each, x, y),
        *(
            _dot(f"{each.strategy}, {when}: {numbers.size(nbytes)}", x(at), y(nbytes), shape)
            for shape, when, at, nbytes in _dots(each)
            if at <= x.high
        ),
    ]
    title = f"Memory of {each.strategy} over time"
    return plot(title, f"Memory held, {where}: {each.words}.", HEIGHT, tag("g", *drawn, class_=class_))


def _axes(x: Scale, y: Scale, y_ticks: Sequence[float]) -> list[Markup]:
    drawn = []
    for value in y_ticks:
        at, kind = y(value), "grid" if value else "axis"
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_=kind))
        if value in (0, y_ticks[-1]):
            drawn.append(text(LEFT - 6, at + 4, numbers.round_size(value), "tick", "end"))
    stops = [value for value in ticks(x.high, 5) if value <= x.high]
    for value in stops:
        unit = " s" if value == stops[-1] else ""
        drawn.append(text(x(value), BOTTOM + 17, f"{value:g}{unit}", "tick", "middle"))
    return drawn


def _curve(each: _Held, x: Scale, y: Scale) -> list[Markup]:
    """Draw what was held, cut off at the end of the scale."""
    seconds, nbytes = _thin(each.seconds, each.nbytes)
    kept = sum(second <= x.high for second in seconds)
    points = [(x(at), y(held)) for at, held in zip(seconds[:kept], nbytes[:kept], strict=True)]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    drawn = []
    if points:
        area = f"{points[0][0]:.1f},{y(0):.1f} {path} {points[-1][0]:.1f},{y(0):.1f}"
        drawn += [tag("polygon", points=area, class_="area"), tag("polyline", points=path, class_="line")]
    if seconds[-1] > x.high:
        until = f"… until {seconds[-1]:.0f} s"
        drawn.append(text(WIDTH - RIGHT - 4, y(0) - 6, until, "tick", "end"))
    return drawn


def _dots(each: _Held) -> list[tuple[str, str, float, int]]:
    """Return what is marked: shape, words, second, bytes."""
    seconds, nbytes = _thin(each.seconds, each.nbytes)
    peak = max(nbytes)
    at = seconds[nbytes.index(peak)]
    return [("dot", f"peak at {at:.1f} s", at, peak), *(("ring", *each_mark) for each_mark in each.marks)]


def _dot(words: str, x: float, y: float, class_: str) -> Markup:
    shape = tag("circle", cx=x, cy=y, r=3.2, class_=class_)
    return mark(words, shape, hit=tag("circle", cx=x, cy=y, r=11, class_="hit"))


def _held(one: Measurement, is_device: bool) -> _Held | None:
    """Return what a strategy held of its device, or of the host; None where that was not measured."""
    found, device = _timeline(one), _device(one)
    series = (found["devices"][device] if device else None) if is_device else found["host"]
    if not series or not series["seconds"]:
        return None
    marks = []
    for each in found.get("marks") or ():
        nbytes = each["device_bytes"].get(device) if is_device else each["host_bytes"]
        if nbytes is not None:
            at_end = each["label"] == "shutdown"
            when = "at the end" if at_end else f"after round {each['server_round']}"
            marks.append((when, each["seconds"], nbytes))
    left = max((nbytes for when, _, nbytes in marks if when != "at the end"), default=None)
    return _Held(one.record.strategy, one.record.peer, series["seconds"], series["bytes"], marks, left)


def _timeline(one: Measurement) -> dict[str, Any]:
    return dict((one.record.memory or {}).get("timeline") or {})


def _device(one: Measurement) -> str | None:
    """Return the first device of which something was measured."""
    devices = _timeline(one).get("devices") or {}
    return next((uuid for uuid, series in devices.items() if series["bytes"]), None)


def _thin(seconds: Sequence[float], held: Sequence[int]) -> tuple[list[float], list[int]]:
    """Keep the largest of neighbours, so that no peak is lost."""
    step = -(-len(seconds) // MOST_POINTS)
    return (
        [seconds[min(index + step - 1, len(seconds) - 1)] for index in range(0, len(seconds), step)],
        [max(held[index : index + step]) for index in range(0, len(held), step)],
    )
