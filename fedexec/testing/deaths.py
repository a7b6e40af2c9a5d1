"""The death suite: workers, helper processes and callers end in every way in which a process can end."""

from fedexec.testing.caller import CallerDeaths
from fedexec.testing.helpers import HelperDeaths
from fedexec.testing.memory import MemoryDeaths
from fedexec.testing.stops import StoppedProcesses
from fedexec.testing.workers import WorkerDeaths

__all__ = ["ExecutorDeaths"]


class ExecutorDeaths(WorkerDeaths, HelperDeaths, MemoryDeaths, StoppedProcesses, CallerDeaths):
    """All tests of deaths; inherit from this class and name your backend.

    Attributes
    ----------
    backend : str
        Name of the backend under test, as for :func:`fedexec.create_executor`.
    start_method : str
        Start method of its workers. Default "forkserver", where the system allows it, else "spawn".

    Examples
    --------
    ::

        class TestMyBackendsDeaths(ExecutorDeaths):
            backend = "mine"
    """
