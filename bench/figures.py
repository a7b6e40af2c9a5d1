"""Write the files that quote the committed results: ``python bench/figures.py [--check]``.

These are the pages next to the results, the documentation's page about the results, and the README's table
and picture. With ``--check``, nothing is written, and the exit code is 1 if a file is out of date.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import picture

from fedexec._report import page, summarize
from fedexec._report.columns import columns
from fedexec._report.markdown_report import OVERVIEW, machine_line, table
from fedexec._report.summary import Summary
from fedexec._report.table import Row

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS_PAGE = ROOT / "docs" / "explanation" / "results.md"
PICTURE = ROOT / "docs" / "images" / "memory.svg"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: python bench/figures.py -->", "<!-- /figures -->"

SHOWN = {  # strategies in the README's table -> their names there
    "standby": "`standby` (default)",
    "process": "`process`",
    "pool": "`pool`",
    "loky": "`loky`",
    "plain-loky": "loky by itself",
    "flower-ray": "Flower's engine (Ray)",
}
KEYS = ("isolation", "device_residual", "contained", "clients_per_second", "warm")
SOURCE = "https://github.com/fedexec/fedexec/blob/main"


def main() -> None:
    """Write the files that are out of date, or name them."""
    stale = [path for path, text in _up_to_date().items() if not path.exists() or path.read_text() != text]
    if sys.argv[1:] == ["--check"]:
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"{names}: out of date with bench/results. Run: python bench/figures.py")
        return
    for path in stale:
        path.write_text(_up_to_date()[path])


def _up_to_date() -> dict[Path, str]:
    texts, blocks = {}, []
    rows: list[str] = []
    for file in sorted(RESULTS.glob("*.json")):
        summary = summarize([file])
        html = file.with_suffix(".html")
        texts[html] = page(summary)
        link = html.relative_to(ROOT).as_posix()
        blocks += [f"## {file.stem}", *_answers(summary)]
        blocks.append(f"{machine_line(summary.runs[0])} Everything: [{link}]({SOURCE}/{link}).")
        first = summary.sections[0]
        rows = rows or [_rows(summary), f"{first.verdict.text} {machine_line(summary.runs[0])}"]
        svg = picture.picture(file)
        if svg is not None:
            texts.setdefault(PICTURE, svg)
    texts[RESULTS_PAGE] = _filled(RESULTS_PAGE, blocks)
    texts[README] = _filled(README, rows)
    return texts


def _filled(path: Path, blocks: list[str]) -> str:
    """Return the text of a file with `blocks` between its two marker comments."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    text = "\n\n".join(blocks)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _answers(summary: Summary) -> list[str]:
    """Return the recommendation for each workload, and the table of the first workload."""
    answers = [f"- **{each.workload}** ({each.conditions}). {each.verdict.text}" for each in summary.sections]
    first = summary.sections[0]
    names = {row.strategy: row.strategy for row in first.table}
    return ["\n".join(answers), f"The table for {first.workload}:", _table(first.table, names, OVERVIEW[1:])]


def _rows(summary: Summary) -> str:
    """Return the README's table: a few strategies, and the columns that matter most."""
    return _table(summary.sections[0].table, SHOWN, KEYS)


def _table(rows: Sequence[Row], names: Mapping[str, str], keys: Sequence[str]) -> str:
    """Write the columns `keys` of the strategies `names`, in the order of both."""
    shown = sorted(
        (each for each in columns(rows) if each.key in keys), key=lambda each: keys.index(each.key)
    )
    rows_by_name = {row.strategy: row for row in rows if row.failed is None}
    body = [
        [title, *(column.text(rows_by_name[name]) for column in shown)]
        for name, title in names.items()
        if name in rows_by_name
    ]
    words = [index for index, column in enumerate(shown, start=1) if column.is_words]
    return table(["a client runs in", *(column.name for column in shown)], body, [0, *words])


if __name__ == "__main__":
    main()
