"""A program that starts a contestant when it is told to: ``python -m fedexec.bench.cold PART``."""

import json
import sys

from fedexec.bench import tasks
from fedexec.bench.parts import Part
from fedexec.bench.peers import contestants
from fedexec.bench.workloads import workload


def main() -> None:
    """Say "ready", wait for a line, start and run one task, say "done", and wait for the end."""
    part = Part.from_dict(json.loads(sys.argv[1]))
    job, contestant = workload(part.workload, part.own), contestants()[part.strategy]
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    try:
        with contestant.opens(job, part.workers) as caller:
            caller.call(tasks.nothing)
            print("done", flush=True)
            sys.stdin.read()
    except Exception as exc:
        print(f"{type(exc).__name__}: {exc}".replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
