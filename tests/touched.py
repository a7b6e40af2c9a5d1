"""Prints the test files whose thorough tests `make test-touched` runs, because a change touches them.

A file is touched if it was changed itself, or if it imports a module that was changed. The suites that every
backend passes are touched by a change of any backend. If a change touches many files, only a hint is
printed, because there is no time for them.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 8  # files
SUITES = {"tests/core/test_conformance.py", "tests/core/test_deaths.py"}


def changed_files():
    """Return the paths of the files that differ from the commit ``BASE``, by default the one before this."""
    base = os.environ.get("BASE") or "HEAD~1"
    command = ["git", "-C", str(ROOT), "diff", "--name-only", base]
    done = subprocess.run(command, capture_output=True, text=True)
    return set(done.stdout.split())  # nothing, if a shallow clone has no such commit


def imported_files(path):
    """Return the paths of our modules that a test file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    stems = [name.replace(".", "/") for name in names if name.startswith("fedexec")]
    return {
        f"{place}{stem}{end}"
        for stem in stems
        for place in ("", "backends/")
        for end in (".py", "/__init__.py")
    }


def touched():
    """Return the paths of the touched test files, in order."""
    changed = changed_files()
    found = SUITES if any(path.startswith("backends/") for path in changed) else set()
    for path in ROOT.glob("tests/*/test_*.py"):
        name = str(path.relative_to(ROOT))
        if name in changed or imported_files(path) & changed:
            found = found | {name}
    return sorted(found)


if __name__ == "__main__":
    found = touched()
    if len(found) > MOST:
        print(f"This change touches {len(found)} test files: run `make test-all`.", file=sys.stderr)
    else:
        print(*found)
