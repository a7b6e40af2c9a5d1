"""How a command line is read: whole words only, and for what it does not know the nearest that it does."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from fedexec._system.control_characters import visible

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["Parser", "nearest"]

ALIKE = 0.7  # of 1.0: less looks like a guess


class Parser(argparse.ArgumentParser):
    """Complains in one line: what is wrong, what may be meant, and where to read on."""

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {"allow_abbrev": False, "formatter_class": _Help}
        super().__init__(**defaults | options)

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Return what a command line says.

        Parameters
        ----------
        argv : sequence of str or None
            None is ``sys.argv[1:]``.

        Raises
        ------
        SystemExit
            It says something that is not known; or it asks for ``--help`` or ``--version``.
        """
        found, unknown = self.parse_known_args(argv)
        if unknown:
            getattr(found, "parser", self).refuse(unknown)
        return found

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Complain of the first option that nobody knows, or of a word that nobody asked for."""
        option = next((word for word in words if word.startswith("-") and word != "-"), None)
        if option is None:
            self.error(f"{words[0]!r} is not an argument of this command")
        name = option.partition("=")[0]
        self.error(f"there is no option {name}{_hint(name, self._option_string_actions)}")

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {visible(message)} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: "SupportsWrite[str] | None" = None) -> None:
        """Write; of standard output also tell whether nobody reads it, which argparse would not mind."""
        if file is sys.stdout and file is not None:
            file.write(message)
        else:
            super()._print_message(message, file)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Refuse a command or a value that is none of those that there are."""
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        is_command = isinstance(action, argparse._SubParsersAction)
        what = f"there is no command {value!r}" if is_command else f"{value!r} is none of its values"
        hint = _hint(str(value), known) or f": choose from {', '.join(known)}"
        raise argparse.ArgumentError(None if is_command else action, f"{what}{hint}")


class _Help(argparse.HelpFormatter):
    """Fills paragraphs, and leaves alone what has lines of its own, as examples have."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        return "".join(indent + line for line in text.splitlines(keepends=True))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant; None if none looks like it."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=ALIKE)
    begins = [each for each in words if each.startswith(word)]
    return next(iter([*close, *begins]), None)


def _hint(word: str, known: Iterable[str]) -> str:
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""
