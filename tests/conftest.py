import _posixsubprocess
import importlib.util
import os
import signal
import subprocess
from multiprocessing import util
from pathlib import Path

import pytest

pytest.register_assert_rewrite("fedexec.testing")  # The suites' assertions say what they found.

from fedexec.devices import device  # noqa: E402
from fedexec.devices.discovery import find_devices  # noqa: E402
from fedexec.devices.emulated import emulated_device  # noqa: E402
from fedexec.testing import refusals  # noqa: E402

# What a shell starts in the background ignores Ctrl+C, and so would the programs that these tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


UNIT = Path(__file__).with_name("unit")  # Every test there is marked so; those elsewhere mark themselves.
SLOW = ("flower", "bench", "workload", "faults")  # folders whose modules take longest


def pytest_addoption(parser):
    refusals.add_option(parser.addoption)


def pytest_configure(config):
    for name in config.getoption("refuse"):
        refusals.refuse(name)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """Put long modules first, so that no worker of xdist is left alone with one at the end."""
    items.sort(key=lambda item: item.path.parent.name not in SLOW)
    for item in items:
        if item.path.is_relative_to(UNIT):
            item.add_marker(pytest.mark.unit)
        if _is_thorough(item):
            item.add_marker(pytest.mark.thorough)


def _is_thorough(item):
    """Return whether the parameters of a test are none of those that ``thorough_but`` names."""
    marker, call = item.get_closest_marker("thorough_but"), getattr(item, "callspec", None)
    if marker is None or call is None:
        return False
    return {call.id, *map(str, call.params.values())}.isdisjoint(marker.args)


def pytest_runtest_setup(item):
    if item.get_closest_marker("flower"):
        pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")
    # Do not import torch here: its import takes seconds, and these tests use it in other processes.
    if item.get_closest_marker("torch") and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch: pip install 'fedexec[demo]'")


@pytest.fixture(autouse=True)
def _start_no_process(request, monkeypatch):
    """Hold tests of the unit tier to their promise: they start no process."""
    if request.node.get_closest_marker("unit"):

        def refuse(*args, **kwargs):
            pytest.fail("a unit test starts no process")

        for module, name in (
            (os, "fork"),
            (os, "posix_spawn"),
            (subprocess, "Popen"),
            (_posixsubprocess, "fork_exec"),
            (util, "spawnv_passfds"),
        ):
            monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def emulate(monkeypatch):
    """Return a function that gives this test an emulated device of its own."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("nothing can be emulated without memfd_create")
    monkeypatch.delenv(device.LEDGER_VARIABLE, raising=False)
    monkeypatch.setattr(emulated_device, "_made", {})
    monkeypatch.setattr(device, "_assigned", None)

    def make(spec="emulated:24GiB"):
        monkeypatch.setenv("FEDEXEC_DEVICE", spec)
        monkeypatch.setenv(device.LEDGER_VARIABLE, "")
        found = find_devices()
        return found if len(found) > 1 else found[0]

    return make
