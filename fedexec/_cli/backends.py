"""``fedexec backends``: what there is to choose from."""

import argparse
import json

from fedexec._registry import backends
from fedexec._system.control_characters import visible

__all__ = ["command"]


def command(arguments: argparse.Namespace) -> int:
    """Print every backend; none of them is imported."""
    rows = [info.as_dict() for info in backends()]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        promises = "not known until it is used" if row["promises"] is None else ", ".join(row["promises"])
        lines = [row["summary"], f"promises: {promises or 'none'}"]
        if not row["available"]:
            way_out = row["reason"] or f"install it with: {row['install'] or 'see its project'}"
            lines.append(f"not available here; {way_out}")
        for name, line in zip([row["name"], "", ""], lines, strict=False):
            print(visible(f"{name:<{width}}  {line}"))
    return 0
