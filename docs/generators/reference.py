"""Reference pages that follow from the code: settings, commands, backends, the columns of a report."""

import argparse
import ast
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedexec import Capability
from fedexec._cli.commands import make_parser
from fedexec._registry import backends as known_backends
from fedexec._report import columns as report_columns
from fedexec.settings import options

__all__ = ["backends", "columns", "commands", "file", "settings"]

ROOT = Path(__file__).parents[2]
PREFIX = "executor-"  # of a key in the configuration of a Flower app
HELP = "show this help message and exit"
TITLES = {"positional arguments": "Arguments", "options": "Options"}
WITHOUT_FLAG = ("seed",)  # each command reads it as its own, with a default


def settings() -> str:
    """Write one section for each setting."""
    blocks = []
    for option in options():
        key = PREFIX + option.name.replace("_", "-")
        flag = [] if option.name in WITHOUT_FLAG else [f"`{option.flag} {option.metavar}`"]
        spellings = " · ".join([f"`{option.name}=`", *flag, f"`{option.variable}`", f"`{key}`"])
        text = f"{option.text} Default: {option.default}."
        blocks += [f"### {option.name} {{ #{option.name} }}", spellings, text]
    return "\n\n".join(blocks)


def backends() -> str:
    """Write a table of the promises, and which of the built-in backends make them."""
    listed = [info for info in known_backends() if info.capabilities is not None]
    rows = []
    for promise, says in _promises():
        kept = ["yes" if promise in (info.capabilities or Capability(0)) else "no" for info in listed]
        rows.append([f"`{promise.name}`<br>{says}", *kept])
    return _table(["promise", *(f"`{info.name}`" for info in listed)], rows)


def _promises() -> Iterator[tuple[Capability, str]]:
    """Yield each promise with the docstring below it."""
    (kind,) = ast.parse(inspect.getsource(Capability)).body
    assert isinstance(kind, ast.ClassDef)
    for promise, says in itertools.pairwise(kind.body):
        match promise, says:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=text)):
                yield Capability[name], " ".join(str(text).replace("``", "`").split())


def columns() -> str:
    """Write what those columns of a report's table mean whose heading does not say it."""
    explained = [[each.name, each.explains] for each in report_columns._ALL if each.explains]
    return _table(["column", "what it shows"], explained)


def file(name: str) -> str:
    """Write a Python file of the repository as a block, under its name without the folder."""
    path = ROOT / name
    return f'```python title="{path.name}"\n{path.read_text()}```'


# ---------------------------------------------------------------- the command line


def commands() -> str:
    """Write one section for each command."""
    parser = make_parser()
    (listed,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    helps = {each.dest: each.help for each in listed._choices_actions}
    return "\n\n".join(_command(name, helps[name] or "", each) for name, each in listed.choices.items())


def _command(name: str, summary: str, parser: argparse.ArgumentParser) -> str:
    text = parser.description or f"{summary[:1].upper()}{summary[1:]}."
    blocks = [f"## fedexec {name} {{ #{name} }}", _prose(text), f"```text\n{_usage(parser)}\n```"]
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help not in (argparse.SUPPRESS, HELP)]
        rows = [_row(parser, action) for action in shown]
        if not rows:
            continue
        title = TITLES.get(group.title or "", (group.title or "").capitalize())
        blocks.append(f"**{title}**{{ .group }}")
        if group.description:
            blocks.append(_prose(group.description))
        blocks.append(_table(["", ""], rows))
    if parser.epilog:
        blocks.append(f"```text\n{parser.epilog.strip()}\n```")
    return "\n\n".join(blocks)


def _usage(parser: argparse.ArgumentParser) -> str:
    """Return a usage without the options, which the tables list."""
    positional = [each for each in parser._actions if not each.option_strings]
    formatter = argparse.HelpFormatter(parser.prog, width=100)
    names = [formatter._format_args(each, each.metavar or each.dest) for each in positional]  # type: ignore[arg-type]
    return " ".join([parser.prog, "[OPTION ...]", *names])


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> list[str]:
    formatter = argparse.HelpFormatter(parser.prog)
    name = formatter._format_action_invocation(action)
    said = formatter._expand_help(action) if action.help else ""
    return [f"`{name}`", _prose(said)]


_CODE = re.compile(
    r"(`[^`]+`|(?<![\w/-])--[a-z][a-z-]*|\bFEDEXEC_[A-Z_]*[A-Z]|\bfedexec [a-z]+\b|https?://\S+)"
)


def _prose(text: str) -> str:
    """Return text of the command line as Markdown: what looks like code is code."""
    parts = _CODE.split(" ".join(text.split()))
    return "".join(_code(part) if index % 2 else _escaped(part) for index, part in enumerate(parts))


def _code(part: str) -> str:
    return f"<{part}>" if part.startswith("http") else f"`{part.strip('`')}`"


def _escaped(part: str) -> str:
    return re.sub(r"([*_<])", r"\\\1", part)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
