import os
import subprocess
import sys

import pytest

JOBS = """
import os
import time

def fit(weights, client):
    return [weight + client for weight in weights]

def arguments(client):
    return [1.0, 2.0], client

def others(client):
    return [3.0], client

def fails(weights, client):
    raise ValueError("no such client")

def fails_later(weights, client):
    try:
        open("tried", "x").close()
    except FileExistsError:
        raise ValueError("no such client")

def dies(weights, client):
    os._exit(7)

def takes(weights, client):
    time.sleep(0.2)
    with open("calls", "a") as calls:
        calls.write(".")
    return [weight + client for weight in weights]

def differs():
    return time.time_ns()

def slow():
    time.sleep(60)

def stubborn():
    open("began", "w").close()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

def listed(client):
    return [client]

number = 7
"""

LOUD = """
from mine import arguments, fit

print("imported: nobody is to take that for an answer")
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "mine.py").write_text(JOBS)
    (tmp_path / "loud.py").write_text(LOUD)
    return tmp_path


@pytest.fixture
def start(place):
    """Return a function that starts `fedexec` where the user's module lies."""
    started = []

    def run(*argv):
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FEDEXEC_")}
        command = [sys.executable, "-m", "fedexec", *map(str, argv)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place, env=environ
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def fedexec(start):
    def run(*argv):
        process = start(*argv)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run
