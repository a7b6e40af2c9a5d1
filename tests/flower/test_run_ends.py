"""How `fedexec run` ends before its end, and what is left: signals, kills, what cannot be."""

import contextlib
import functools
import os
import pty
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from fedexec.flower.grpc.checkpoint import Checkpoints
from fedexec.testing.leaks import memory_of, still_named
from fedexec.testing.tasks import poll
from flower.commands import FEDEXEC, run, succeed

APP = str(Path(__file__).parent / "quickstart_app")

pytestmark = pytest.mark.torch


@pytest.mark.thorough_but("seed=0; this one has seed=3")
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--resume"], "--resume needs --checkpoint DIR"),
        (["--checkpoint", "{state}"], "add --resume to go on from it"),
        (["--checkpoint", "{state}", "--resume", "--seed", "3"], "seed=0; this one has seed=3"),
        (["--checkpoint", "{state}", "--resume", "--rounds", "1"], "raise --rounds"),
        (["--checkpoint", "/proc/nothing"], "--checkpoint /proc/nothing: "),
        (["--checkpoint", __file__], f"--checkpoint {__file__} is no directory, and it must be one"),
        (["--checkpoint", f"{__file__}/state"], f"--checkpoint {__file__}/state is no directory"),
        (["--checkpoint", "/proc/self"], "--checkpoint /proc/self/round.npz cannot be written: "),
    ],
)
def test_a_state_that_does_not_fit_is_one_line(tmp_path_factory, argv, says):
    state = _finished(tmp_path_factory.getbasetemp() / "finished")
    done = run("run", *_ONE_ROUND, *(word.format(state=state) for word in argv))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert says in line


_ONE_ROUND = ["--clients", "1", "--epochs", "1", "--rounds", "1", "--quiet"]


@functools.cache
def _finished(directory):
    succeed("run", *_ONE_ROUND, "--checkpoint", str(directory))
    return directory


def test_a_state_that_another_run_uses_is_one_line_with_its_pid(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)):
        done = run("run", *_ONE_ROUND, "--checkpoint", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.strip().splitlines()
    assert f"{tmp_path} is used by another run: pid {os.getpid()} on " in line


@pytest.mark.thorough
def test_missing_data_is_one_line(tmp_path):
    done = run("run", "--data", "cifar10", "--data-dir", str(tmp_path), "--quiet")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(tmp_path) in done.stderr
    assert "--download" in done.stderr


@pytest.mark.thorough
def test_an_address_in_use_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("run", "--address", f"127.0.0.1:{port}", "--quiet")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"127.0.0.1:{port}" in done.stderr


@pytest.mark.thorough_but("argv0-0.0-2", "argv0-1.0-15", "argv2-1.0-2", "argv4-0.0-15")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 1.0])
@pytest.mark.parametrize(
    "argv", [["run"], ["simulate", APP], ["probe"], ["client"], ["report", "/dev/stdin"]]
)
def test_a_signal_ends_a_command_that_is_only_starting(argv, delay, number):
    with subprocess.Popen(
        [*FEDEXEC, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        poll(lambda: _handles_sigterm(started.pid), "it hears signals")
        time.sleep(delay)  # wherever it is then
        started.send_signal(number)
        _, errors = started.communicate(timeout=20)
    assert started.returncode == 128 + number
    assert errors.strip().partition(":")[0] == "fedexec"
    assert errors.strip() in (f"fedexec: {number.name}", f"fedexec: {number.name}: ending all workers")


@pytest.mark.thorough_but("waiting for clients")
@pytest.mark.parametrize("seen", [b"waiting for clients", b"round 1/"])
def test_after_ctrl_c_the_terminal_is_as_before(seen):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(FEDEXEC[0], [*FEDEXEC, "run", "--rounds", "500"], os.environ | {"TERM": "xterm"})
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the end of the other side so.
        while data := os.read(terminal, 1 << 16):
            shown += data
            if seen in shown:
                os.kill(pid, signal.SIGINT)
                seen = b"\0"  # once
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT
    assert b"\x1b[?25l" in shown, "the cursor was hidden"
    _, _, after = shown.rpartition(b"\x1b[?25h")  # and is shown again
    assert b"\x1b[?25l" not in after
    assert re.sub(rb"\x1b\[[0-9;]*[A-Za-z]", b"", after).strip().startswith(b"fedexec: SIGINT")


def _handles_sigterm(pid):
    (line,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(line, 16) >> signal.SIGTERM - 1 & 1


@pytest.mark.thorough_but("mode0-2")
@pytest.mark.parametrize(
    ("mode", "number"),
    [
        (["--backend", "process"], signal.SIGINT),
        (["--backend", "process"], signal.SIGTERM),
        (["--backend", "process"], signal.SIGKILL),
        (["--backend", "loky"], signal.SIGINT),
        (["--backend", "pool"], signal.SIGKILL),
        (["--processes"], signal.SIGINT),
        (["--processes"], signal.SIGKILL),
    ],
)
def test_a_signal_ends_everything(mode, number, tmp_path):
    temporary, file = tmp_path / "tmp", tmp_path / "out" / "run.json"
    temporary.mkdir()
    file.parent.mkdir()
    started = subprocess.Popen(
        [
            *FEDEXEC, "run", *mode, "--clients", "2", "--rounds", "500", "--json", str(file),
            "--checkpoint", str(tmp_path / "state"),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    assert started.stdout is not None
    for line in started.stdout:
        if line.startswith("round 2/"):  # and round 1 is saved
            break
    family = psutil.Process(started.pid).children(recursive=True)
    assert family, "there should be workers by now"
    shared = memory_of([psutil.Process(started.pid), *family])
    os.killpg(started.pid, number)
    _, errors = started.communicate(timeout=20)
    assert started.returncode == (-number if number == signal.SIGKILL else 128 + number)
    said = [line for line in errors.splitlines() if line and line != f"fedexec: {number.name}"]  # of clients
    assert "Traceback" not in errors
    if number != signal.SIGKILL:
        assert said[0] == f"fedexec: {number.name}: ending all workers"
        assert re.fullmatch(r"fedexec: .*/state holds round \d+: the same command with --resume .*", said[1])
        assert len(said) == 2
    _, alive = psutil.wait_procs(family, timeout=2)
    assert alive == []
    assert list(temporary.glob("fedexec-*")) == []
    poll(lambda: not still_named(shared), "semaphores were removed", seconds=2)
    assert list(file.parent.iterdir()) == [], "a half-written file was left"
