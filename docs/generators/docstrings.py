"""Docstrings as the site shows them: Sphinx's roles become links or code, and ``::`` begins no paragraph."""

import re
from typing import Any

import griffe

__all__ = ["PlainMarkdown"]

_ROLE = re.compile(r":(?:py:)?\w+:`(?:[^`<]*<)?(~?)([\w.]+)>?`")


class PlainMarkdown(griffe.Extension):
    """Turns reStructuredText in docstrings, as far as this package uses it, into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """Return a docstring as Markdown."""
    text = _ROLE.sub(lambda found: f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`", text)
    text = re.sub(r"^::$\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)
