"""`fedexec probe`, as a person calls it, with tasks of their own."""

import json
import subprocess
import sys

import pytest

MODULE = """
import os
from fedexec.memory import emulated

def on_device():
    emulated.device().allocate(1598 << 20)  # beside a context of 450 MiB: 2 GiB

def on_the_cpu():
    return len(bytearray(b"x") * (100 << 20))

def grows():
    raise ValueError("no such file: data.bin")

constant = 7
"""


@pytest.fixture
def probe(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)

    def call(*argv):
        return subprocess.run(
            [sys.executable, "-m", "fedexec", "probe", *argv],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )

    return call


def test_the_numbers_are_those_a_person_would_compute(probe):
    done = probe("--task", "mine:on_device", "--device", "emulated:24GiB", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["device_bytes"] == 2 << 30
    assert found["devices"][0]["name"].startswith("EMULATED")
    assert found["at_once"] == 10  # 0.9 * 24 / 2 = 10.8
    assert found["client_resources"]["num_gpus"] == 0.1
    assert 10 * found["client_resources"]["num_cpus"] <= found["cores"]


def test_on_two_devices_twice_as_many_with_the_same_fraction(probe):
    done = probe("--task", "mine:on_device", "--device", "emulated:2x24GiB", "--json", "--backend", "process")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["at_once"] == 20
    assert found["client_resources"]["num_gpus"] == 0.1


def test_without_a_device_the_cores_decide_and_nothing_is_made_up(probe):
    done = probe("--task", "mine:on_the_cpu", "--device", "none")
    assert done.returncode == 0, done.stderr
    assert "device memory: not measured" in done.stdout
    assert '"num_gpus": 0' in done.stdout
    found = json.loads(probe("--task", "mine:on_the_cpu", "--device", "none", "--json").stdout)
    assert found["device_bytes"] is None
    assert found["at_once"] == found["cores"]
    assert 100 << 20 < found["host_bytes"] < 200 << 20


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--task", "mine"], 2, "package.module:function"),
        (["--task", "yours:task"], 2, "No module named 'yours'"),
        (["--task", "mine:missing"], 2, "has no attribute 'missing'"),
        (["--task", "mine:constant"], 2, "that is a int, not a function"),
        (["--task", "mine:grows"], 1, "ValueError: no such file: data.bin"),
        (["--task", "os:abort"], 1, "SIGABRT"),
        (["--task", "mine:on_device", "--device", "emulated:1GiB"], 1, "out of memory"),
        (["--task", "mine:on_device", "--device", "emulated:lots"], 2, "lots"),
        (["--task", "mine:on_device", "--max-workers", "3"], 2, "leave it away"),
        (["--calibrate", "--device", "none"], 1, "no real GPU"),
        (["--calibrate", "--device", "emulated:24GiB"], 1, "no real GPU"),
    ],
)
def test_bad_input_is_one_line(probe, argv, code, says):
    done = probe(*argv)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("fedexec: error: ")
    assert says in line
