"""Test suites that show whether a backend keeps its promises; a backend's author inherits from them.

::

    from fedexec.testing.conformance import ExecutorConformance
    from fedexec.testing.deaths import ExecutorDeaths


    class TestConformance(ExecutorConformance):
        backend = "mine"


    class TestDeaths(ExecutorDeaths):
        backend = "mine"

The backend must be registered in the entry-point group ``fedexec.backends``. A test of a promise that the
backend does not make (:class:`fedexec.Capability`) is skipped, with the reason. The suites need pytest and
Linux.
"""

import sys

_SUITES = ("suite", "calls", "pickling", "lifecycle", "scripts", "workers", "caller", "memory", "leaks")

# Workers import this package, too, because it contains the task functions; they must not import pytest.
if (_pytest := sys.modules.get("pytest")) is not None:
    _pytest.register_assert_rewrite(*(f"{__name__}.{suite}" for suite in _SUITES))
