"""A task of the user's, as `--task` and `--arguments` name it."""

from typing import Any

from fedexec._bench.workloads import OwnTask, TaskError, Workload, workload
from fedexec._cli.options import UsageError
from fedexec._system.error_text import one_line

__all__ = ["load_own_task"]


def load_own_task(task: str | None, factory: str | None) -> tuple[OwnTask, Workload, tuple[Any, ...]] | None:
    """Import a task, and make the arguments of its first client; None if none was named.

    Parameters
    ----------
    task, factory : str or None
        What ``--task`` and ``--arguments`` say.

    Returns
    -------
    tuple of (OwnTask, Workload, tuple) or None
        The names, what they name, and the arguments of client 0.

    Raises
    ------
    UsageError
        There is no such task, or its arguments cannot be made.
    """
    if task is None:
        if factory is not None:
            raise UsageError("--arguments makes the arguments of --task: name that too")
        return None
    own = OwnTask(task, factory)
    try:
        job = workload(task, own)
        (arguments,) = job.arguments(lambda fn: None, 1)
    except TaskError as exc:
        raise UsageError(str(exc)) from exc
    except Exception as exc:
        raise UsageError(f"--arguments {factory}: {one_line(exc)}") from exc
    return own, job, arguments
