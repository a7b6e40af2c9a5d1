"""Every backend against the conformance suite, with both ways to start a worker."""

import pytest

from fedexec.testing.conformance import ExecutorConformance
from fedexec.testing.lifecycle import LifecycleConformance
from fedexec.testing.scripts import ScriptConformance


class TestInline(ExecutorConformance):
    backend = "inline"


class TestStandby(ExecutorConformance):
    backend = "standby"


class TestProcess(ExecutorConformance):
    backend = "process"


class TestPool(ExecutorConformance):
    backend = "pool"


class TestLoky(ExecutorConformance):
    backend = "loky"


@pytest.mark.thorough
class Spawned(LifecycleConformance, ScriptConformance):
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
