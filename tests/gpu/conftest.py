"""For a machine with CUDA: ``make gpu`` runs this once, and writes what it measured to one JSON file."""

import json
import os
import platform
import time
from pathlib import Path

import pytest

from fedexec._report.schema import GPU_KEY, SCHEMA
from fedexec.devices.discovery import find_devices

MEASURED = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[MEASURED] = {}


def pytest_collection_modifyitems(items):
    reason = _missing()
    if reason:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing():
    """Say why nothing can be measured here; asking starts no CUDA."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return "measures alone: make gpu"
    if os.environ.get("FEDEXEC_DEVICE", "").startswith("emulated"):
        return "FEDEXEC_DEVICE emulates a device: unset it"
    if not find_devices():
        return "needs an NVIDIA GPU that NVML shows"
    try:
        import torch
    except ImportError:
        return "needs torch: pip install 'fedexec[demo]'"
    # Else the question starts a driver that no fork survives. Templates set it by themselves.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        return None if torch.cuda.is_available() else "this torch was built without CUDA"
    finally:
        del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]


@pytest.fixture
def gpu():
    """Return the first GPU."""
    return find_devices()[0]


@pytest.fixture
def measured(request):
    """Return a function that notes a figure for the report, under the test's name."""

    def note(**figures):
        request.config.stash[MEASURED][request.node.name] = figures

    return note


def pytest_sessionfinish(session):
    found = session.config.stash[MEASURED]
    if not found:
        return
    import torch

    report = {
        GPU_KEY: SCHEMA,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "devices": [{"name": each.name, "total_bytes": each.total_bytes()} for each in find_devices()],
        "results": found,
    }
    path = Path(os.environ.get("FEDEXEC_GPU_JSON", "gpu.json"))
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwrote {path}")
