"""`fedexec doctor`: it finds what crashes have left, touches nothing that is used, and cleans."""

import dataclasses
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import fedexec
from fedexec._cli import main
from fedexec._system import leftovers
from fedexec._system.ownership import VARIABLE, Mark

finds_leftovers = pytest.mark.skipif(
    not (Path("/dev/shm").is_dir() and Path("/proc/net/unix").exists()),
    reason="without /dev/shm and /proc nothing is found",
)


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Places of this test's own, so that nobody else's leftovers are seen, or removed."""
    directory = tmp_path / "shm"
    directory.mkdir()
    monkeypatch.setattr(leftovers, "SHARED", directory)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = psutil.Process()
    monkeypatch.setattr(leftovers, "_processes", lambda: [each.pid for each in own.children(recursive=True)])
    return directory


def old(path):
    os.utime(path, (time.time() - 3600,) * 2)


def names(found):
    return sorted(path.name for paths in found.values() for path in paths)


@finds_leftovers
def test_files_that_do_not_tell_whose_they_are_are_named_and_left_alone(shared, tmp_path, capsys):
    for name in ("sem.mp-abc", "sem.mp-def", "sem.loky-1-xyz", "psm_12", "other"):
        (shared / name).touch()
        old(shared / name)
    (shared / "sem.mp-young").touch()
    socket_directory = tmp_path / "pymp-gone"
    socket_directory.mkdir()
    (socket_directory / "listener-x").touch()
    old(socket_directory)
    before = sorted(tmp_path.rglob("*"))
    assert names(leftovers.suspects()) == [
        "psm_12",
        "pymp-gone",
        "sem.loky-1-xyz",
        "sem.mp-abc",
        "sem.mp-def",
    ]
    assert main(["doctor", "--clean"]) == 0
    told = capsys.readouterr().out
    assert "sem.loky-1-xyz and 2 more" in told and "pymp-gone" in told and told.count("left alone") == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_symbolic_link_is_not_followed(shared, tmp_path):
    target = tmp_path / "not ours"
    target.mkdir()
    (target / "precious").touch()
    old(target)
    for link in (tmp_path / "pymp-link", shared / "sem.mp-link"):
        link.symlink_to(target)
        os.utime(link, (time.time() - 3600,) * 2, follow_symlinks=False)
    assert leftovers.suspects() == {}
    assert main(["doctor", "--clean"]) == 0
    assert (target / "precious").exists() and (tmp_path / "pymp-link").is_symlink()


@finds_leftovers
def test_a_semaphore_in_use_is_no_leftover():
    before = leftovers.shared_memory()
    lock = multiprocessing.get_context("spawn").Semaphore()
    new = leftovers.shared_memory() - before
    assert new, "it has a name"
    assert not leftovers.unmapped(new)
    del lock


@finds_leftovers
def test_a_socket_in_use_is_no_leftover(shared, tmp_path):
    directory = tmp_path / "pymp-used"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "listener"))
        listener.listen()
        old(directory)
        assert names(leftovers.suspects()) == []
    assert names(leftovers.suspects()) == ["pymp-used"]


@finds_leftovers
def test_living_executors_are_no_leftovers():
    with fedexec.create_executor("standby", max_workers=1) as executor:
        worker, template = executor.submit(lambda: (os.getpid(), os.getppid())).result()
        assert Mark.on(template) == Mark.own()
        assert not {worker, template} & {each.pid for each in leftovers.find()}


@finds_leftovers
def test_a_process_whose_caller_is_gone_is_found_and_ended(shared, capsys):
    # Played by a process with a template's mark: a real one ends with its caller.
    own = Mark.own()
    assert own is not None
    dead = dataclasses.replace(own, started=1)
    waiting = [sys.executable, "-c", "import time; time.sleep(3600)"]
    for mark, ends in ((own, False), (dead, True)):
        with subprocess.Popen(waiting, env=os.environ | {VARIABLE: str(mark)}, process_group=0) as process:
            try:
                assert (process.pid in [each.pid for each in leftovers.find()]) is ends
                assert main(["doctor"]) == int(ends)
                assert ("--clean ends it" in capsys.readouterr().out) is ends
                assert main(["doctor", "--clean"]) == 0
                if ends:
                    assert process.wait(30) == -9
                assert process.poll() == (-9 if ends else None)
            finally:
                process.kill()


def test_a_process_that_merely_names_a_module_of_ours_is_not_touched(shared):
    code = "import time; time.sleep(3600)  # fedexec._processes.forkserver_main"
    quiet = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
    start = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {code!r}], {quiet}).pid)"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, check=True, timeout=60)
    pid = int(done.stdout)
    try:
        assert pid not in [each.pid for each in leftovers.find()]
    finally:
        os.kill(pid, 9)


def test_what_a_task_or_a_preload_starts_bears_no_mark():
    look = "import os; print('_FEDEXEC_CALLER' in os.environ)"
    with fedexec.create_executor("standby", max_workers=1) as executor:
        command = [sys.executable, "-c", look]
        future = executor.submit(subprocess.run, command, capture_output=True, text=True)
        assert future.result().stdout == "False\n"


@finds_leftovers
@pytest.mark.parametrize("other", ["boot", "namespace"])
def test_a_mark_of_another_machine_or_container_proves_nothing(other):
    own = Mark.own()
    assert own is not None
    mark = dataclasses.replace(own, started=1)
    assert mark.caller_has_ended()
    assert not dataclasses.replace(mark, **{other: type(getattr(mark, other))(12345)}).caller_has_ended()


def test_the_report_tells_devices_ports_and_versions(shared, emulate, capsys):
    emulate("emulated:8GiB")
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 8080))
            taken.listen()
        except OSError:
            pass  # somebody else has it: just as good
        code = main(["doctor", "--json"])
    rows = {row["about"]: row for row in json.loads(capsys.readouterr().out)}
    assert code == 0
    assert fedexec.__version__ in rows["fedexec"]["says"]
    assert rows["EMULATED GPU 0, 8.0 GiB, context 450 MiB"]["says"] == "8.0 GiB free of 8.0 GiB"
    assert "default of fedexec server" in rows["port 8080"]["says"]
    assert rows["leftovers"]["says"] == "none"


def test_what_the_environment_says_wrongly_is_found(capsys, monkeypatch):
    monkeypatch.setenv("FEDEXEC_MAX_WORKERS", "-2")
    monkeypatch.setenv("FEDEXEC_TIMEOUTS", "5")
    assert main(["doctor", "--json"]) == 1
    found = [each["says"] for each in json.loads(capsys.readouterr().out) if each["about"] == "environment"]
    assert "(FEDEXEC_MAX_WORKERS)" in found[0]
    assert found[1] == "FEDEXEC_TIMEOUTS is no setting of fedexec; did you mean FEDEXEC_TIMEOUT?"


def test_a_backend_in_the_environment_that_does_not_exist_is_found(capsys, monkeypatch):
    monkeypatch.setenv("FEDEXEC_BACKEND", "lokky")
    assert main(["doctor", "--json"]) == 1
    (found,) = (each for each in json.loads(capsys.readouterr().out) if each["about"] == "environment")
    assert "'lokky'" in found["says"] and "'loky'" in found["says"]
