"""What an author of a backend inherits to see whether it keeps its promises.

::

    from fedexec.testing.conformance import ExecutorConformance
    from fedexec.testing.deaths import ExecutorDeaths


    class TestConformance(ExecutorConformance):
        backend = "mine"


    class TestDeaths(ExecutorDeaths):
        backend = "mine"

The backend must be registered in the entry-point group ``fedexec.backends``. A test of a promise that the
backend does not make (:class:`fedexec.Capability`) is skipped and says so. Needs pytest; Linux.
"""

import sys

_SUITES = ("suite", "calls", "pickling", "lifecycle", "scripts", "workers", "caller", "memory", "leaks")

# Workers import this package too, to find the task functions: for them pytest is not imported.
if (_pytest := sys.modules.get("pytest")) is not None:
    _pytest.register_assert_rewrite(*(f"{__name__}.{suite}" for suite in _SUITES))
