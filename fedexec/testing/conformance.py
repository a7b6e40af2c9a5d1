"""The conformance suite: an executor with this backend behaves as in :mod:`concurrent.futures`."""

from fedexec.testing.calls import CallConformance
from fedexec.testing.children import ChildrenConformance
from fedexec.testing.definitions import DefinitionConformance
from fedexec.testing.forks import ForkConformance
from fedexec.testing.lifecycle import LifecycleConformance
from fedexec.testing.pickling import PicklingConformance
from fedexec.testing.preloads import PreloadConformance
from fedexec.testing.randomness import RandomnessConformance
from fedexec.testing.scripts import ScriptConformance
from fedexec.testing.unusual_environments import SurroundingsConformance
from fedexec.testing.usage import UsageConformance

__all__ = ["ExecutorConformance"]


class ExecutorConformance(
    CallConformance,
    UsageConformance,
    PicklingConformance,
    DefinitionConformance,
    LifecycleConformance,
    ScriptConformance,
    ChildrenConformance,
    ForkConformance,
    PreloadConformance,
    RandomnessConformance,
    SurroundingsConformance,
):
    """All conformance tests; inherit from this class and name your backend.

    Attributes
    ----------
    backend : str
        Name of the backend under test, as for :func:`fedexec.create_executor`.
    start_method : str
        Start method of its workers. Default "forkserver", where the system allows it, else "spawn".

    Examples
    --------
    ::

        class TestMyBackend(ExecutorConformance):
            backend = "mine"
    """
