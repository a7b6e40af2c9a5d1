"""Both engines against the conformance and the death suite, on clusters of two nodes."""

import pytest

from fedexec.testing.conformance import ExecutorConformance
from fedexec.testing.deaths import ExecutorDeaths
from fedexec.testing.suite import Suite


class OnDask(Suite):
    backend = "dask"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _cluster(cls, dask_cluster):
        cls.settings = dask_cluster.settings


class OnRay(Suite):
    backend = "ray"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _cluster(cls, ray_cluster):
        cls.settings = ray_cluster.settings


@pytest.mark.thorough
class TestDaskConformance(OnDask, ExecutorConformance):
    pass


@pytest.mark.thorough
class TestDaskDeaths(OnDask, ExecutorDeaths):
    pass


@pytest.mark.thorough
class TestRayConformance(OnRay, ExecutorConformance):
    pass


@pytest.mark.thorough
class TestRayDeaths(OnRay, ExecutorDeaths):
    pass
