"""``loky``: long-lived loky workers, replaced when a task leaves them above ``memory_limit``.

The worker reports its resident set with each result, so the first task counts and so does a burst; loky's own
check compares with the first task's figure, once a second at most.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Executor

import loky
from loky import process_executor
from loky.backend import resource_tracker

from fedexec.backend import (
    Capability,
    Hooks,
    Limits,
    Outcome,
    Settings,
    Task,
    WorkerContext,
    WorkerSetup,
    setup,
    start_tracker_apart,
)
from fedexec_backends._single_worker_pool import PooledBackend, Slot

__all__ = ["LokyBackend"]


def _register_lokys_exit_hook() -> None:
    """Have loky close its pools at exit *after* the executor has finished its work.

    Hooks run last registered first, and loky registers its own when a pool starts: that is after the
    executor's, which would lose what is queued, and again for every pool, which fails during exit.
    """
    if process_executor.process_pool_executor_at_exit is None:
        threading._register_atexit(process_executor._python_exit)  # type: ignore[attr-defined]
        process_executor.process_pool_executor_at_exit = True


_register_lokys_exit_hook()


class LokyBackend(PooledBackend):
    """A worker for many tasks."""

    capabilities = (
        Capability.ISOLATED
        | Capability.SURVIVES_DEATH
        | Capability.KILLS_ONE
        | Capability.RECYCLES
        | Capability.SHARES_MEMORY
    )
    descriptors_per_worker = 20

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        super().__init__(settings, hooks)
        start_tracker_apart(resource_tracker)  # loky's own
        self._limits = Limits(settings)

    def make_pool(self, context: WorkerContext, wanted: WorkerSetup) -> Executor:
        """Make a pool whose worker stays."""
        pool: Executor = loky.ProcessPoolExecutor(
            max_workers=1, context=context, initializer=setup, initargs=(wanted,)
        )
        return pool

    def after(self, slot: Slot, task: Task, outcome: Outcome) -> None:
        """Retire a worker that holds too much."""
        slot.device = task.device
        if self._limits.exceeded(outcome.usage):
            slot.retire(outcome.usage)

    def restarts(self) -> Mapping[str, int]:
        """Return how many workers were replaced, by cause."""
        return self._limits.replaced()
