"""The conformance suite: an executor over this backend behaves like those of :mod:`concurrent.futures`."""

from fedexec.testing.calls import CallConformance
from fedexec.testing.children import ChildrenConformance
from fedexec.testing.definitions import DefinitionConformance
from fedexec.testing.forks import ForkConformance
from fedexec.testing.lifecycle import LifecycleConformance
from fedexec.testing.pickling import PicklingConformance
from fedexec.testing.preloads import PreloadConformance
from fedexec.testing.randomness import RandomnessConformance
from fedexec.testing.scripts import ScriptConformance
from fedexec.testing.surroundings import SurroundingsConformance
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
    """Every test of conformance; inherit from it and name your backend.

    Attributes
    ----------
    backend : str
        Name of the backend under test, as :func:`fedexec.create_executor` knows it.
    start_method : str
        How its workers start. Default "forkserver".

    Examples
    --------
    ::

        class TestMyBackend(ExecutorConformance):
            backend = "mine"
    """
