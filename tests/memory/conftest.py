"""Libraries of a GPU's driver, played by stubs that gcc compiles here."""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from nvml_driver import run

STUB = Path(__file__).with_name("nvml_stub.c")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Return the folder of the compiled stub."""
    pynvml = pytest.importorskip("pynvml", reason="needs pynvml: pip install nvidia-ml-py")
    compiler = shutil.which("gcc")
    nvidia = importlib.util.find_spec("nvidia")
    roots = [] if nvidia is None else nvidia.submodule_search_locations or []
    header = next((path for root in roots for path in Path(root).glob("*/include/nvml.h")), None)
    if compiler is None or header is None:
        missing = "gcc" if compiler is None else "nvml.h: pip install nvidia-nvml-dev-cu12"
        pytest.skip(f"needs {missing}")
    memory, process = pynvml.c_nvmlMemory_t, pynvml.c_nvmlProcessInfo_t
    layout = {
        "MEMORY_SIZE": ctypes.sizeof(memory),
        "MEMORY_TOTAL": memory.total.offset,
        "MEMORY_FREE": memory.free.offset,
        "MEMORY_USED": memory.used.offset,
        "PROCESS_SIZE": ctypes.sizeof(process),
        "PROCESS_PID": process.pid.offset,
        "PROCESS_USED": process.usedGpuMemory.offset,
        "PROCESS_GPU_INSTANCE": process.gpuInstanceId.offset,
        "PROCESS_COMPUTE_INSTANCE": process.computeInstanceId.offset,
        "NAME_LENGTH": pynvml.NVML_DEVICE_NAME_V2_BUFFER_SIZE,
        "UUID_LENGTH": pynvml.NVML_DEVICE_UUID_V2_BUFFER_SIZE,
    }
    folder = tmp_path_factory.mktemp("nvml")
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [f"-D{name}={value}" for name, value in layout.items()]
    command += ["-Wl,-soname,libnvidia-ml.so.1", f"-I{header.parent}"]
    command += [str(STUB), "-o", str(folder / "libnvidia-ml.so.1")]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert compiled.returncode == 0, compiled.stderr
    return folder


CUDA_STUB = """
/* A libcuda.so.1 without a GPU: as the real one, it refuses a process that is forked once it was started. */
#include <unistd.h>
static pid_t started_by;
int cuInit(unsigned flags) {
    (void)flags;
    if (!started_by) started_by = getpid();
    return started_by == getpid() ? 0 : 3 /* CUDA_ERROR_NOT_INITIALIZED */;
}
"""


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory):
    """Return the folder of a libcuda.so.1 that can be started, and knows whether it was forked since."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("cuda")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-"]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], input=CUDA_STUB, text=True, check=True)
    return folder


@pytest.fixture
def driver(library, tmp_path):
    """Return a function that runs code on a machine with the devices of a scenario."""

    def on(scenario, body, **env):
        path = tmp_path / "scenario"
        path.write_text(scenario)
        return run(body, LD_LIBRARY_PATH=str(library), NVML_STUB=str(path), **env)

    return on
