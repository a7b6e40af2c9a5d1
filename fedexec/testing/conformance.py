"""The conformance suite: an executor over this backend behaves like those of :mod:`concurrent.futures`."""

from fedexec.testing.calls import CallConformance
from fedexec.testing.lifecycle import LifecycleConformance
from fedexec.testing.pickling import PicklingConformance
from fedexec.testing.scripts import ScriptConformance

__all__ = ["ExecutorConformance"]


class ExecutorConformance(CallConformance, PicklingConformance, LifecycleConformance, ScriptConformance):
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
