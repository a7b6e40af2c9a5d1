"""The picture of the rooms: ``python docs/generators/rooms.py`` writes ``docs/images/rooms.svg``."""

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["ROOMS", "picture"]

PICTURE = Path(__file__).parents[1] / "images" / "rooms.svg"
WIDTH = 880
GREEN, BLUE, SAND, GREY = "#e0f2f1", "#e3ecfa", "#fbf0dd", "#f1f1f1"


@dataclass(frozen=True)
class Box:
    """One room.

    Attributes
    ----------
    room : str
        Its path in the package; several are separated by spaces.
    left, top, width, height : int
    says : tuple of str
        Lines below its name.
    """

    room: str
    left: int
    top: int
    width: int
    height: int
    colour: str
    says: tuple[str, ...] = ()


ROOMS = (
    Box("_cli _workload", 20, 60, 205, 84, SAND, ("the commands, and the job", "that fedexec run trains")),
    Box(
        "flower", 240, 60, 415, 84, SAND,
        ("offload · simulation · grpc", "a ServerApp's messages: simulation/grid.py, client_app.py"),
    ),
    Box("_bench _report", 670, 60, 190, 84, SAND, ("what is measured, and", "how it is judged")),
    Box("executor.py create.py", 20, 184, 250, 66, GREEN, ("a concurrent.futures.Executor",)),
    Box("cluster", 285, 184, 140, 66, GREEN, ("one on each node",)),
    Box("settings.py", 440, 184, 200, 66, GREEN, ("a flag is defined",)),
    Box("_registry.py", 660, 184, 200, 66, GREEN, ("names of backends",)),
    Box(
        "_scheduling", 20, 290, 840, 66, GREEN,
        ("queue, admission · a task waits: scheduler.py · a limit is enforced: limit_enforcer.py",),
    ),
    Box(
        "backend.py interface.py usage.py", 20, 396, 840, 66, GREEN,
        ("what a backend needs; fedexec_backends has standby, process, pool, loky, inline, ray, dask",),
    ),
    Box("_channel", 20, 502, 410, 66, GREEN, ("pickles, segments · a task is sent: task_channel.py",)),
    Box("_processes", 450, 502, 410, 66, GREEN, ("templates, ends · a worker is forked: forker.py",)),
    Box("_worker", 20, 640, 840, 66, BLUE, ("is set up, runs the task, measures what it takes",)),
    Box("memory devices", 20, 752, 270, 66, GREY, ("who holds how much", )),
    Box("errors.py _system", 305, 752, 270, 66, GREY, ("sizes, files, cores, ownership",)),
    Box("testing", 590, 752, 270, 66, GREY, ("suites that a backend inherits",)),
)  # fmt: skip
ARROWS = (
    *((120, 144, 184), (250, 144, 184), (250, 250, 290), (250, 356, 396)),
    *((225, 462, 502), (655, 462, 502), (225, 568, 640), (655, 568, 640)),
)  # from there down to there
NOTES = (
    (20, 46, "who calls"),
    (20, 616, "in another process"),
    (20, 742, "beside them"),
)


def picture() -> str:
    """Return the picture as SVG."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 838" role="img" '
            'font-family="system-ui, sans-serif" font-size="14" fill="#222">',
            "<title>The rooms of fedexec, each above those that it knows</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path d="M0 0L8 4L0 8Z" fill="#555"/></marker></defs>',
            f'<rect width="{WIDTH}" height="838" fill="#fff"/>',
            '<text x="20" y="24" font-size="17" font-weight="600">The rooms of fedexec</text>',
            '<path d="M20 596H860" stroke="#888" stroke-dasharray="6 5"/>',
            *(
                f'<text x="{x}" y="{y}" fill="#666" font-size="13">{escape(text)}</text>'
                for x, y, text in NOTES
            ),
            *(
                f'<path d="M{x} {top}V{bottom - 1}" stroke="#555" fill="none" marker-end="url(#tip)"/>'
                for x, top, bottom in ARROWS
            ),
            *map(_box, ROOMS),
            "</svg>",
            "",
        ]
    )


def _box(box: Box) -> str:
    name = " · ".join(box.room.split())
    lines = [
        f'<text x="{box.left + 14}" y="{box.top + 48 + 20 * number}" font-size="13" fill="#444">'
        f"{escape(line)}</text>"
        for number, line in enumerate(box.says)
    ]
    return "\n".join(
        [
            f'<rect x="{box.left}" y="{box.top}" width="{box.width}" height="{box.height}" rx="6" '
            f'fill="{box.colour}" stroke="#9aa"/>',
            f'<text x="{box.left + 14}" y="{box.top + 26}" font-weight="600" '
            f'font-family="ui-monospace, monospace">{escape(name)}</text>',
            *lines,
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
