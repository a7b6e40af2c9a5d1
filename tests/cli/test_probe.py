"""`fedexec probe`, as a person calls it, with tasks of their own."""

import json
import signal
import subprocess
import sys

import pytest

from fedexec._cli.probe import _client_resources
from fedexec._scheduling.admission import Footprint
from fedexec.testing.tasks import poll

MODULE = """
import os
import sys
import time
from fedexec.devices.emulated import emulated_device

def on_device():
    emulated_device.device().allocate(1598 << 20)  # beside a context of 450 MiB: 2 GiB

def on_the_cpu():
    return len(bytearray(b"x") * (100 << 20))

def grows():
    raise ValueError("no such file: data.bin")

def prints():
    print("from the task", flush=True)
    os.write(1, b"from a library")

def adds(one, other):
    assert (one, other) == (1, [2.0, 3.0])
    return one

def arguments(client):
    return 1 + client, [2.0, 3.0]

def listed(client):
    return [client]

def broken(client):
    raise KeyError("client 0")

def fails_in_two_lines():
    raise ValueError("one\\ntwo")

def takes_long():
    open("begun", "w").close()
    time.sleep(60)

constant = 7
print("from the module")
"""
FAILING = "raise RuntimeError('side effect')"
EXITING = "import sys; sys.exit('no arguments')"


@pytest.fixture
def probe(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "exiting.py").write_text(EXITING)

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


def test_a_task_gets_the_arguments_of_the_first_client(probe):
    done = probe("--task", "mine:adds", "--arguments", "mine:arguments", "--device", "none", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["task"] == "mine:adds"


@pytest.mark.parametrize("backend", ["inline", "standby"])
def test_what_a_task_prints_is_no_json(probe, backend):
    done = probe("--task", "mine:prints", "--device", "none", "--json", "--backend", backend)
    assert json.loads(done.stdout)["task"] == "mine:prints"
    for printed in ("from the module", "from the task", "from a library"):
        assert printed in done.stderr


@pytest.mark.parametrize("backend", ["inline", "process", "loky"])
def test_inline_and_reused_workers_tell_the_same_of_a_device(probe, backend):
    done = probe("--task", "mine:on_device", "--device", "emulated:2x24GiB", "--backend", backend)
    assert done.returncode == 0, done.stderr
    assert "takes 2.0 GiB of the 24.0 GiB of EMULATED GPU 0" in done.stdout
    held = 10 if backend == "inline" else 20
    assert f"this machine, were its EMULATED device real, holds {held} of them" in done.stdout


def test_ctrl_c_ends_a_long_task(probe, tmp_path):
    probe("--task", "mine:constant")  # it makes the module
    started = subprocess.Popen(
        [sys.executable, "-m", "fedexec", "probe", "--task", "mine:takes_long", "--device", "none"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    )
    poll(lambda: (tmp_path / "begun").exists() or started.poll() is not None, "the task began")
    started.send_signal(signal.SIGINT)
    _, stderr = started.communicate(timeout=20)
    assert started.returncode == 130
    assert b"ending all workers" in stderr and b"Traceback" not in stderr


def test_what_a_silent_gpu_does_is_unknown_not_nothing():
    assert _client_resources(Footprint(at_once=1), 1)["num_gpus"] is None
    assert _client_resources(Footprint(at_once=1, device_bytes=0), 1)["num_gpus"] == 0
    assert _client_resources(Footprint(at_once=1), 0)["num_gpus"] == 0


def test_without_a_device_the_cores_decide_and_nothing_is_made_up(probe):
    done = probe("--task", "mine:on_the_cpu", "--device", "none")
    assert done.returncode == 0, done.stderr
    assert "device memory: not measured" in done.stdout
    assert '"num_gpus": 0' in done.stdout
    found = json.loads(probe("--task", "mine:on_the_cpu", "--device", "none", "--json").stdout)
    assert found["device_bytes"] is None
    assert found["at_once"] == found["cores"]
    assert 100 << 20 < found["host_bytes"] < 200 << 20


@pytest.mark.thorough_but(
    "No module named 'yours'",
    "missing 2 required positional arguments",
    "SIGABRT",
    "out of memory",
)
@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--task", "mine"], 2, "package.module:function"),
        (["--task", "yours:task"], 2, "No module named 'yours'"),
        (["--task", "mine:missing"], 2, "has no attribute 'missing'"),
        (["--task", "mine:adds", "--arguments", "mine:listed"], 2, "to return the arguments as a tuple"),
        (["--task", "mine:adds", "--arguments", "mine:broken"], 2, "--arguments mine:broken: KeyError: "),
        (["--task", "mine:adds"], 1, "missing 2 required positional arguments"),
        (["--arguments", "mine:arguments"], 2, "name that too"),
        (["--task", "mine:constant"], 2, "that is a int, not a function"),
        (["--task", "failing:x"], 2, "RuntimeError: side effect"),
        (["--task", "exiting:x"], 2, "SystemExit: no arguments"),
        (["--task", "mine:grows"], 1, "ValueError: no such file: data.bin"),
        (["--task", "mine:fails_in_two_lines"], 1, "ValueError: one two"),
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
    assert done.returncode == code
    assert done.stdout.replace("from the module\n", "") == ""
    *report, line = done.stderr.strip().splitlines()
    assert line.startswith("fedexec: error: ")
    assert says in line
    if says == "SIGABRT":
        assert report.pop(0) == "Fatal Python error: Aborted"
    else:
        assert report == []
