"""Every backend against the death suite, with both ways to start a worker."""

import pytest

from fedexec.testing.caller import CallerDeaths
from fedexec.testing.deaths import ExecutorDeaths
from fedexec.testing.workers import WorkerDeaths


class TestInline(ExecutorDeaths):
    backend = "inline"


class TestStandby(ExecutorDeaths):
    backend = "standby"


class TestProcess(ExecutorDeaths):
    backend = "process"


class TestPool(ExecutorDeaths):
    backend = "pool"


class TestLoky(ExecutorDeaths):
    backend = "loky"


@pytest.mark.thorough
class Spawned(WorkerDeaths, CallerDeaths):
    """What depends on how a worker starts."""

    start_method = "spawn"


class TestStandbySpawned(Spawned):
    backend = "standby"


class TestProcessSpawned(Spawned):
    backend = "process"


@pytest.mark.thorough
class TestPoolSpawned(Spawned):
    backend = "pool"


@pytest.mark.thorough
class TestLokySpawned(Spawned):
    backend = "loky"
