"""The suites that fedexec's own backends pass."""

from fedexec.testing.conformance import ExecutorConformance
from fedexec.testing.deaths import ExecutorDeaths


class TestConformance(ExecutorConformance):
    backend = "pipe"


class TestDeaths(ExecutorDeaths):
    backend = "pipe"
