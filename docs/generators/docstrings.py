"""Docstrings as the site shows them: Sphinx's roles become links or code, and ``::`` begins no paragraph."""

import re
from typing import Any

import griffe

from fedexec.settings import options

__all__ = ["PlainMarkdown"]

_ROLE = re.compile(r":(?:py:)?\w+:`(?:[^`<]*<)?(~?)([\w.]+)>?`")


class PlainMarkdown(griffe.Extension):
    """Turns reStructuredText in docstrings, as far as this package uses it, into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is None:
            return
        if obj.path == "fedexec.create.create_executor":
            obj.docstring.value = with_settings(obj.docstring.value)
        obj.docstring.value = plain(obj.docstring.value)


def with_settings(text: str) -> str:
    """Return the docstring of ``create_executor`` with an entry for each setting instead of one for all."""
    entries = [f"{each.name}\n    {each.text} Default: {each.default}.\n" for each in options()]
    before, _, rest = text.partition("Parameters\n----------\n")
    _, _, after = rest.partition("\ninitializer, initargs")
    assert after, "the docstring of create_executor is not what it was"
    return f"{before}Parameters\n----------\n{''.join(entries)}initializer, initargs{after}"


def plain(text: str) -> str:
    """Return a docstring as Markdown."""
    text = _ROLE.sub(lambda found: f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`", text)
    text = re.sub(r"^::$\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)
