"""``fedexec report``: read benchmarks and say which strategy to use.

Exit codes: 0 the report is whole; 3 it was made, but something is missing: a file that could not be read, a
run that was interrupted, a backend that failed; 1 no file could be read; 2 wrong usage.
"""

import argparse
import json
import sys
from pathlib import Path

from fedexec.cli import options
from fedexec.report import markdown, page, summarize

__all__ = ["INCOMPLETE", "command"]

INCOMPLETE = 3


def command(arguments: argparse.Namespace) -> int:
    """Write what was asked for; the text, if nothing was."""
    names = {"--html": arguments.html, "--markdown": arguments.markdown, "--json": arguments.json}
    outputs = {option: options.writable(option, name) for option, name in names.items()}
    summary = summarize([Path(name) for name in arguments.files])
    for option, path in outputs.items():
        if path is None:
            continue
        if option == "--html":
            content = page(summary)
        elif option == "--markdown":
            content = markdown(summary)
        else:
            content = json.dumps(summary.as_dict(), indent=2) + "\n"
        if path == options.STDOUT:
            sys.stdout.write(content)
        else:
            path.write_text(content, encoding="utf-8")
    if not any(outputs.values()):
        print(markdown(summary), end="")
    for problem in summary.problems:
        print(f"fedexec: {problem}", file=sys.stderr)
    return INCOMPLETE if summary.problems else 0
