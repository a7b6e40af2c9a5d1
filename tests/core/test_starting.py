"""Workers to which something happens while they are started."""

import os
import signal

import pytest

from fedexec.testing.tasks import DEADLINE
from fedexec_backends import _context


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_process_that_is_stopped_before_it_has_read_its_task_is_replaced(
    create_on, monkeypatch, start_method
):
    write, stopped = _context._write, []

    def stop_and_write(fd, data, pid):
        if len(data) > 1 << 20 and not stopped:
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        write(fd, data, pid)

    monkeypatch.setattr(_context, "_write", stop_and_write)
    executor = create_on("process", max_workers=1, start_method=start_method, retries=1)
    future = executor.submit(len, bytes(4 << 20))  # more than a pipe takes at once
    assert future.result(DEADLINE) == 4 << 20
    assert len(stopped) == 1
