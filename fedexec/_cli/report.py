"""``fedexec report``: read benchmarks and say which strategy to use.

Exit codes: 0 the report is whole; 3 it was made, but something is missing: a file that could not be read, a
run that was interrupted, a backend that failed; 1 no file could be read; 2 wrong usage.
"""

import argparse
import shutil
import sys
from pathlib import Path

from fedexec._cli import options
from fedexec._cli.output import as_json, write
from fedexec._system.control_characters import visible

__all__ = ["INCOMPLETE", "command"]

INCOMPLETE = 3


def command(arguments: argparse.Namespace) -> int:
    """Write what was asked for; if nothing was, the text, as wide as the terminal."""
    from fedexec._report import markdown, page, summarize, terminal

    names = {"--html": arguments.html, "--markdown": arguments.markdown, "--json": arguments.json}
    outputs = options.outputs(names, arguments.files)
    summary = summarize([Path(name) for name in arguments.files])
    write(
        (outputs["--html"], lambda: page(summary)),
        (outputs["--markdown"], lambda: markdown(summary)),
        (outputs["--json"], lambda: as_json(summary.as_dict())),
    )
    if not any(outputs.values()):
        print(terminal(summary, shutil.get_terminal_size().columns), end="")
    for problem in summary.problems:
        print(f"fedexec: {visible(problem)}", file=sys.stderr)
    return INCOMPLETE if summary.problems else 0
