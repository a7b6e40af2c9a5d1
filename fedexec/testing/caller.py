"""Tests of deaths of the caller, of Ctrl+C, and of what remains after a regular end."""

import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fedexec.interface import Capability
from fedexec.testing import bad_tasks, tasks
from fedexec.testing.leaks import HeldResources, living, memory_of, new_children, still_named
from fedexec.testing.refusals import without_warnings
from fedexec.testing.suite import Suite
from fedexec.testing.tasks import DEADLINE, Gate

__all__ = ["CallerDeaths"]

_WAITING = """
    import sys
    from pathlib import Path
    from fedexec import create_executor
    from fedexec.testing.tasks import Gate

    gate = Gate(Path(sys.argv[1]))
    executor = create_executor(max_workers=3)
    futures = [executor.submit(gate.enter, number) for number in range(6)]
"""


class CallerDeaths(Suite):
    """No process outlives the caller, however the caller ends; nothing remains after an executor's end."""

    # ------------------------------------------------------------ the caller is killed

    def test_nothing_outlives_a_killed_caller(self, temp: Path, gate: Gate) -> None:
        self.need(Capability.ISOLATED)
        source = _WAITING + "    futures[0].result()\n"
        with self.start_script(source, temp, gate.directory) as script:
            try:
                gate.wait_for(3)
                descendants = psutil.Process(script.pid).children(recursive=True)
                if self.promises(Capability.REMOTE):
                    descendants += map(psutil.Process, gate.arrived())
                assert {process.pid for process in descendants} >= set(gate.arrived())
                shared = memory_of([psutil.Process(script.pid), *descendants])
            finally:
                script.kill()
            tasks.poll(lambda: not living(descendants), "every descendant ended", seconds=2)
            script.communicate()
        self._assert_nothing_left(temp, shared)

    def test_nothing_outlives_a_caller_killed_when_idle(self, temp: Path) -> None:
        self.need(Capability.ISOLATED)
        source = """
            from fedexec import create_executor

            executor = create_executor(max_workers=3)
            list(executor.map(abs, range(6)))
            print("idle")
            input()
            """
        with self.start_script(source, temp, keep_input=True) as script:
            try:
                assert script.stdout is not None
                assert script.stdout.readline() == "idle\n"
                descendants = psutil.Process(script.pid).children(recursive=True)
                shared = memory_of([psutil.Process(script.pid), *descendants])
            finally:
                script.kill()
            tasks.poll(lambda: not living(descendants), "every descendant ended", seconds=2)
            script.communicate()
        self._assert_nothing_left(temp, shared)

    def test_what_tasks_started_does_not_outlive_a_killed_caller(self, temp: Path) -> None:
        self.need(Capability.ISOLATED)
        source = """
            import sys
            from pathlib import Path
            from fedexec import create_executor
            from fedexec.testing.bad_tasks import hang_with_grandchild

            create_executor().submit(hang_with_grandchild, Path(sys.argv[1])).result()
            """
        note = temp / "grandchild"
        with self.start_script(source, temp, note) as script:
            try:
                tasks.poll(note.exists, "the task started a process")
                grandchild = psutil.Process(int(note.read_text()))
            finally:
                script.kill()
            tasks.poll(lambda: not living([grandchild]), "the grandchild ended", seconds=2)
            script.communicate()

    def _assert_nothing_left(self, temp: Path, shared: set[int]) -> None:
        directory = next(temp.glob("*/script.py")).parent / "tmp"
        tasks.poll(lambda: not list(directory.iterdir()), "the temporary files were removed", seconds=2)
        tasks.poll(lambda: not still_named(shared), "semaphores were removed", seconds=2)

    # ------------------------------------------------------------ Ctrl+C

    def _interrupt(self, script: "subprocess.Popen[str]") -> None:
        """Send SIGINT as a terminal does, to the whole process group at once."""
        os.killpg(script.pid, signal.SIGINT)

    def test_ctrl_c_ends_the_script_when_the_work_is_over(self, temp: Path, gate: Gate) -> None:
        self.need(Capability.ISOLATED)
        source = _WAITING + (
            "    try:\n        futures[0].result()\n"
            "    except KeyboardInterrupt:\n        print('interrupted', flush=True)\n        raise\n"
            "    finally:\n        executor.shutdown()\n"
            "        print([future.result() for future in futures])\n"
        )
        with self.start_script(source, temp, gate.directory, start_new_session=True) as script:
            gate.wait_for(3)
            self._interrupt(script)
            assert script.stdout is not None
            assert script.stdout.readline() == "interrupted\n"
            gate.open()
            out, err = script.communicate(timeout=DEADLINE)
        assert out == "[0, 1, 2, 3, 4, 5]\n"
        assert script.returncode == -signal.SIGINT
        self._assert_no_noise(err)

    def test_ctrl_c_and_kill_workers_end_the_script_at_once(self, temp: Path, gate: Gate) -> None:
        self.need(Capability.KILLS_ONE)
        source = _WAITING + (
            "    try:\n        futures[0].result()\n"
            "    except KeyboardInterrupt:\n        executor.kill_workers()\n        raise\n"
        )
        with self.start_script(source, temp, gate.directory, start_new_session=True) as script:
            gate.wait_for(3)
            descendants = psutil.Process(script.pid).children(recursive=True)
            self._interrupt(script)
            _, err = script.communicate(timeout=10)  # although the gate is closed
        assert script.returncode == -signal.SIGINT
        self._assert_no_noise(err)
        tasks.poll(lambda: not living(descendants), "every descendant ended", seconds=2)

    def test_ctrl_c_in_a_with_block_ends_the_script_at_once(self, temp: Path, gate: Gate) -> None:
        self.need(Capability.KILLS_ONE)
        source = _WAITING + "    with executor:\n        futures[0].result()\n"
        with self.start_script(source, temp, gate.directory, start_new_session=True) as script:
            gate.wait_for(3)
            descendants = psutil.Process(script.pid).children(recursive=True)
            os.kill(script.pid, signal.SIGINT)  # only to the caller
            _, err = script.communicate(timeout=10)  # although the gate is closed
        assert script.returncode == -signal.SIGINT
        self._assert_no_noise(err)
        tasks.poll(lambda: not living(descendants), "every descendant ended", seconds=2)

    def test_ctrl_c_while_workers_start_disturbs_none(self, temp: Path, gate: Gate) -> None:
        self.need(Capability.ISOLATED)
        # The script needs a handler: workers would inherit SIG_IGN, and then the test would show nothing.
        handler = "    import signal; signal.signal(signal.SIGINT, lambda *_: None); print(flush=True)\n"
        source = handler + _WAITING + "    print([future.result() for future in futures])\n"
        with self.start_script(source, temp, gate.directory, start_new_session=True) as script:
            assert script.stdout is not None
            script.stdout.readline()
            tasks.poll(lambda: self._started_under_fire(script, gate), "three tasks started")
            gate.open()
            out, err = script.communicate(timeout=DEADLINE)
        assert (out, without_warnings(err), script.returncode) == ("[0, 1, 2, 3, 4, 5]\n", "", 0)

    def _started_under_fire(self, script: "subprocess.Popen[str]", gate: Gate) -> bool:
        self._interrupt(script)
        return len(gate.arrived()) == 3

    @staticmethod
    def _assert_no_noise(err: str) -> None:
        assert err.count("Traceback") == 1, err
        assert err.strip().endswith("KeyboardInterrupt"), err

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
    def test_a_signal_handler_may_end_the_workers_while_the_script_submits(self, temp: Path) -> None:
        out, err, code = self.run_script(
            """
            import signal
            from fedexec import create_executor

            signal.signal(signal.SIGALRM, lambda *_: executor.kill_workers())
            for _ in range(5):
                executor = create_executor(max_workers=1)
                executor.submit(int).result()
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                futures = []
                try:
                    while True:
                        futures.append(executor.submit(int))
                except RuntimeError as exc:
                    print(exc, all(future.done() for future in futures))
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == ["cannot schedule new futures after shutdown True"] * 5

    # ------------------------------------------------------------ a regular end

    @pytest.mark.parametrize("how", ["shutdown", "kill_workers", "deaths"])
    def test_nothing_is_left_after_the_end(
        self, temp: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        monkeypatch.setenv("TMPDIR", str(temp))
        monkeypatch.setattr("tempfile.tempdir", str(temp))

        def use() -> None:
            executor = self.new_executor(timeout=60)
            futures = [executor.submit(tasks.capture, number) for number in range(6)]
            futures += [executor.submit(divmod, 1, 0)]
            if how == "deaths" and self.promises(Capability.SURVIVES_DEATH):
                futures += [executor.submit(os._exit, 1) for _ in range(3)]
            for future in futures:
                future.exception(DEADLINE)
            if how == "kill_workers" and self.promises(Capability.KILLS_ONE):
                executor.submit(bad_tasks.hang)
                executor.kill_workers()
            executor.shutdown()

        use()  # This starts what stays, such as the resource tracker.
        self.alone()
        before = HeldResources.now(temp)
        for _ in range(2):
            use()
        assert not new_children(before.children), "there are processes after shutdown has returned"
        if self.promises(Capability.REMOTE):  # the client of an engine may keep its log open
            before = replace(before, descriptors=HeldResources.now(temp).descriptors)
        tasks.poll(
            lambda: not HeldResources.now(temp).growth(before),
            f"all was given back except {HeldResources.now(temp).growth(before)}",
            seconds=5,
        )

    def test_threads_do_not_pile_up(self) -> None:
        executor = self.new_executor()
        list(executor.map(abs, range(4)))
        before = threading.active_count()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            list(executor.map(abs, range(4)))
        tasks.poll(lambda: threading.active_count() <= before + 2, "no thread stays for each task")
        executor.shutdown()
