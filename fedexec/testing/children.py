"""Conformance tests of tasks that start threads and processes of their own."""

import time
from pathlib import Path

import psutil

from fedexec.interface import Capability
from fedexec.testing import bad_tasks, tasks
from fedexec.testing.suite import Create, Suite

__all__ = ["ChildrenConformance"]

HURRY = 0.5  # time in seconds that a worker has to end in these tests


class ChildrenConformance(Suite):
    """A task may start threads and processes; those that it leaves hang neither worker nor executor."""

    def test_a_task_starts_processes_as_the_caller_would(self, temp: Path) -> None:
        self.need(Capability.ISOLATED)
        out, err, code = self.run_script(
            """
            import multiprocessing
            from fedexec import create_executor

            def method():
                return multiprocessing.get_start_method()

            with create_executor() as executor:
                print(executor.submit(method).result() == multiprocessing.get_all_start_methods()[0])
            multiprocessing.set_start_method("spawn")  # The executor has not set one for its caller.
            with create_executor() as executor:
                print(executor.submit(method).result())
            """,
            temp,
        )
        assert (out, err, code) == (["True", "spawn"], "", 0)

    def test_processes_that_a_task_starts_find_what_the_script_defines(self, temp: Path) -> None:
        self.need(Capability.ISOLATED)
        out, err, code = self.run_script(
            """
            import multiprocessing, pickle
            from concurrent.futures import ProcessPoolExecutor
            from dataclasses import dataclass
            from fedexec import create_executor

            FACTOR = 3

            @dataclass
            class Point:
                x: int

            def scale(point):
                return Point(point.x * FACTOR)

            def run(method):
                context = multiprocessing.get_context(method)
                with context.Pool(1) as pool:
                    [first] = pool.map(scale, [Point(1)])
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    second = pool.submit(scale, Point(2)).result()
                    third = list(pool.map(lambda point: point.x, [first, second]))
                assert type(first) is type(second) is Point
                assert pickle.loads(pickle.dumps(first)) == first
                return first, second, third

            if __name__ == "__main__":
                with create_executor(max_workers=1) as executor:
                    for method in ("fork", "forkserver", "spawn"):
                        print(*executor.submit(run, method).result())
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == ["Point(x=3) Point(x=6) [3, 6]"] * 3

    def test_a_task_may_end_its_own_children(self, temp: Path) -> None:
        out, err, code = self.run_script(
            """
            import multiprocessing
            import time
            from fedexec import create_executor

            def run():
                with multiprocessing.get_context("fork").Pool(2) as pool:  # ends them with SIGTERM
                    numbers = pool.map(abs, [-1, -2])
                child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
                child.start()
                child.terminate()
                child.join()
                return numbers, child.exitcode

            with create_executor() as executor:
                print(executor.submit(run).result())
            """,
            temp,
        )
        assert (out, err, code) == (["([1, 2], -15)"], "", 0)

    def test_what_a_task_leaves_running_does_not_keep_the_executor(self, create: Create) -> None:
        self.need(Capability.ISOLATED)
        executor = create(max_workers=1, initializer=bad_tasks.hurry_to_leave, initargs=(HURRY,))
        executor.submit(int).result()
        begun = time.monotonic()
        for leave in (
            bad_tasks.leave_a_thread,
            bad_tasks.leave_a_pool,
            bad_tasks.leave_an_executor,
            bad_tasks.leave_a_process,
        ):
            assert executor.submit(leave).result(tasks.DEADLINE) > 0
        executor.shutdown()
        assert time.monotonic() - begun < 10, "the executor has waited for what a task left"

    def test_what_a_task_leaves_running_ends_with_its_worker(self, create: Create) -> None:
        self.need(Capability.ISOLATED)
        executor = create(max_workers=1, initializer=bad_tasks.hurry_to_leave, initargs=(HURRY,))
        child = executor.submit(bad_tasks.leave_a_process).result(tasks.DEADLINE)
        executor.shutdown()
        tasks.poll(lambda: not _is_alive(child), "the process that the task had left ended")

    def test_a_thread_that_a_task_leaves_may_finish(self, create: Create, tmp_path: Path) -> None:
        """For instance, a thread that still writes a checkpoint."""
        self.need(Capability.ISOLATED)
        executor = create(max_workers=1)
        executor.submit(bad_tasks.write_later, str(tmp_path / "checkpoint")).result(tasks.DEADLINE)
        executor.shutdown()
        assert (tmp_path / "checkpoint").read_text() == "whole"

    def test_a_handler_of_its_own_works_in_a_tasks_children(self, create: Create) -> None:
        self.need(Capability.ISOLATED)
        assert (
            create(max_workers=1).submit(bad_tasks.end_child_that_handles_sigterm).result(tasks.DEADLINE) == 7
        )


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
