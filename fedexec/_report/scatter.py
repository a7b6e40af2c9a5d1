"""Throughput against the memory that is left after a round: what a strategy gives, and what it keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedexec._report import numbers
from fedexec._report.columns import EMULATED
from fedexec._report.summary import Section
from fedexec._report.svg import WIDTH, Figure, Scale, figure, grid, mark, tag, text, ticks
from fedexec._report.table import Row

__all__ = ["scatter"]

LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 52, 14, 22, 262, 300
DOT, BESIDE = 6, 12  # half a dot, and from its middle to its name
CHARACTER, LINE = 7.0, 13  # of names, at most


def scatter(section: Section, class_of: Mapping[str, str]) -> Figure | None:
    """Draw each strategy where its memory was measured; None where it was of nobody.

    Parameters
    ----------
    section : Section
    class_of : mapping of str to str
        Classes of the strategies' colours.
    """
    is_device = any(row.device_residual is not None for row in section.table)
    key = "device_residual" if is_device else "host_residual"
    shown = [row for row in section.table if getattr(row, key) is not None and row.clients_per_second]
    if not shown:
        return None
    is_emulated = is_device and any(row.emulated for row in shown)
    where = f"device{f' {EMULATED}' if is_emulated else ''}" if is_device else "host (PSS)"
    x_ticks = ticks(max(getattr(row, key) for row in shown) * 1.02, 4, 1024)
    y_ticks = ticks(max(_rate(row) for row in shown) * 1.02)
    x = Scale(0, x_ticks[-1], LEFT + 8, WIDTH - RIGHT)
    y = Scale(0, y_ticks[-1], BOTTOM, TOP)
    parts = [
        grid(y_ticks, y, "{:g}".format, (LEFT, WIDTH - RIGHT)),
        text(LEFT, 12, "clients/s", "label"),
        *_below(x_ticks, x),
        text(WIDTH - RIGHT, BOTTOM + 32, "left after a round", "label", "end"),
        *_points(shown, key, x, y, class_of),
    ]
    words = "; ".join(_words(row, key) for row in shown)
    caption = "Top left is best: many clients a second, and nothing left. Hollow: not fedexec's."
    title = f"Throughput and what is left, {where}"
    return figure(title, f"{words}.", caption, HEIGHT, *parts)


def _below(values: Sequence[float], x: Scale) -> list[Markup]:
    """Write the values of the horizontal axis, the last one ending with it."""
    drawn = [
        text(x(value), BOTTOM + 16, numbers.round_size(value), "tick", "middle") for value in values[:-1]
    ]
    return [*drawn, text(WIDTH, BOTTOM + 16, numbers.round_size(values[-1]), "tick", "end")]


def _rate(row: Row) -> float:
    return row.clients_per_second or 0.0


def _words(row: Row, key: str) -> str:
    left = numbers.size(getattr(row, key))
    return f"{row.strategy}: {numbers.rate(row.clients_per_second)} clients/s, {left} left after a round"


def _points(shown: Sequence[Row], key: str, x: Scale, y: Scale, class_of: Mapping[str, str]) -> list[Markup]:
    places = [(x(getattr(row, key)), y(_rate(row))) for row in shown]
    labels = _labels([row.strategy for row in shown], places)
    return [
        _point(place, label, row, _words(row, key), class_of[row.strategy])
        for row, place, label in zip(shown, places, labels, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Box:
    """What a name or a dot takes; a name begins, or where it is to the left of its dot ends, at `anchor`."""

    left: float
    right: float
    top: float
    bottom: float
    anchor: str = "start"

    def meets(self, other: "_Box") -> bool:
        """Whether both have a place in common."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def _labels(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[_Box]:
    """Find a place for each name beside its dot, where it covers no other name and no dot."""
    dots = [_Box(px - DOT, px + DOT, py - DOT, py + DOT) for px, py in places]
    placed: list[_Box] = []
    for name, (px, py) in zip(names, places, strict=True):
        tried = [
            box
            for distance in range(0, BOTTOM - TOP, 7)
            for down in (distance, -distance)
            for box in _beside(name, px, py + down)
            if box.left >= LEFT and box.right <= WIDTH and box.top >= TOP - 12 and box.bottom <= BOTTOM
        ]
        free = (box for box in tried if not any(box.meets(other) for other in (*placed, *dots)))
        placed.append(next(free, tried[0]))
    return placed


def _beside(name: str, x: float, y: float) -> tuple[_Box, _Box]:
    width, top, bottom = CHARACTER * len(name), y - LINE / 2, y + LINE / 2
    return (
        _Box(x + BESIDE, x + BESIDE + width, top, bottom, "start"),
        _Box(x - BESIDE - width, x - BESIDE, top, bottom, "end"),
    )


def _point(place: tuple[float, float], label: _Box, row: Row, words: str, class_: str) -> Markup:
    x, y = place
    at, middle = (label.left if label.anchor == "start" else label.right), (label.top + label.bottom) / 2
    leader = Markup("")
    if abs(middle - y) > 3:
        towards = at - 2 if label.anchor == "start" else at + 2
        leader = tag("line", x1=x, y1=y, x2=towards, y2=middle, class_="leader")
    dot = tag("circle", cx=x, cy=y, r=5.5, class_="ring" if row.peer else "dot")
    name = text(at, middle + 4, row.strategy, "name", label.anchor)
    return mark(words, leader + dot + name, class_, hit=tag("circle", cx=x, cy=y, r=16, class_="hit"))
