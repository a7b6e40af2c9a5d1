"""Write the README's figures and the pages from the committed results: ``python bench/figures.py [--check]``.

With ``--check`` nothing is written; the exit code is 1 if something is stale.
"""

import sys
from pathlib import Path

from fedexec._report import page, summarize
from fedexec._report.markdown_report import machine_line, overview

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: python bench/figures.py -->", "<!-- /figures -->"


def main() -> None:
    """Write what is stale, or name it."""
    stale = [path for path, text in _wanted().items() if not path.exists() or path.read_text() != text]
    if sys.argv[1:] == ["--check"]:
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"{names}: not what bench/results says. Run: python bench/figures.py")
        return
    for path in stale:
        path.write_text(_wanted()[path])


def _wanted() -> dict[Path, str]:
    wanted, blocks = {}, []
    for file in sorted(RESULTS.glob("*.json")):
        summary = summarize([file])
        made = file.with_suffix(".html")
        wanted[made] = page(summary)
        blocks.append(overview(summary))
        link = made.relative_to(ROOT).as_posix()
        blocks.append(f"{machine_line(summary.runs[0])} Everything: [{link}]({link}).")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    text = "\n\n".join(blocks)
    wanted[README] = f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
    return wanted


if __name__ == "__main__":
    main()
