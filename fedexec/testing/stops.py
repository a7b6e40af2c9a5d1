"""Tests of stopped processes, which neither work nor end."""

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from fedexec.errors import TaskTimeoutError
from fedexec.interface import Capability
from fedexec.testing.leaks import living, new_children
from fedexec.testing.suite import Create, Suite
from fedexec.testing.tasks import DEADLINE, poll

__all__ = ["StoppedProcesses", "stop"]


def stop(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Stop the processes that have not ended, and return them."""
    stopped = set()
    for process in processes:
        try:
            process.suspend()
            stopped.add(process)
        except psutil.NoSuchProcess:
            pass
    return stopped


def _stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


class StoppedProcesses(Suite):
    """A stopped process is replaced after a while; tasks keep their deadlines, and executors end."""

    def test_a_task_is_done_although_all_that_waited_for_it_is_stopped(self, create: Create) -> None:
        before = self.alone()
        executor = create(max_workers=1)
        assert executor.submit(pow, 2, 3).result(DEADLINE) == 8
        stopped = stop(new_children(before))
        assert [executor.submit(pow, 2, number).result(DEADLINE) for number in (4, 5, 6)] == [16, 32, 64]
        executor.shutdown()
        poll(lambda: not living(stopped), "the stopped processes have ended")

    def test_so_is_one_whose_arguments_no_pipe_takes_at_once(self, create: Create) -> None:
        before = self.alone()
        executor = create(max_workers=1, shared_memory=False)
        assert executor.submit(pow, 2, 3).result(DEADLINE) == 8
        stop(new_children(before))
        assert executor.submit(len, bytes(4 << 20)).result(DEADLINE) == 4 << 20

    def test_an_executor_ends_although_all_its_processes_are_stopped(self, create: Create) -> None:
        before = self.alone()
        executor = create(max_workers=2)
        assert executor.submit(pow, 2, 3).result(DEADLINE) == 8
        stopped = stop(new_children(before))
        executor.shutdown()
        poll(lambda: not living(stopped), "the stopped processes have ended")

    def test_a_task_that_is_stopped_is_ended_at_its_deadline(self, create: Create) -> None:
        self.need(Capability.KILLS_ONE)
        executor = create(max_workers=1)
        future = executor.with_options(timeout=1).submit(_stop_this_process)
        with pytest.raises(TaskTimeoutError):
            future.result(DEADLINE)
        assert executor.submit(pow, 2, 3).result(DEADLINE) == 8

    def test_stopping_again_and_again_loses_no_task(self, create: Create) -> None:
        before = self.alone()
        executor = create(max_workers=2)
        for _ in range(2):
            stop(new_children(before))
            futures = [executor.submit(pow, 2, number) for number in range(4)]
            assert [future.result(DEADLINE) for future in futures] == [1, 2, 4, 8]

    @pytest.mark.parametrize("which", ["0:", "0:1", "1:2", "2:"])
    def test_a_killed_caller_leaves_nothing_that_is_stopped(self, temp: Path, which: str) -> None:
        """The first process is the original template, the second is its successor; workers follow."""
        self.need(Capability.ISOLATED)
        script = self.start_script(
            """
            import os, signal, sys
            from fedexec import create_executor
            from fedexec.testing.leaks import new_children
            from fedexec.testing.stops import stop

            executor = create_executor(max_workers=1)
            executor.rehearse(abs, -1)
            executor.submit(abs, -1).result(30)
            processes = sorted(new_children(), key=lambda process: process.pid)
            print(*(process.pid for process in processes), flush=True)
            sys.stdin.readline()
            first, _, end = sys.argv[1].partition(":")
            stop(processes[int(first) : int(end or 99)])
            os.kill(os.getpid(), signal.SIGKILL)
            """,
            temp,
            which,
            keep_input=True,
        )
        with script:
            assert script.stdin is not None and script.stdout is not None
            family = set()
            for pid in script.stdout.readline().split():
                with contextlib.suppress(psutil.NoSuchProcess):  # The worker ends after its task.
                    family.add(psutil.Process(int(pid)))
            script.stdin.write("\n")
            script.stdin.flush()
            assert script.wait(DEADLINE) == -signal.SIGKILL
        poll(lambda: not living(family), "all processes have ended")
