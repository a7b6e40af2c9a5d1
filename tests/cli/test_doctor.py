"""`fedexec doctor`: it finds what crashes have left, touches nothing that is used, and cleans."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedexec
from fedexec import leftovers
from fedexec.cli import main
from fedexec.testing.tasks import poll

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Places of this test's own, so that nobody else's leftovers are seen, or removed."""
    directory = tmp_path / "shm"
    directory.mkdir()
    monkeypatch.setattr(leftovers, "SHARED", directory)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return directory


def old(path):
    os.utime(path, (time.time() - 3600,) * 2)


def names(found):
    return sorted(leftover.path.name for leftover in found if leftover.path is not None)


def test_what_nobody_uses_is_found_and_cleaned(shared, tmp_path, capsys):
    for name in ("sem.mp-abc", "sem.loky-1-xyz", "psm_12"):
        (shared / name).touch()
        old(shared / name)
    (shared / "sem.mp-young").touch()
    (shared / "other").touch()
    old(shared / "other")
    socket_directory = tmp_path / "pymp-gone"
    socket_directory.mkdir()
    (socket_directory / "listener-x").touch()
    old(socket_directory)
    assert names(leftovers.find()) == ["psm_12", "pymp-gone", "sem.loky-1-xyz", "sem.mp-abc"]
    assert main(["doctor"]) == 1
    assert "--clean removes it" in capsys.readouterr().out
    assert main(["doctor", "--clean"]) == 0
    assert capsys.readouterr().out.count("removed") == 4
    assert names(leftovers.find()) == []
    assert sorted(path.name for path in shared.iterdir()) == ["other", "sem.mp-young"]


def test_a_semaphore_in_use_is_no_leftover():
    before = leftovers.shared_memory()
    lock = multiprocessing.get_context("spawn").Semaphore()
    new = leftovers.shared_memory() - before
    assert new, "it has a name"
    assert not leftovers.unmapped(new)
    del lock


def test_a_socket_in_use_is_no_leftover(shared, tmp_path):
    directory = tmp_path / "pymp-used"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "listener"))
        listener.listen()
        old(directory)
        assert names(leftovers.find()) == []
    assert names(leftovers.find()) == ["pymp-used"]


def test_living_executors_are_no_leftovers(shared):
    with fedexec.create_executor("standby", max_workers=1) as executor:
        executor.submit(os.getpid).result()
        assert [leftover for leftover in leftovers.find() if leftover.pid is not None] == []


def test_a_process_whose_caller_is_gone_is_found_and_ended(shared):
    # Played by a process with a template's command line, which its parent leaves behind.
    code = "import time; time.sleep(3600)  # fedexec_backends._forker"
    quiet = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
    start = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {code!r}], {quiet}).pid)"
    pid = int(
        subprocess.run([sys.executable, "-c", start], capture_output=True, check=True, timeout=60).stdout
    )
    try:
        found = poll(lambda: [each for each in leftovers.find() if each.pid == pid], "the orphan is found")
        found[0].remove()
        poll(lambda: not [each for each in leftovers.find() if each.pid == pid], "it is gone")
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, 9)


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
