"""Launchers, which stand for Flower's command, and the warm processes that are it."""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fedexec.devices.emulated import emulated_device
from fedexec.executor import Executor
from fedexec.flower.supernode import launch_host, launcher, warm_command
from fedexec.flower.supernode.launch_host import COMMAND, LaunchHost
from fedexec.interface import Hooks
from fedexec.settings import resolve
from fedexec.testing.tasks import DEADLINE, poll

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs Unix sockets")


def stand_in():
    """Stand for Flower's command in a worker: do what the token says."""
    what = sys.argv[sys.argv.index("--token") + 1]
    print("pid", os.getpid(), flush=True)
    if what == "tell":
        print(sys.argv[0], Path.cwd(), os.environ["MINE"], sys.stdin.read(), sorted(os.environ))
        print("of stderr", file=sys.stderr)
    elif what == "raise":
        raise ValueError("of the command")
    elif what == "hold":
        with emulated_device.device().allocate(1 << 30):
            time.sleep(0.7)
    elif what == "take":
        time.sleep(len(bytearray(b"x") * 600_000_000))
    elif what == "sleep":
        time.sleep(600)
    elif what == "handle":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        print("ready", flush=True)
        time.sleep(600)
    else:
        sys.exit(what if what == "text" else int(what))


def have_stand_in():
    warm_command._entry_point = lambda name: stand_in  # type: ignore[assignment]


@contextlib.contextmanager
def hosting(**settings):
    executor = Executor(
        resolve({"max_workers": 2, **settings}), Hooks(warmup=functools.partial(have_stand_in))
    )
    with executor, LaunchHost(executor) as host:
        try:
            yield host
        finally:
            executor.kill_workers()


@pytest.fixture(scope="module")
def host():
    with hosting() as host:
        yield host


def launch(host, *arguments, **options):
    environ = {**os.environ, **host.variables, "MINE": "mine"}
    program = Path(launcher.__file__).parent / "bin" / COMMAND
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([program, *arguments], env=environ, **{**streams, **options})


def with_variables(host, **variables):
    return SimpleNamespace(variables={**host.variables, **variables})


def worker_of(process):
    return psutil.Process(int(process.stdout.readline().split()[1]))


def test_arguments_streams_directory_and_environment_go_there(host, tmp_path):
    process = launch(host, "--insecure", "--token", "tell", cwd=tmp_path)
    out, err = process.communicate("typed", DEADLINE)
    assert process.returncode == 0, err
    pid, told = out.splitlines()
    assert int(pid.split()[1]) not in (process.pid, os.getpid())
    assert told.startswith(f"{COMMAND} {tmp_path} mine typed [")
    assert "_FEDEXEC" not in told
    assert err == "of stderr\n"


@pytest.mark.parametrize(
    ("token", "code", "said"),
    [("0", 0, ""), ("3", 3, ""), ("text", 1, "text\n"), ("raise", 1, "ValueError: of")],
)
def test_the_exit_code_comes_back(host, token, code, said):
    process = launch(host, "--token", token)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == code
    assert said in err


def test_a_signal_goes_there_and_its_effect_comes_back(host):
    process = launch(host, "--token", "handle")
    worker_of(process)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 5
    process = launch(host, "--token", "sleep")
    worker_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == -signal.SIGTERM


def test_a_worker_that_is_killed_is_one_failure_and_the_next_runs(host):
    process = launch(host, "--token", "sleep")
    worker_of(process).kill()
    assert process.wait(DEADLINE) == -signal.SIGKILL
    assert launch(host, "--token", "0").wait(DEADLINE) == 0


def test_a_command_never_runs_twice_and_never_cold_after_it_has_begun(caplog):
    with hosting(retries=2, memory_limit="200MiB", enforce_limits=True) as host:
        process = launch(host, "--token", "sleep")
        worker_of(process).kill()
        out, _ = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out) == (-signal.SIGKILL, "")
        process = launch(host, "--token", "take")
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 1, err
        assert out.count("pid") == 1
    assert "its hard limit is 200 MiB" in caplog.text


def test_the_worker_of_a_launcher_that_is_killed_ends(host):
    process = launch(host, "--token", "sleep")
    worker = worker_of(process)
    process.kill()
    poll(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker ended")


def test_no_more_run_at_once_than_the_executor_allows_and_the_others_try_later(monkeypatch):
    monkeypatch.setattr(launch_host, "WAIT_SECONDS", 1.0)
    with hosting(max_workers=1) as host:
        first = launch(host, "--token", "sleep")
        worker_of(first)
        second = launch(host, "--token", "0")
        assert second.wait(DEADLINE) == launch_host.TRY_LATER
        assert first.poll() is None, "who runs may run for long"
        third = launch(host, "--token", "0")
        first.kill()
        assert third.wait(DEADLINE) == 0


def test_no_more_run_at_once_than_the_device_holds(emulate):
    """EMULATED: four launches, each with a GiB, on a device of a little more than two."""
    emulate("emulated:2.5GiB,context=100MiB")
    with hosting(max_workers="auto") as host:
        assert launch(host, "--token", "hold").wait(DEADLINE) == 0, "the first is measured"
        begun = time.monotonic()
        processes = [launch(host, "--token", "hold") for _ in range(4)]
        assert [process.wait(DEADLINE) for process in processes] == [0] * 4
        assert time.monotonic() - begun > 2 * 0.7, "never more than two"


def test_what_is_not_understood_is_left_to_the_real_command_with_one_warning(host, tmp_path, caplog):
    real = tmp_path / COMMAND
    real.write_text('#!/bin/sh\necho "the real one" "$@"\nexit 4\n')
    real.chmod(0o755)
    path = host.variables["PATH"].split(os.pathsep)
    host = with_variables(host, PATH=os.pathsep.join([path[0], str(tmp_path), *path[1:]]))
    for _ in range(2):
        process = launch(host, "--allow-runtime-dependency-installation", "--token", "1")
        out, _ = process.communicate(timeout=DEADLINE)
        assert out == "the real one --allow-runtime-dependency-installation --token 1\n"
        assert process.returncode == 4
    (record,) = [record for record in caplog.records if "cold" in record.getMessage()]
    assert "--allow-runtime-dependency-installation is not known to be fit" in record.getMessage()
    process = launch(with_variables(host, _FEDEXEC_SOCKET="@nobody-listens-there"), "--token", "1")
    out, err = process.communicate(timeout=DEADLINE)
    assert out == "the real one --token 1\n"
    assert "starts cold: ConnectionRefusedError" in err


def test_who_does_not_know_the_key_gets_no_answer(host):
    process = launch(with_variables(host, _FEDEXEC_KEY="0" * 32), "--token", "0")
    assert process.wait(DEADLINE) == 1


def test_flowers_command_has_the_arguments_that_we_know():
    """A release of Flower with another argument fails here: is a warm process fit for it?"""
    done = subprocess.run(
        [sys.executable, "-c", HELP], capture_output=True, text=True, timeout=100, check=True
    )
    options = set(re.findall(r"--[a-z-]+", done.stdout))
    dependencies = {"--allow-runtime-dependency-installation", "--disable-runtime-dependency-installation"}
    assert options - dependencies - {"--help"} <= launch_host._KNOWN


HELP = """
import sys
from fedexec.flower.supernode.warm_command import _entry_point
sys.argv = ["flwr-clientapp", "--help"]
_entry_point("flwr-clientapp")()
"""


def test_flowers_own_command_is_found_and_answers_as_it_does():
    settings = resolve({"max_workers": 1})
    executor = Executor(settings, Hooks(warmup=functools.partial(warm_command.warm, COMMAND)))
    with executor, LaunchHost(executor) as host:
        process = launch(host, "--token")
        _, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 2
        assert "expected one argument" in err
        assert err.startswith(f"usage: {COMMAND}")


# ---------------------------------------------------------------- the command


def fedexec_supernode(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fedexec", "supernode", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "write the arguments of flower-supernode after --"),
        (
            ("--backend", "loky", "--", "--insecure"),
            "backend 'loky' (--backend) does not run each task in a fresh process",
        ),
        (("--insecure",), "there is no option --insecure"),
    ],
)
def test_what_cannot_be_is_a_usage_error(arguments, said):
    done = fedexec_supernode(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_what_flower_refuses_has_flowers_message_and_exit_code():
    done = fedexec_supernode("--max-workers", "1", "--", "--no-such-option")
    assert done.returncode == 2
    assert "unrecognized arguments: --no-such-option" in done.stderr


def test_launches_while_the_executor_ends_or_is_broken_have_an_answer():
    with hosting() as host:
        host._executor.shutdown()
        assert launch(host, "--token", "0").wait(DEADLINE) == 1
