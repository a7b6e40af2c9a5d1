"""Conformance tests of callers that fork, as DataLoader, multiprocessing.Pool and many servers do."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from fedexec.interface import Capability
from fedexec.testing.leaks import living
from fedexec.testing.suite import Suite

__all__ = ["ForkConformance"]


class ForkConformance(Suite):
    """A process that the caller forks neither uses nor disturbs the caller's executors."""

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_forked_children_end_as_if_there_were_no_executor(self, temp: Path) -> None:
        self.need_this_machine("the client of an engine may not survive a fork")
        out, err, code = self.run_script(
            """
            import gc, multiprocessing, os, sys, threading, time, warnings
            from fedexec import create_executor

            warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads, from Python 3.12

            executor = create_executor()
            running = executor.submit(time.sleep, 0.5)

            def fork(way):
                pid = os.fork()
                if pid == 0:
                    way()
                    sys.exit(3)  # an interpreter's whole end, with threads, exit functions and finalizers
                codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

            def leave_with():
                with executor:
                    pass

            def collect():
                global executor
                del executor
                gc.collect()

            codes = []
            ways = int, executor.shutdown, executor.kill_workers, leave_with, collect, lambda: os._exit(3)
            for way in ways:
                fork(way)
            thread = threading.Thread(target=fork, args=(lambda: os._exit(3),))
            thread.start()
            thread.join()
            child = multiprocessing.get_context("fork").Process(target=sys.exit, args=(3,))
            child.start()
            child.join()
            with multiprocessing.get_context("fork").Pool(2) as pool:
                print(codes, child.exitcode, pool.map(abs, [-1, -2]))
            print(running.result(), executor.submit(abs, -3).result())
            executor.shutdown(wait=False)
            fork(int)
            executor.shutdown()
            fork(int)
            print(codes[-2:])
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == ["[3, 3, 3, 3, 3, 3, 3] 3 [1, 2]", "None 3", "[3, 3]"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_an_inherited_executor_says_whose_it_is(self, temp: Path) -> None:
        self.need_this_machine("the client of an engine may not survive a fork")
        out, err, code = self.run_script(
            """
            import os, warnings
            from fedexec import create_executor

            warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads, from Python 3.12
            executor = create_executor()
            executor.submit(int).result()
            pid = os.fork()
            if pid == 0:
                for call in (
                    lambda: executor.submit(int),
                    lambda: list(executor.map(abs, [1])),
                    lambda: executor.with_options(tag="x").submit(int),
                    executor.stats,
                    executor.running,
                ):
                    try:
                        call()
                    except RuntimeError as exc:
                        said = str(exc)
                        print(f"process {os.getppid()}" in said, "make an executor here" in said, flush=True)
                with create_executor(max_workers=1) as own:
                    print(own.submit(abs, -5).result(), flush=True)
                os._exit(0)
            os.waitpid(pid, 0)
            print(executor.submit(abs, -3).result())
            executor.shutdown()
            """,
            temp,
        )
        assert (out, err, code) == (["True True"] * 5 + ["5", "3"], "", 0)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_nothing_outlives_a_killed_caller_whatever_it_has_forked(self, temp: Path) -> None:
        self.need(Capability.ISOLATED)
        source = """
            import os, sys, time
            from fedexec import create_executor

            executor = create_executor()
            running = [executor.submit(time.sleep, 100) for _ in range(2)]
            while len([task for task in executor.running() if task.pid]) < 2:
                time.sleep(0.01)
            pid = os.fork()
            if pid == 0:
                sys.stdin.read()  # until the test is over
                os._exit(0)
            print(pid, flush=True)
            time.sleep(100)
            """
        script = self.start_script(source, temp, keep_input=True)
        assert script.stdout is not None
        forked = psutil.Process(int(script.stdout.readline()))
        family = set(psutil.Process(script.pid).children(recursive=True)) - {forked}
        trackers = {child for child in family if "resource_tracker" in " ".join(child.cmdline())}
        script.send_signal(signal.SIGKILL)
        script.wait()
        try:
            psutil.wait_procs(family - trackers, timeout=2)
            assert living(family - trackers) == set()
            assert forked.is_running()
        finally:
            forked.kill()
            script.communicate()
