import pytest


def pytest_runtest_setup(item):
    if item.get_closest_marker("flower"):
        pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")
