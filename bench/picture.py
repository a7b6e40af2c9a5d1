"""The README's picture: device memory over three rounds, with fresh processes and with workers that stay.

``python bench/figures.py`` draws it from a file of `fedexec bench --full`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WORKLOAD = "cnn"
STRATEGIES = {
    "standby": ("standby: a fresh process for each client", "#00796b"),
    "flower-ray": ("Flower's simulation engine: processes that stay", "#c2571a"),
}
WIDTH, LEFT, RIGHT = 860, 92, 24
TOP, PANEL, GAP = 74, 120, 76
MIB = 1 << 20


def picture(file: Path) -> str | None:
    """Draw the picture.

    Parameters
    ----------
    file : Path
        A file that `fedexec bench` has written.

    Returns
    -------
    str or None
        SVG; None if the file lacks a timeline of one of the two strategies.
    """
    records = _records(file)
    if set(records) != set(STRATEGIES):
        return None
    timelines = {name: _Timeline(records[name]) for name in STRATEGIES}
    longest = max(timeline.seconds[-1] for timeline in timelines.values())
    highest = max(max(timeline.nbytes) for timeline in timelines.values())
    height = TOP + len(timelines) * (PANEL + GAP) - 10
    first = next(iter(records.values()))
    kind = "an EMULATED device" if first["emulated"] else "one device"
    title = "What is left on the device after each round"
    about = (
        f"{first['clients']} clients a round, {first['workers']} at once, training the tutorial's CNN "
        f"on {kind}" + (" whose contexts take 450 MiB" if first["emulated"] else "")
    )
    panels = [
        timelines[name].panel(TOP + index * (PANEL + GAP) + 18, text, colour, longest, highest)
        for index, (name, (text, colour)) in enumerate(STRATEGIES.items())
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
            f"<title>{escape(title)}: {escape(about)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            f'<text x="{LEFT}" y="26" font-size="17" font-weight="600">{escape(title)}</text>',
            f'<text x="{LEFT}" y="47" fill="#555">{escape(about)}</text>',
            *panels,
            "</svg>",
            "",
        ]
    )


def _records(file: Path) -> dict[str, Any]:
    """Return the record of each strategy that has a timeline."""
    content = json.loads(file.read_text(encoding="utf-8"))
    records = [benchmark["extra_info"]["fedexec"] for benchmark in content["benchmarks"]]
    return {
        record["strategy"]: record
        for record in records
        if (record["group"], record["workload"]) == ("footprint", WORKLOAD)
        and record["strategy"] in STRATEGIES
        and (record["memory"] or {}).get("timeline")
    }


class _Timeline:
    """The timeline of one strategy.

    Parameters
    ----------
    record : mapping
        A benchmark's record, as in :class:`fedexec._report.schema.Record`.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        timeline = record["memory"]["timeline"]
        ((self._uuid, series),) = timeline["devices"].items()
        self.seconds: Sequence[float] = series["seconds"]
        self.nbytes: Sequence[int] = series["bytes"]
        self._marks = [mark for mark in timeline["marks"] if mark["label"] == "round"]

    def panel(self, top: float, text: str, colour: str, longest: float, highest: int) -> str:
        """Draw the timeline: the memory as an area, and after each round a line with the memory's size.

        Parameters
        ----------
        top : float
            Upper edge, in SVG units.
        text : str
            Title.
        colour : str
        longest : float
            Seconds that fill the width.
        highest : int
            Bytes that fill the height.

        Returns
        -------
        str
            SVG elements.
        """
        across = (WIDTH - LEFT - RIGHT) / longest
        bottom = top + PANEL

        def x(seconds: float) -> str:
            return f"{LEFT + seconds * across:.1f}"

        def y(nbytes: float) -> str:
            return f"{bottom - nbytes / highest * (PANEL - 18):.1f}"

        steps = [f"M{x(self.seconds[0])},{bottom}"]
        before = None
        for seconds, nbytes in zip(self.seconds, self.nbytes, strict=True):
            if nbytes != before:
                steps += [f"H{x(seconds)}", f"V{y(nbytes)}"]
                before = nbytes
        steps += [f"H{x(self.seconds[-1])}", f"V{bottom}", "Z"]
        area = f'fill="{colour}" fill-opacity="0.28" stroke="{colour}"'
        axes = f"M{LEFT},{bottom}H{WIDTH - RIGHT}M{LEFT},{top + 8}V{bottom}"
        lines = [
            f'<text x="{LEFT}" y="{top - 4}" font-weight="600" fill="{colour}">{escape(text)}</text>',
            f'<path d="{"".join(steps)}" {area}/>',
            f'<path d="{axes}" stroke="#888" fill="none"/>',
            f'<text x="{LEFT - 8}" y="{y(highest)}" dy="4" text-anchor="end">{_size(highest)}</text>',
            f'<text x="{LEFT - 8}" y="{bottom}" dy="4" text-anchor="end">0</text>',
        ]
        for mark in self._marks:
            left, held = x(mark["seconds"]), mark["device_bytes"][self._uuid]
            when = f"after round {mark['server_round']}:"
            lines += [
                f'<path d="M{left},{top + 8}V{bottom + 6}" stroke="#222" stroke-dasharray="3 3"/>',
                f'<text x="{left}" y="{bottom + 20}" text-anchor="end">{when}</text>',
                f'<text x="{left}" y="{bottom + 37}" text-anchor="end"><tspan font-weight="600">'
                f"{_size(held)}</tspan></text>",
            ]
        return "\n".join(lines)


def _size(nbytes: int) -> str:
    return f"{nbytes / MIB:.0f} MiB" if nbytes else "0"
