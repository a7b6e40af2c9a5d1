"""``loky``: long-lived loky workers, each replaced when a task leaves it above ``memory_limit``.

Each worker reports its resident set with each result, so the first task is checked and a sudden growth is
noticed. loky's own check compares with the first task's figure and runs at most once per second.
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
from fedexec_backends._pooled_backend import PooledBackend
from fedexec_backends._single_worker_pool import Slot

__all__ = ["LokyBackend"]


def _register_lokys_exit_hook() -> None:
    """Register loky's exit hook now, so that loky closes its pools after the executor has finished its work.

    Hooks run in reverse order of registration. loky would register its hook when a pool starts, which is
    after the executor's hook: then queued tasks would be lost. loky would also register once per pool, which
    fails during exit.
    """
    if process_executor.process_pool_executor_at_exit is None:
        threading._register_atexit(process_executor._python_exit)  # type: ignore[attr-defined]
        process_executor.process_pool_executor_at_exit = True


_register_lokys_exit_hook()


class LokyBackend(PooledBackend):
    """Runs many tasks in each worker.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks
    """

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
        start_tracker_apart(resource_tracker)  # loky's own tracker, not multiprocessing's
        self._limits = Limits(settings)

    def make_pool(self, context: WorkerContext, worker_setup: WorkerSetup) -> Executor:
        """Make a pool whose one worker stays.

        Parameters
        ----------
        context : WorkerContext
        worker_setup : WorkerSetup

        Returns
        -------
        Executor
        """
        pool: Executor = loky.ProcessPoolExecutor(
            max_workers=1, context=context, initializer=setup, initargs=(worker_setup,)
        )
        return pool

    def after(self, slot: Slot, task: Task, outcome: Outcome) -> None:
        """Retire the slot's worker if it holds more memory than the limit.

        Parameters
        ----------
        slot : Slot
        task : Task
        outcome : Outcome
        """
        slot.device = task.device
        if self._limits.exceeded(outcome.usage):
            slot.retire(outcome.usage)

    def restarts(self) -> Mapping[str, int]:
        """Return how many workers were replaced, by cause."""
        return self._limits.replaced()
