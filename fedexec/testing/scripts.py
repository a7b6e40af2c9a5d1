"""Conformance tests of whole programs, from ``__main__`` to the end of the interpreter."""

import sys
from pathlib import Path

import pytest

from fedexec.interface import Capability
from fedexec.testing.suite import Suite

__all__ = ["ScriptConformance"]


class ScriptConformance(Suite):
    """A script needs no ``if __name__ == "__main__"``, and its work is finished when it ends."""

    def test_what_main_defines_can_be_used(self, temp: Path) -> None:
        out, err, code = self.run_script(
            """
            import sys
            from fedexec import create_executor

            with open(sys.argv[1], "a") as file:
                file.write("x")

            class MainError(Exception):
                pass

            class Point:
                def __init__(self, x):
                    self.x = x

            FACTOR = 3

            def scale(point):
                return Point(point.x * FACTOR)

            def fail():
                raise MainError("mine")

            executor = create_executor()
            print(executor.submit(scale, Point(14)).result().x)
            print(type(executor.submit(scale, Point(1)).result()) is Point)
            print(executor.submit(lambda: FACTOR).result())
            print(list(executor.map(lambda x: x * FACTOR, range(3), chunksize=2)))
            try:
                executor.submit(fail).result()
            except MainError as exc:
                print("caught", exc)
            executor.shutdown()
            """,
            temp,
            temp / "executions",
        )
        assert (err, code) == ("", 0)
        assert out == ["42", "True", "3", "[0, 3, 6]", "caught mine"]
        assert (temp / "executions").read_text() == "x", "__main__ was executed again in a worker"

    def test_tasks_see_what_an_initializer_of_main_has_set(self, temp: Path) -> None:
        """As in a ``ProcessPoolExecutor``, although functions of ``__main__`` travel by value."""
        out, err, code = self.run_script(
            """
            import sys
            from fedexec import create_executor

            replaced = None
            changed = {}
            factor = 1

            class Model:
                weights = None

            def set_another():
                global created
                created = "created"

            def initialize(value):
                global replaced
                replaced = value
                changed["value"] = value
                Model.weights = value
                task.attribute = value
                set_another()
                sys.modules[__name__].by_module = value

            def task():
                return replaced, changed, Model.weights, task.attribute, created, by_module, factor

            with create_executor(max_workers=1, initializer=initialize, initargs=("set",)) as executor:
                print(executor.submit(task).result())
                factor = 2
                print(executor.submit(task).result())
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == [
            f"('set', {{'value': 'set'}}, 'set', 'set', 'created', 'set', {factor})" for factor in (1, 2)
        ]

    def test_what_an_initializer_has_made_sees_the_globals_of_the_task(self, temp: Path) -> None:
        """Methods of a model, and a decorator's cache, work on the globals that the task itself sees."""
        self.need(Capability.ISOLATED)
        out, err, code = self.run_script(
            """
            import functools
            from fedexec import create_executor

            scale, offset, model, is_warm = 1, 0, None, False

            class Model:
                def predict(self):
                    return scale, offset

            def cached(function):
                cache = {}

                @functools.wraps(function)
                def call(key):
                    if key not in cache:
                        cache[key] = function(key)
                    return cache[key]

                return call

            @cached
            def load(key):
                return key, is_warm

            def initialize():
                global model, is_warm
                model, is_warm = Model(), True
                load("data")

            def task():
                global scale, is_warm
                scale, is_warm = 2, False
                return model.predict(), Model().predict(), offset, load("data"), load("other")

            with create_executor(max_workers=1, initializer=initialize) as executor:
                for offset in (3, 4):
                    print(executor.submit(task).result())
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == [
            f"((2, {offset}), (2, {offset}), {offset}, ('data', True), ('other', False))" for offset in (3, 4)
        ]

    def test_what_an_initializer_has_set_stays_with_its_function(self, temp: Path) -> None:
        """Functions may share a name, as those of one decorator, or have no module, as those of attrs."""
        self.need(Capability.ISOLATED)
        out, err, code = self.run_script(
            """
            from fedexec import create_executor

            def cached(function):
                def call():
                    if call.cache is None:
                        call.cache = function()
                    return call.cache

                call.cache = None
                return call

            def written(source, **names):
                exec(source, names)
                return names["written"]

            first = cached(lambda: "first")
            second = cached(lambda: "second")
            third = written("def written(): return names", names=["third"])
            fourth = written("def written(): return names", names=["fourth"])

            def initialize():
                first(), third()

            def task():
                return first(), second(), third(), fourth()

            with create_executor(max_workers=1, initializer=initialize) as executor:
                print(executor.submit(task).result())
            """,
            temp,
        )
        assert (out, err, code) == (["('first', 'second', ['third'], ['fourth'])"], "", 0)

    @staticmethod
    def need_threads_at_the_end() -> None:
        """Skip the test if CPython itself cannot pass it."""
        if (3, 12) <= sys.version_info < (3, 12, 3):
            pytest.skip("CPython 3.12.0 to 3.12.2 start no thread once main has ended (gh-113964)")

    def test_work_is_finished_before_the_interpreter_ends(self, temp: Path) -> None:
        self.need_threads_at_the_end()
        out, err, code = self.run_script(
            """
            from fedexec import create_executor
            from fedexec.testing.tasks import print_line

            executor = create_executor()
            for number in range(6):
                executor.submit(print_line, number)
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert sorted(out) == [str(number) for number in range(6)]

    def test_work_of_warm_workers_is_finished_too(self, temp: Path) -> None:
        out, err, code = self.run_script(
            """
            from fedexec import create_executor
            from fedexec.testing.tasks import print_line

            executor = create_executor()
            print(list(executor.map(abs, [-1, -2])))
            for number in range(6):
                executor.submit(print_line, number)
            executor.submit(len, bytes(100_000)).add_done_callback(lambda done: print(done.result()))
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert sorted(out) == [*sorted(["100000", *(str(number) for number in range(6))]), "[1, 2]"]

    def test_a_worker_that_dies_at_the_end_is_replaced(self, temp: Path) -> None:
        self.need_threads_at_the_end()
        self.need(Capability.SURVIVES_DEATH)
        out, err, code = self.run_script(
            """
            import os
            from fedexec import create_executor
            from fedexec.testing.tasks import print_line

            executor = create_executor(max_workers=1)
            executor.submit(print_line, 1)
            executor.submit(os._exit, 1)
            executor.submit(print_line, 2)
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == ["1", "2"]

    def test_work_after_shutdown_without_waiting_is_finished_too(self, temp: Path) -> None:
        self.need_threads_at_the_end()
        out, err, code = self.run_script(
            """
            from fedexec import create_executor
            from fedexec.testing.tasks import print_line

            executor = create_executor()
            executor.submit(print_line, 1)
            executor.submit(print_line, 2)
            executor.submit(print_line, 3)
            executor.shutdown(wait=False)  # gh-83386
            del executor
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert sorted(out) == ["1", "2", "3"]

    def test_results_reach_callbacks_before_the_interpreter_ends(self, temp: Path) -> None:
        self.need_threads_at_the_end()
        out, err, code = self.run_script(
            """
            from fedexec import create_executor

            executor = create_executor(max_workers=1)
            for number in range(3):
                executor.submit(pow, 2, number).add_done_callback(lambda done: print(done.result()))
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == ["1", "2", "4"]

    def test_work_is_finished_when_main_raises(self, temp: Path) -> None:
        self.need_threads_at_the_end()
        out, err, code = self.run_script(
            """
            from fedexec import create_executor
            from fedexec.testing.tasks import print_line

            executor = create_executor()
            executor.submit(print_line, "done")
            raise RuntimeError("main fails")
            """,
            temp,
        )
        assert out == ["done"]
        assert code == 1
        assert err.count("Traceback") == 1
        assert err.strip().endswith("RuntimeError: main fails")

    def test_two_executors_are_both_finished(self, temp: Path) -> None:
        self.need_threads_at_the_end()
        out, err, code = self.run_script(
            """
            from fedexec import create_executor
            from fedexec.testing.tasks import print_line

            first, second = create_executor(), create_executor()
            for number in range(3):
                first.submit(print_line, f"first {number}")
                second.submit(print_line, f"second {number}")
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert sorted(out) == [f"{who} {number}" for who in ("first", "second") for number in range(3)]

    def test_submit_in_atexit_is_refused(self, temp: Path) -> None:
        out, err, code = self.run_script(
            """
            import atexit
            from fedexec import create_executor

            executor = create_executor()

            @atexit.register
            def late():
                try:
                    executor.submit(print, "too late")
                except RuntimeError as exc:
                    print(exc)

            executor.submit(int).result()
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == ["cannot schedule new futures after interpreter shutdown"]

    def test_an_executor_may_belong_to_a_thread(self, temp: Path) -> None:
        """Workers depend on the process, not on the thread that started them."""
        out, err, code = self.run_script(
            """
            import threading
            from fedexec import create_executor

            made = []

            def make():
                executor = create_executor(max_workers=1)
                made.extend([executor, executor.submit(pow, 2, 3).result()])

            thread = threading.Thread(target=make)
            thread.start()
            thread.join()
            executor, first = made
            print(first, executor.submit(pow, 2, 4).result())
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == ["8 16"]

    def test_a_script_from_standard_input_works(self, temp: Path) -> None:
        self.need(Capability.ISOLATED)
        out, err, code = self.run_script(
            """
            import subprocess, sys

            source = '''
            from fedexec import create_executor
            def double(x):
                return 2 * x
            print(create_executor().submit(double, 21).result())
            '''
            subprocess.run([sys.executable, "-"], input=source.replace("\\n            ", "\\n"), text=True)
            """,
            temp,
        )
        assert (out, err, code) == (["42"], "", 0)
