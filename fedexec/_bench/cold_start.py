"""A program that starts a contestant when it is told to: ``python -m fedexec._bench.cold_start PART``."""

import json
import os
import sys
from importlib import import_module

from fedexec._bench import tasks
from fedexec._bench.peers import contestants
from fedexec._bench.plan import Part
from fedexec._bench.workloads import workload
from fedexec._system.error_text import one_line


def main() -> None:
    """Say "ready", wait for a line, start and run one task, say "done", and wait for the end."""
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries, and modules of the user's, print is not the answer
    part = Part.from_dict(json.loads(sys.argv[1]))
    job, contestant = workload(part.workload, part.own), contestants()[part.strategy]
    for name in contestant.imports:
        import_module(name)
    print("ready", file=answer)
    if not sys.stdin.readline():
        return
    try:
        with contestant.opens(job, part.workers) as caller:
            caller.call(tasks.nothing)
            print("done", file=answer)
            sys.stdin.read()
    except Exception as exc:
        print(one_line(exc), file=answer)


if __name__ == "__main__":
    main()
