"""CPython's own tests of its executors, on every backend: all those that ask for nothing private.

They come with the interpreter, from 3.11.6 on, where its distributor has not left them out.
"""

import multiprocessing
import threading
import unittest.mock

import pytest

import fedexec

pytestmark = pytest.mark.thorough
MODULES = (
    "executor",
    "test_as_completed",
    "test_deadlock",
    "test_process_pool",
    "test_shutdown",
    "test_wait",
)
executor, as_completed, deadlock, process_pool, shutdown, wait = (
    pytest.importorskip(f"test.test_concurrent_futures.{name}", reason="needs the interpreter's own tests")
    for name in MODULES
)
util = pytest.importorskip("test.test_concurrent_futures.util")

PRIVATE = {  # what a test asks for that is the standard pool's own -> those tests
    "_processes": (
        "test_killed_child",
        "test_saturation",
        "test_idle_process_reuse_one",
        "test_idle_process_reuse_multiple",
        "test_max_tasks_per_child",
        "test_broken_process_pool_traceback",
    ),
    "_mp_context": ("test_max_tasks_per_child_defaults_to_spawn_context",),
    "_executor_manager_thread": (
        "test_shutdown_deadlock_pickle",
        "test_gh105829_should_not_deadlock_if_wakeup_pipe_full",
        "test_failed_worker_replacement_breaks_pool",
        "test_force_shutdown_during_max_tasks_worker_exit",
        "test_gc_during_max_tasks_worker_exit_gh152967",
        "test_shutdown_no_wait_max_tasks_gh119592",
    ),
    "_force_shutdown": (
        "test_force_shutdown_workers_invalid_op",
        "test_kill_workers",
        "test_terminate_workers",
        "test_force_shutdown_workers_stops_pool",
    ),
    "terminate_workers": (
        "test_force_shutdown_workers_dead_workers",
        "test_force_shutdown_workers_not_started_yet",
    ),
    "its threads": ("test_python_finalization_error", "test_force_shutdown_workers"),
}


class OnBackend(util.ExecutorMixin):  # type: ignore[name-defined]
    """Makes executors of ours where CPython's mixins make those of the standard library."""

    backend: str

    def executor_type(self, max_workers=None, *, mp_context=None, **kwargs):
        return fedexec.create_executor(self.backend, max_workers=max_workers, **kwargs)

    def get_context(self):
        return multiprocessing.get_context("spawn")

    def create_event(self):
        if self.backend == "inline":
            return threading.Event()
        manager = self.get_context().Manager()
        self.addCleanup(manager.shutdown)
        return manager.Event()


def _on(backend, *tests):
    """Return a class of these tests, for one backend."""
    names = {"backend": backend} | {name: None for names in PRIVATE.values() for name in names}
    return type(f"On{backend.title()}", (*tests, OnBackend, util.BaseTestCase), names)


class Shutdown(shutdown.ExecutorShutdownTest):  # type: ignore[name-defined]
    """Has the scripts of these tests import an executor of ours."""

    def setUp(self):
        super().setUp()
        patch = unittest.mock.patch.object(shutdown, "assert_python_ok", self.run_script)
        patch.start()
        self.addCleanup(patch.stop)

    def run_script(self, flag, script):
        theirs = "from concurrent.futures import executor_type"
        assert theirs in script
        return run_python(flag, script.replace(theirs, OURS.format(self.backend)), **NOT_ISOLATED)


run_python = shutdown.assert_python_ok
NOT_ISOLATED = {"__isolated": False}  # as a keyword in a class, it would be another name
OURS = """
            import fedexec
            def executor_type(max_workers):
                return fedexec.create_executor("{}", max_workers=max_workers)
"""

ANYWHERE = (executor.ExecutorTest, as_completed.AsCompletedTests, wait.WaitTests, Shutdown)
IN_PROCESSES = (process_pool.ProcessPoolExecutorTest, deadlock.ExecutorDeadlockTest, *ANYWHERE[1:])

TestInline = _on("inline", *ANYWHERE)
TestStandby = _on("standby", *IN_PROCESSES)
TestProcess = _on("process", *IN_PROCESSES)
TestPool = _on("pool", *IN_PROCESSES)
TestLoky = _on("loky", *IN_PROCESSES)
