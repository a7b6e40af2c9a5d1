"""The death suite: workers, helpers and callers that end in every way a process can end."""

from fedexec.testing.caller import CallerDeaths
from fedexec.testing.helpers import HelperDeaths
from fedexec.testing.memory import MemoryDeaths
from fedexec.testing.stops import StoppedProcesses
from fedexec.testing.workers import WorkerDeaths

__all__ = ["ExecutorDeaths"]


class ExecutorDeaths(WorkerDeaths, HelperDeaths, MemoryDeaths, StoppedProcesses, CallerDeaths):
    """Every test of deaths; inherit from it and name your backend.

    Attributes
    ----------
    backend : str
        Name of the backend under test, as :func:`fedexec.create_executor` knows it.
    start_method : str
        How its workers start. Default "forkserver".

    Examples
    --------
    ::

        class TestMyBackendsDeaths(ExecutorDeaths):
            backend = "mine"
    """
