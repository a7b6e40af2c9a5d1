"""`fedexec`, as a person calls it: a process of its own."""

import os
import subprocess
import sys

FEDEXEC = [sys.executable, "-m", "fedexec"]
SMALL = [
    "--clients",
    "5",
    "--fit-clients",
    "3",
    "--rounds",
    "2",
    "--epochs",
    "1",
    "--threads-per-worker",
    "1",
]


def run(*argv, **environment):
    return subprocess.run(
        [*FEDEXEC, *argv],
        capture_output=True,
        text=True,
        timeout=280,  # a test that hangs says so itself, before it is ended after 300 s
        env={name: value for name, value in os.environ.items() if not name.startswith("FEDEXEC_")}
        | environment,
    )


def succeed(*argv, **environment):
    done = run(*argv, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
