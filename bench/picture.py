"""The picture of the README: device memory in three rounds, of fresh processes and of workers that stay.

It is drawn from a file of `fedexec bench --full`, by ``python bench/figures.py``.
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
    """Draw it; None if the file has no timelines of both strategies.

    Parameters
    ----------
    file : Path
        What `fedexec bench` has written.

    Returns
    -------
    str or None
        SVG.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    records = [one["extra_info"]["fedexec"] for one in content["benchmarks"]]
    found = {
        each["strategy"]: each
        for each in records
        if (each["group"], each["workload"]) == ("footprint", WORKLOAD)
        and each["strategy"] in STRATEGIES
        and (each["memory"] or {}).get("timeline")
    }
    if set(found) != set(STRATEGIES):
        return None
    shown = {name: _Shown(found[name]) for name in STRATEGIES}
    longest = max(each.seconds[-1] for each in shown.values())
    highest = max(max(each.nbytes) for each in shown.values())
    height = TOP + len(shown) * (PANEL + GAP) - 10
    first = next(iter(found.values()))
    kind = "an EMULATED device" if first["emulated"] else "one device"
    title = "What is left on the device after each round"
    about = (
        f"{first['clients']} clients a round, {first['workers']} at once, training the tutorial's CNN "
        f"on {kind}" + (" whose contexts take 450 MiB" if first["emulated"] else "")
    )
    panels = [
        shown[name].panel(TOP + index * (PANEL + GAP) + 18, text, colour, longest, highest)
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


class _Shown:
    """One strategy's timeline.

    Parameters
    ----------
    record : mapping
        A benchmark's, as :class:`fedexec._report.schema.Record` describes it.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        timeline = record["memory"]["timeline"]
        ((self._uuid, series),) = timeline["devices"].items()
        self.seconds: Sequence[float] = series["seconds"]
        self.nbytes: Sequence[int] = series["bytes"]
        self._marks = [mark for mark in timeline["marks"] if mark["label"] == "round"]

    def panel(self, top: float, text: str, colour: str, longest: float, highest: int) -> str:
        """Draw it: the memory as an area, and a line with its figure after each round."""
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
