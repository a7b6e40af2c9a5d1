"""The tutorial's picture: how much memory was held when, one panel for each strategy, all on one scale."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedexec._report import numbers
from fedexec._report.reading import Measurement
from fedexec._report.summary import Section
from fedexec._report.svg import WIDTH, Figure, Scale, comparable, figure, mark, tag, text, ticks

__all__ = ["timeline"]

LEFT, RIGHT = 52, 10
PANEL, GAP = 58, 36
MOST_POINTS = 240  # more than that is finer than the line is wide


def timeline(section: Section, class_of: Mapping[str, str]) -> Figure | None:
    """Draw the memory of every strategy that it was measured of."""
    found = [one for one in section.run.of("footprint", section.workload) if _timeline(one)]
    device = any(_device(one) for one in found)
    shown = [one for one in found if (_device(one) if device else _timeline(one)["host"])]
    shown = [one for one in shown if _series(one, device)["seconds"]]
    if not shown:
        return None
    order = {row.strategy: index for index, row in enumerate(section.table)}
    shown.sort(key=lambda one: order.get(one.record.strategy, len(order)))
    emulated = " EMULATED" if device and any(one.record.emulated for one in shown) else ""
    where = f"{'device' if device else 'host (PSS)'}{emulated}"
    most = max(max(_series(one, device)["bytes"]) for one in shown)
    values = ticks(most, 2, 1024)
    last = comparable([_series(one, device)["seconds"][-1] for one in shown])
    x = Scale(0, last, LEFT, WIDTH - RIGHT)
    parts = []
    for index, one in enumerate(shown):
        top = 22 + index * (PANEL + GAP)
        y = Scale(0, max(values[-1], most), top + PANEL, top)
        parts.append(_panel(one, device, x, y, values, emulated, class_of[one.record.strategy]))
    bottom = 22 + len(shown) * (PANEL + GAP) - GAP
    for value in ticks(last, 5):
        if value <= last:
            parts.append(text(x(value), bottom + 16, f"{value:g}", "tick", "middle"))
    parts.append(text(WIDTH - RIGHT, bottom + 32, "seconds", "label", "end"))
    words = "; ".join(
        f"{one.record.strategy} peak {numbers.size(max(_series(one, device)['bytes']))}" for one in shown
    )
    caption = f"{where[0].upper()}{where[1:]} memory. Hollow dots: after each round, and at the end."
    return figure("Memory over time", f"Memory held, {where}: {words}.", caption, bottom + 40, *parts)


def _panel(
    one: Measurement, device: bool, x: Scale, y: Scale, values: Sequence[float], emulated: str, class_: str
) -> str:
    series = _series(one, device)
    seconds, held = _thin(series["seconds"], series["bytes"])
    peak = max(held)
    at = seconds[held.index(peak)]
    until, kept = seconds[-1], sum(second <= x.high for second in seconds)
    seconds, held = seconds[:kept], held[:kept]
    points = [(x(at), y(nbytes)) for at, nbytes in zip(seconds, held, strict=True)]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    area = f"{points[0][0]:.1f},{y(0):.1f} {path} {points[-1][0]:.1f},{y(0):.1f}"
    drawn = [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(0), y2=y(0), class_="axis")]
    for value in values[1:]:
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), class_="grid"))
    drawn.append(
        text(LEFT - 6, y(values[-1]) + 4, numbers.size(round(values[-1])).replace(".0 ", " "), "tick", "end")
    )
    drawn.append(text(LEFT - 6, y(0) + 4, "0", "tick", "end"))
    drawn.append(tag("polygon", points=area, class_="area"))
    drawn.append(tag("polyline", points=path, class_="line"))
    if until > x.high:
        drawn.append(text(WIDTH - RIGHT - 4, y(0) - 6, f"… until {until:.0f} s", "tick", "end"))
    name = f"{one.record.strategy}: peak {numbers.size(peak)}{emulated}"
    drawn.append(text(LEFT, y.end - 8, name, "name"))
    if at <= x.high:
        drawn.append(_dot(f"{name}, at {at:.1f} s", x(at), y(peak), "dot"))
    for found in _marks(one, device):
        if found["seconds"] > x.high:
            continue
        what = "at the end" if found["label"] == "shutdown" else f"after round {found['round']}"
        words = f"{one.record.strategy}, {what}: {numbers.size(found['bytes'])}{emulated}"
        drawn.append(_dot(words, x(found["seconds"]), y(found["bytes"]), "ring"))
    return tag("g", "".join(drawn), class_=class_)


def _dot(words: str, x: float, y: float, class_: str) -> str:
    shape = tag("circle", cx=x, cy=y, r=3, class_=class_)
    return mark(words, shape, hit=tag("circle", cx=x, cy=y, r=11, class_="hit"))


def _timeline(one: Measurement) -> dict[str, Any]:
    return dict((one.record.memory or {}).get("timeline") or {})


def _device(one: Measurement) -> str | None:
    """Return the first device that something was measured of."""
    devices = _timeline(one).get("devices") or {}
    return next((uuid for uuid, series in devices.items() if series["bytes"]), None)


def _series(one: Measurement, device: bool) -> dict[str, Any]:
    found = _timeline(one)
    chosen: dict[str, Any] = found["devices"][_device(one)] if device else found["host"]
    return chosen


def _marks(one: Measurement, device: bool) -> list[dict[str, Any]]:
    found = []
    for each in _timeline(one).get("marks") or ():
        held = each["device_bytes"].get(_device(one)) if device else each["host_bytes"]
        if held is not None:
            label, number = each["label"], each["server_round"]
            found.append({"label": label, "round": number, "seconds": each["seconds"], "bytes": held})
    return found


def _thin(seconds: Sequence[float], held: Sequence[int]) -> tuple[list[float], list[int]]:
    """Keep the largest of neighbours, so that no peak is lost."""
    step = -(-len(seconds) // MOST_POINTS)
    return (
        [seconds[min(index + step - 1, len(seconds) - 1)] for index in range(0, len(seconds), step)],
        [max(held[index : index + step]) for index in range(0, len(held), step)],
    )
