"""Conformance tests of programs that make an executor in an unusual environment."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedexec.errors import PreloadError
from fedexec.interface import Capability
from fedexec.testing import tasks
from fedexec.testing.suite import AVAILABLE_START_METHODS, Create, Suite

__all__ = ["SurroundingsConformance"]

LEAVES_A_THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(3600,), name="busybody", daemon=True).start()
VALUE = 42
"""


class SurroundingsConformance(Suite):
    """An executor works in an unusual environment, or says in one sentence what to do."""

    def test_it_works_in_a_daemonic_process(self, temp: Path) -> None:
        """In a worker of multiprocessing.Pool, of Dask, of Celery."""
        out, err, code = self.run_script(
            """
            import multiprocessing

            def use(number):
                from fedexec import Capability, create_executor
                from fedexec.testing.bad_tasks import end_child_that_handles_sigterm
                with create_executor(max_workers=1) as executor:
                    if Capability.ISOLATED in executor.capabilities:  # its tasks may start processes
                        assert executor.submit(end_child_that_handles_sigterm).result(30) == 7
                    return executor.submit(abs, number).result(30), multiprocessing.current_process().daemon

            if __name__ == "__main__":
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(pool.apply(use, (-3,)))
            """,
            temp,
        )
        assert (out, err, code) == (["(3, True)"], "", 0)

    @pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
    def test_a_process_of_multiprocessing_may_use_its_script_and_leave_the_executor_open(
        self, temp: Path, method: str
    ) -> None:
        """There the script is ``__mp_main__``, and multiprocessing joins the processes that it lists."""
        out, err, code = self.run_script(
            """
            import functools, multiprocessing, pickle, sys
            from fedexec import Capability, create_executor

            class Net:
                def __init__(self, size):
                    self.size = size

            @functools.lru_cache
            def grown(net):
                return Net(net.size + 1)

            def stored(net):
                return pickle.dumps(net)  # by the name of its class

            def use():
                global executor  # and leave it open
                executor = create_executor(max_workers=1)
                back = executor.submit(grown, Net(2)).result(30)
                stored_there = pickle.loads(executor.submit(stored, Net(2)).result(30))
                print(type(back) is Net, back.size, type(stored_there) is Net, stored_there.size)
                if Capability.ISOLATED in executor.capabilities:
                    assert not multiprocessing.active_children()  # which some programs wait for
                print("ended", flush=True)

            if __name__ == "__main__":
                child = multiprocessing.get_context(sys.argv[1]).Process(target=use)
                child.start()
                child.join()
                print(child.exitcode)
            """,
            temp,
            method,
        )
        assert (out, err, code) == (["True 3 True 2", "ended", "0"], "", 0)

    def test_it_works_without_standard_streams(self, temp: Path) -> None:
        self.need_this_machine("the client of an engine may need standard streams")
        out, err, code = self.run_script(
            """
            import os, subprocess, sys

            source = '''
            import os, sys
            from fedexec import create_executor
            with create_executor() as executor:
                results = list(executor.map(abs, [-1, -2, -3]))
            with open(sys.argv[1], "w") as file:
                file.write(str(results))
            '''.replace("\\n            ", "\\n")
            command = 'exec "$@" <&- >&- 2>&-'
            script = [sys.executable, "-c", source, sys.argv[1]]
            print(subprocess.run(["sh", "-c", command, "sh", *script]).returncode)
            """,
            temp,
            temp / "results",
        )
        assert (out, err, code) == (["0"], "", 0)
        assert (temp / "results").read_text() == "[1, 2, 3]"

    def test_it_works_where_all_signals_are_blocked(self, temp: Path) -> None:
        """As in a program that uses ``sigwait``; the ends of workers are noticed all the same."""
        out, err, code = self.run_script(
            """
            import signal
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            from fedexec import create_executor

            with create_executor(max_workers=1) as executor:
                print(list(executor.map(abs, [-1, -2])))
            """,
            temp,
        )
        assert (out, err, code) == (["[1, 2]"], "", 0)

    def test_it_works_in_a_program_with_five_thousand_descriptors(self, temp: Path) -> None:
        """As in servers; `select.select` accepts no descriptor above 1,023."""
        out, err, code = self.run_script(
            """
            import os, resource, sys
            import numpy as np
            from fedexec import create_executor

            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if hard != resource.RLIM_INFINITY and hard < 6000:
                sys.exit("too few descriptors are allowed here")
            resource.setrlimit(resource.RLIMIT_NOFILE, (6000, hard))
            opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(5000)]
            with create_executor(max_workers=2, preload=["json"]) as executor:
                futures = [executor.submit(np.add, np.ones(500_000), number) for number in range(4)]
                print([float(future.result(30)[-1]) for future in futures])
                if hasattr(os, "waitid"):  # Without a template there is nothing to rehearse, which is said.
                    assert executor.rehearse(abs, -1) in (True, False)
            print(len(opened))
            """,
            temp,
        )
        if err == "too few descriptors are allowed here\n":
            pytest.skip(err.strip())
        assert (out, err, code) == (["[1.0, 2.0, 3.0, 4.0]", "5000"], "", 0)

    def test_it_works_in_a_directory_that_was_removed(self, temp: Path) -> None:
        self.need_this_machine("the client of an engine may need its directory")
        (temp / "probe").mkdir()
        in_removed = 'cd "$1" && rmdir "$1" && exec "$2" -c "import socket"'
        probe = ["sh", "-c", in_removed, "sh", str(temp / "probe")]
        if subprocess.run([*probe, sys.executable], stderr=subprocess.DEVNULL).returncode:
            pytest.skip("this Python starts nothing in a directory that was removed")
        out, err, code = self.run_script(
            """
            import os, sys

            os.mkdir(sys.argv[1])
            os.chdir(sys.argv[1])
            os.rmdir(sys.argv[1])
            from fedexec import create_executor
            with create_executor() as executor:
                print(list(executor.map(abs, [-1, -2, -3])))
            """,
            temp,
            temp / "removed",
        )
        assert (out, err, code) == (["[1, 2, 3]"], "", 0)

    def test_a_path_that_import_ignores_is_ignored(self, temp: Path) -> None:
        self.need_this_machine("the engines themselves do not ignore such a path")
        out, err, code = self.run_script(
            """
            import pathlib, sys

            sys.path += [pathlib.Path("/nowhere"), b"bytes", None, 3]
            from fedexec import create_executor
            with create_executor() as executor:
                print(executor.submit(abs, -3).result())
            """,
            temp,
        )
        assert (out, err, code) == (["3"], "", 0)

    def test_a_preload_that_leaves_a_thread_gets_fresh_interpreters(
        self,
        create: Create,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        self.need(Capability.ISOLATED)
        (tmp_path / "leaves_a_thread.py").write_text(LEAVES_A_THREAD)
        monkeypatch.syspath_prepend(str(tmp_path))
        executor = create(preload=["json", "leaves_a_thread"], start_method=None)
        results = [executor.submit(_value_and_threads) for _ in range(3)]
        assert [future.result(tasks.DEADLINE) for future in results] == [(42, ["busybody"])] * 3
        if sys.platform == "linux":  # Elsewhere workers are not forked.
            (warning,) = [record for record in caplog.records if "forked" in record.getMessage()]
            assert "leaves_a_thread: it left 1 thread(s) running" in warning.getMessage()
            assert "busybody" in warning.getMessage()

    def test_a_preload_that_leaves_a_thread_is_refused_where_forks_are_asked_for(
        self, create: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.need(Capability.ISOLATED)
        if "forkserver" not in AVAILABLE_START_METHODS:
            pytest.skip("nothing is forked here")
        (tmp_path / "leaves_a_thread.py").write_text(LEAVES_A_THREAD)
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(PreloadError, match=r"leaves_a_thread: it left 1 thread.*busybody") as caught:
            create(preload=["json", "leaves_a_thread"], start_method="forkserver")
        assert caught.value.module == "leaves_a_thread"
        assert any("spawn" in note for note in caught.value.__notes__)

    def test_a_preload_is_refused_where_no_interpreter_can_be_started_either(self, temp: Path) -> None:
        self.need(Capability.ISOLATED)
        self.need_this_machine("their interpreter is another")
        if "forkserver" not in AVAILABLE_START_METHODS:
            pytest.skip("nothing is forked here")
        out, err, code = self.run_script(
            f"""
            import multiprocessing, os, pathlib, sys
            import fedexec

            fedexec.create_executor().shutdown()  # starts multiprocessing's own helpers
            os.environ.pop("FEDEXEC_START_METHOD")
            pathlib.Path(sys.argv[1], "leaves_a_thread.py").write_text({LEAVES_A_THREAD!r})
            sys.path.insert(0, sys.argv[1])
            multiprocessing.set_executable("/nonexistent/python")
            try:
                fedexec.create_executor(preload=["leaves_a_thread"])
            except fedexec.PreloadError as exc:
                print(exc, *exc.__notes__)
            """,
            temp,
            temp,
        )
        assert (err, code) == ("", 0)
        assert "leaves_a_thread" in out[0]
        assert "'/nonexistent/python' cannot be executed" in out[0]

    def test_initargs_may_hold_locks_queues_and_pipes(self, temp: Path) -> None:
        self.need_this_machine("these objects exist on one machine")
        if not Path("/proc/self/fd").is_dir():
            pytest.skip("workers find queues and pipes in /proc")
        out, err, code = self.run_script(
            """
            import multiprocessing
            from fedexec import create_executor

            def initialize(*shared):
                import builtins
                builtins.shared = shared

            def use(number):
                import builtins
                lock, queue, total, event, writer = builtins.shared
                with lock:
                    total.value += number
                queue.put(number)
                event.set()
                writer.send(number)

            context = multiprocessing.get_context("spawn")
            reader, writer = context.Pipe(duplex=False)
            shared = context.Lock(), context.Queue(), context.Value("i", 0), context.Event(), writer
            with create_executor(initializer=initialize, initargs=shared) as executor:
                list(executor.map(use, [1, 2, 3]))
            print(sorted(shared[1].get() for _ in range(3)), sorted(reader.recv() for _ in range(3)))
            print(shared[2].value, shared[3].is_set())
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == ["[1, 2, 3] [1, 2, 3]", "6 True"]

    def test_a_lock_that_no_worker_could_inherit_is_refused_with_the_way_out(self, temp: Path) -> None:
        self.need(Capability.ISOLATED)
        self.need_this_machine("there is no way out")
        out, err, code = self.run_script(
            """
            import multiprocessing
            from fedexec import create_executor

            for shared in multiprocessing.get_context("fork").Lock(), multiprocessing.Pipe()[0]:
                try:
                    create_executor(initializer=print, initargs=(shared,))
                except RuntimeError as exc:
                    print(exc, *getattr(exc, "__notes__", ()))
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert "get_context('spawn')" in out[0]
        assert ("duplex=False" if Path("/proc/self/fd").is_dir() else "Manager()") in out[1]


def _value_and_threads() -> tuple[int, list[str]]:
    import threading

    import leaves_a_thread  # type: ignore[import-not-found]

    names = [thread.name for thread in threading.enumerate()]
    return leaves_a_thread.VALUE, [name for name in names if name == "busybody"]
