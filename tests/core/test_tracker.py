"""The resource tracker of multiprocessing, which we start: nobody waits for its end."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from fedexec.testing.refusals import without_warnings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Some releases of Python 3.12 and 3.13 wait so at the end of an interpreter, as long as the tracker lives.
WAITS_AT_EXIT = """
import atexit, os, sys
from multiprocessing import resource_tracker

def wait_for_the_tracker():
    tracker = resource_tracker._resource_tracker
    if tracker._fd is not None and tracker._pid is not None:
        os.close(tracker._fd)
        os.waitpid(tracker._pid, 0)

atexit.register(wait_for_the_tracker)
import fedexec

def leave_a_daemon():
    ends = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    return os.posix_spawn("/bin/sleep", ["sleep", "120"], os.environ, setsid=True, file_actions=ends)

with fedexec.create_executor(sys.argv[1], max_workers=1) as executor:
    print(executor.submit(leave_a_daemon).result())
"""


@pytest.mark.parametrize("backend", ["standby", "process"])
def test_a_caller_ends_although_a_daemon_of_a_task_holds_the_trackers_pipe(backend):
    command = [sys.executable, "-c", WAITS_AT_EXIT, backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        daemon = int(caller.stdout.readline())
        begun = time.monotonic()
        try:
            assert caller.wait(60) == 0
            assert time.monotonic() - begun < 30
            assert _has_not_ended(daemon)
        finally:
            caller.kill()
            os.kill(daemon, 9)


def _has_not_ended(pid):
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_tracker_runs_and_leads_a_group_of_its_own():
    script = (
        "import os, psutil, fedexec; from multiprocessing import resource_tracker as r\n"
        "with fedexec.create_executor('process', max_workers=1) as executor:\n"
        "    executor.submit(abs, -1).result()\n"
        "    tracker = next(c for c in psutil.Process().children() if 'tracker' in ' '.join(c.cmdline()))\n"
        "    assert r._resource_tracker._check_alive()\n"
        "    print(os.getpgid(tracker.pid) == tracker.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, without_warnings(done.stderr)) == ("True\n", "")
