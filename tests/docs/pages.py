"""The pages of the documentation, and the snippets in them."""

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>[a-z]*)(?P<attributes>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_INCLUDED = re.compile(r"^<!-- generated: file (.+) -->$", re.MULTILINE)
_TITLE = re.compile(r'title="([^"]*)"')


@dataclass(frozen=True)
class Snippet:
    """One fenced block.

    Attributes
    ----------
    mark : str
        What the HTML comment in the line before it says: "run", "parsed: why" or "not run: why".
    title : str or None
        The file that it is.
    line : int
        Where it begins in the page.
    """

    language: str
    text: str
    mark: str
    title: str | None
    line: int

    @property
    def is_run(self) -> bool:
        return not self.mark.startswith(("not run", "parsed"))


@dataclass(frozen=True)
class Page:
    """One page: its path from the root of the checkout, and its snippets."""

    name: str
    snippets: list[Snippet] = field(default_factory=list)

    @property
    def needs(self):
        """The packages that its Python needs."""
        text = "\n".join(each.text for each in self.snippets if each.language == "python" and each.is_run)
        runs = "\n".join(each.text for each in self.snippets if each.mark.startswith("run"))
        needs_torch = "import torch" in text or "fedexec run" in runs
        needs_flower = needs_torch or "flwr" in text or "fedexec.flower" in text or "simulate" in runs
        return [*(["flwr", "rich"] if needs_flower else []), *(["torch"] if needs_torch else [])]

    def of(self, *languages):
        return [each for each in self.snippets if each.language in languages]


def read(path):
    text = _INCLUDED.sub(_shown, path.read_text())
    found = []
    for match in _BLOCK.finditer(text):
        title = _TITLE.search(match["attributes"])
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Snippet(match["language"], match["text"], match["mark"] or "", title and title[1], line))
    return Page(str(path.relative_to(ROOT)), found)


def _shown(found):
    """Return a file of the repository as the site shows it."""
    return f'```python title="{Path(found[1]).name}"\n{(ROOT / found[1]).read_text()}```'


def pages():
    others = [ROOT / "bench" / "README.md", *ROOT.glob("examples/*/README.md")]
    paths = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted(others)]
    return [read(path) for path in paths]
