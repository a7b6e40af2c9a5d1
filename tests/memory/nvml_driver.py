"""Code that runs on a machine whose NVIDIA driver a stub plays (nvml_stub.c)."""

import json
import os
import subprocess
import sys
import textwrap

VARIABLES = ("CUDA_VISIBLE_DEVICES", "FEDEXEC_DEVICE", "NVML_STUB", "NVML_STUB_TRACE")

# More than 32 bits, and nothing that a rounding would leave as it is.
TOTAL, USED = 25_757_220_864 + 3, 7_000_000_123
A, B = "GPU-aaaa1111-0000-0000-0000-000000000001", "GPU-aaaa2222-0000-0000-0000-000000000002"
M1, M2 = "MIG-cccc1111-0000-0000-0000-000000000003", "MIG-cccc2222-0000-0000-0000-000000000004"
GPU_A = f"gpu {A} {TOTAL} {USED} NVIDIA H100 80GB HBM3\n"
GPU_B = f"gpu {B} {TOTAL + 1} {USED + 1} NVIDIA A100-SXM4-40GB\n"
MIG_B = (
    f"{GPU_B}mig {M1} 5000000001 4000000001 NVIDIA A100 MIG 1g.5gb\nmig -\nmig {M2} 10000000001 17 MIG 2g\n"
)

UNINITIALIZED, NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED = 1, 3, 4, 9
FUNCTION_NOT_FOUND, GPU_IS_LOST, VERSION_MISMATCH, UNKNOWN = 13, 15, 18, 999

PRELUDE = """
import json, logging, os, sys
from pathlib import Path
from fedexec.errors import DeviceError
from fedexec.devices import device, nvml
from fedexec.devices.discovery import find_devices

messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
logging.getLogger("fedexec").addHandler(handler)
logging.getLogger("fedexec").setLevel(logging.INFO)

def play(scenario):
    Path(os.environ["NVML_STUB"]).write_text(scenario)

def uuids(choice=None, named_by="FEDEXEC_DEVICE"):
    try:
        return [found.uuid for found in nvml.devices(choice, named_by=named_by)]
    except DeviceError as exc:
        return str(exc)

def figures(device):
    return [device.total_bytes(), device.used_bytes(), device.process_bytes()]

def show(value):
    print("ANSWER" + json.dumps(value), flush=True)
"""


def run(body, **env):
    """Run code in a process of its own and return what it shows, as JSON has it."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answers = [line.removeprefix("ANSWER") for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(answers) == 1, done.stdout
    return json.loads(answers[0])
