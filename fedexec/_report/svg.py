"""What the plots are drawn with: tags, scales, axes, and marks that tell their numbers.

Text is escaped where it is put into a tag, as in the page's templates: only what :func:`tag` made is markup.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

__all__ = [
    "WIDTH",
    "Figure",
    "Scale",
    "colours",
    "comparable",
    "figure",
    "grid",
    "mark",
    "plot",
    "spread",
    "tag",
    "text",
    "ticks",
]

WIDTH = 340  # of every plot, in its own units: as wide as a phone, so that text stays text there
COLOURS = 15  # in page.css
SAME_SCALE = 6  # one that takes ten times as long would leave the others no room
_FIXED = (
    "standby", "process", "pool", "loky", "inline", "tutorial", "ppe-spawn", "ppe-forkserver", "plain-loky",
    "ray-fresh", "ray-warm", "deadpool", "flower-ray",
)  # fmt: skip


def colours(names: Iterable[str]) -> dict[str, str]:
    """Give each strategy the class of its colour: the same in every plot and every report."""
    known = {name: index for index, name in enumerate(_FIXED)}
    others = sorted(set(names) - known.keys())
    known |= {name: len(_FIXED) + index % (COLOURS - len(_FIXED)) for index, name in enumerate(others)}
    return {name: f"c{index}" for name, index in known.items()}


def tag(name: str, *content: str, **attributes: object) -> Markup:
    """Write an element.

    Parameters
    ----------
    name : str
    *content : str
        Text is escaped, and markup is not.
    **attributes : object
        Underscores are written as hyphens, a trailing one not at all.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value))
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(content))


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> Markup:
    """Write words at a place."""
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def mark(words: str, shape: str, class_: str = "", *, hit: str = "") -> Markup:
    """Make a shape that tells its numbers when it is pointed at, tapped or reached by keyboard.

    Parameters
    ----------
    words : str
        What it tells.
    shape : str
        What is seen.
    class_ : str
        That of the strategy's colour.
    hit : str
        An invisible shape that makes it easier to meet.
    """
    return tag(
        "g", tag("title", words), hit, shape,
        class_=f"mark {class_}", role="img", aria_label=words, tabindex="-1",
    )  # fmt: skip


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to places; where `log`, evenly by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.0
        return self.start + share * (self.end - self.start)


def ticks(high: float, most: int = 5, base: float = 10) -> list[float]:
    """Return round values from 0 to at least `high`; with base 1024, powers of two."""
    if high <= 0:
        return [0.0, 1.0]
    if base == 1024:
        steps = [2.0**power for power in range(48)]
    else:
        power = 10.0 ** math.floor(math.log10(high / most))
        steps = [power * step for step in (1, 2, 2.5, 5, 10, 20)]
    step = next((step for step in steps if high / step <= most), steps[-1])
    return [step * index for index in range(math.ceil(high / step - 1e-9) + 1)]


def comparable(values: Sequence[float]) -> float:
    """Return the largest that fits on one scale with the smallest; what is larger is to be cut off."""
    return max(value for value in values if value <= SAME_SCALE * min(values))


def grid(
    values: Iterable[float], scale: Scale, name: Callable[[float], str], across: tuple[float, float]
) -> Markup:
    """Draw the lines of a vertical axis and write their values; `across` is from where to where."""
    left, right = across
    drawn = []
    for value in values:
        y = scale(value)
        drawn.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="axis" if value == 0 else "grid"))
        drawn.append(text(left - 6, y + 4, name(value), "tick", "end"))
    return Markup("").join(drawn)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart until none covers another; they keep their order."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [places[index] for index in order]
    for index, _ in enumerate(moved):
        floor = low if index == 0 else moved[index - 1] + gap
        moved[index] = max(moved[index], floor)
    for index in reversed(range(len(moved))):
        ceiling = high if index == len(moved) - 1 else moved[index + 1] - gap
        moved[index] = min(moved[index], ceiling)
    result = [0.0] * len(places)
    for index, place in zip(order, moved, strict=True):
        result[index] = place
    return result


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot or several, with their words.

    Attributes
    ----------
    plots : list of Markup
        What is shown at once.
    others : list of Markup
        What is shown on demand.
    is_wide : bool
        Whether it takes the width of the page, and comes first.
    """

    title: str
    caption: str
    plots: list[Markup]
    others: list[Markup] = field(default_factory=list)
    is_wide: bool = False


def plot(title: str, describes: str, height: float, *content: str) -> Markup:
    """Put a plot together.

    Parameters
    ----------
    title, describes : str
        For those who cannot see it.
    height : float
        In its own units, of which it is WIDTH wide.
    *content : str
        Markup.
    """
    number = zlib.crc32("".join((title, describes, *content)).encode())  # the same page each time
    return tag(
        "svg", tag("title", title, id=f"t{number}"), tag("desc", describes, id=f"d{number}"), *content,
        viewBox=f"0 0 {WIDTH} {height:.0f}", role="group",
        aria_labelledby=f"t{number}", aria_describedby=f"d{number}",
    )  # fmt: skip


def figure(title: str, describes: str, caption: str, height: float, *content: str) -> Figure:
    """Make a figure of one plot; see :func:`plot`."""
    return Figure(title, caption, [plot(title, describes, height, *content)])
