"""Clusters of two nodes, which all tests of a process share."""

import pytest
from clusters import Cluster


@pytest.fixture(scope="session")
def dask_cluster():
    pytest.importorskip("distributed")
    cluster = Cluster("dask")
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def ray_cluster():
    pytest.importorskip("ray")
    cluster = Cluster("ray")
    yield cluster
    cluster.close()
