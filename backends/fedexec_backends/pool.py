"""``pool``: the standard library's ProcessPoolExecutor with ``max_tasks_per_child=1``.

How it stays clear of CPython's bugs: ``max_tasks_per_child`` of 2 or more hangs with a backlog (gh-115634),
so it is always 1; with 1, ``shutdown(wait=False)`` kills the management thread (gh-119592) and a collected
executor hangs its futures (gh-152967), so the slot holds the pool and shuts it down, waiting, when no task
runs; and workers that would outlive a killed caller (gh-111873) are made to notice its end by
:func:`fedexec._worker.worker.setup`.
"""

from concurrent.futures import Executor, ProcessPoolExecutor

from fedexec.backend import Capability, Outcome, Task, WorkerContext, WorkerSetup, setup
from fedexec_backends._single_worker_pool import PooledBackend, Slot

__all__ = ["PoolBackend"]


class PoolBackend(PooledBackend):
    """A worker for one task; the pool starts the next while the slot waits."""

    capabilities = (
        Capability.ISOLATED
        | Capability.FRESH_PROCESS
        | Capability.SURVIVES_DEATH
        | Capability.KILLS_ONE
        | Capability.SHARES_MEMORY
    )
    descriptors_per_worker = 20  # ten are the pool's own: two queues, and what wakes its thread

    def make_pool(self, context: WorkerContext, wanted: WorkerSetup) -> Executor:
        """Make a pool whose worker ends after each task."""
        return ProcessPoolExecutor(
            max_workers=1,
            mp_context=context,
            initializer=setup,
            initargs=(wanted,),
            max_tasks_per_child=1,
        )

    def after(self, slot: Slot, task: Task, outcome: Outcome) -> None:
        """Have the worker gone before its device memory is counted on."""
        slot.await_end(outcome.usage)
