"""``pool``: the standard library's ProcessPoolExecutor with ``max_tasks_per_child=1``.

It avoids these bugs of CPython. A ``max_tasks_per_child`` of 2 or more hangs with a backlog (gh-115634), so
it is always 1. With 1, ``shutdown(wait=False)`` kills the management thread (gh-119592), and the futures of
an executor that is garbage-collected hang (gh-152967); so the slot keeps the pool, and shuts it down with a
wait when no task runs. Workers would outlive a killed caller (gh-111873); :func:`fedexec.backend.setup` makes
them notice the caller's end.
"""

from concurrent.futures import Executor, ProcessPoolExecutor

from fedexec.backend import Capability, Outcome, Task, WorkerContext, WorkerSetup, setup
from fedexec_backends._pooled_backend import PooledBackend
from fedexec_backends._single_worker_pool import Slot

__all__ = ["PoolBackend"]


class PoolBackend(PooledBackend):
    """Runs one task in each worker; the pool starts the next worker while the slot is free."""

    capabilities = (
        Capability.ISOLATED
        | Capability.FRESH_PROCESS
        | Capability.SURVIVES_DEATH
        | Capability.KILLS_ONE
        | Capability.SHARES_MEMORY
    )
    # Ten of them are the pool's own: two queues, and the pipe that wakes its thread.
    descriptors_per_worker = 20

    def make_pool(self, context: WorkerContext, worker_setup: WorkerSetup) -> Executor:
        """Make a pool whose one worker ends after each task.

        Parameters
        ----------
        context : WorkerContext
        worker_setup : WorkerSetup

        Returns
        -------
        Executor
        """
        return ProcessPoolExecutor(
            max_workers=1,
            mp_context=context,
            initializer=setup,
            initargs=(worker_setup,),
            max_tasks_per_child=1,
        )

    def after(self, slot: Slot, task: Task, outcome: Outcome) -> None:
        """Wait until the worker has ended and its device memory is free for the next task.

        Parameters
        ----------
        slot : Slot
        task : Task
        outcome : Outcome
        """
        slot.await_end(outcome.usage)
