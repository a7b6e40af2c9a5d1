"""Templates and GPUs: after what can workers still be forked, and what do they see?

MOCK: this machine may have no GPU, so NVML and CUDA's driver are stubs; torch is the real one, and tells by
itself whether it would refuse CUDA in a forked process.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

VARIABLES = ("CUDA_VISIBLE_DEVICES", "FEDEXEC_DEVICE", "NVML_STUB", "PYTORCH_NVML_BASED_CUDA_CHECK")
UUIDS = [f"GPU-aaaa{number}111-0000-0000-0000-00000000000{number}" for number in (1, 2)]
MIG = "MIG-cccc1111-0000-0000-0000-000000000003"
ONE_GPU = f"gpu {UUIDS[0]} 25757220864 1000 NVIDIA H100\n"
TWO_GPUS = "".join(f"gpu {uuid} 25757220864 1000 NVIDIA H100\n" for uuid in UUIDS)
ONE_MIG = f"gpu {UUIDS[0]} 25757220864 1000 NVIDIA A100\nmig {MIG} 5000000001 4000000001 MIG 1g.5gb\n"

CLIENT = 'import torch\nDEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")\n'
PRELUDE = """
import json, logging, sys
import fedexec

logging.basicConfig(level="WARNING", format="%(message)s")

def look():
    import os
    import my_client
    torch = my_client.torch
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(my_client.DEVICE), torch.cuda._is_in_bad_fork(), visible

def look_with(backend, **options):
    with fedexec.create_executor(backend, max_workers=1, preload=["my_client"], **options) as executor:
        return executor.submit(look).result()
"""


@pytest.fixture
def play(library, tmp_path):
    """Return a function that runs a program on a machine with the GPUs of a scenario; None is no driver."""
    pytest.importorskip("torch")
    (tmp_path / "my_client.py").write_text(CLIENT)

    def run(scenario, body, libraries=(), **env):
        paths = [str(path) for path in libraries]
        if scenario is not None:
            paths.append(str(library))
            (tmp_path / "scenario").write_text(scenario)
        clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        clean |= {"NVML_STUB": str(tmp_path / "scenario"), "LD_LIBRARY_PATH": ":".join(paths)}
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
            env=clean | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])} | env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


ON_ALL = 'print(json.dumps({name: look_with(name) for name in ("standby", "pool", "process", "loky")}))'
BACKENDS = ("standby", "pool", "process", "loky")


def test_a_module_may_ask_torch_for_cuda_at_its_top(play):
    found, complaints = play(ONE_GPU, ON_ALL)
    assert found == {name: ["cuda:0", False, None] for name in BACKENDS}
    assert complaints == ""


@pytest.mark.thorough
@pytest.mark.parametrize("scenario", [None, "fail * 9\n"], ids=["no driver", "driver not loaded"])
def test_a_module_may_ask_for_cuda_where_there_is_none(play, scenario):
    found, complaints = play(scenario, 'print(json.dumps(look_with("standby")))', CUDA_VISIBLE_DEVICES="0")
    assert (found, complaints) == (["cpu", False, "0"], "")


@pytest.mark.thorough_but("an index")
@pytest.mark.parametrize(
    ("scenario", "variable", "device", "expected"),
    [
        (ONE_MIG, MIG, None, ["cuda:0", False, MIG]),
        (TWO_GPUS, UUIDS[1], None, ["cuda:0", False, UUIDS[1]]),
        (TWO_GPUS, "", None, ["cpu", False, ""]),
        (TWO_GPUS, None, "none", ["cpu", False, ""]),
        (TWO_GPUS, None, "1", ["cuda:0", False, UUIDS[1]]),
    ],
    ids=["a MIG instance", "a UUID", "hidden", "none", "an index"],
)
def test_the_template_sees_the_devices_that_its_workers_see(play, scenario, variable, device, expected):
    variables = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    found, complaints = play(
        scenario, f'print(json.dumps(look_with("standby", device={device!r})))', **variables
    )
    assert (found, complaints) == (expected, "")


STARTS_CUDA = {  # of a GPU that NVML tells of
    "AdamW": "step(torch.optim.AdamW(net.parameters()))",
    "Adam": "step(torch.optim.Adam(net.parameters()))",
    "NAdam": "step(torch.optim.NAdam(net.parameters()))",
    "RMSprop": "step(torch.optim.RMSprop(net.parameters()))",
}
STARTS_NOTHING = {
    "cuda.is_available": "torch.cuda.is_available()",
    "cuda.device_count": "torch.cuda.device_count()",
    "accelerator.is_available": "torch.accelerator.is_available()",
    "SGD": "step(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))",
    "GradScaler": "torch.amp.GradScaler('cuda')",
    "checkpoint": (
        "torch.utils.checkpoint.checkpoint(net, torch.ones(1, 3, requires_grad=True), use_reentrant=False)"
    ),
}
TRY = """
import os, warnings
from fedexec._processes import fork_fitness
from fedexec.devices.device import hidden
put_back = fork_fitness.show_devices()
import torch, torch._dynamo, torch.utils.checkpoint
net = torch.nn.Linear(3, 2)
warnings.simplefilter("ignore")

def step(optimizer):
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()

def judge(source, hide):
    # A process of its own for each, which is what the template is.
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            if hide:
                with hidden():
                    exec(source)
            else:
                try:
                    exec(source)
                except (RuntimeError, AssertionError):
                    pass  # The stub has no CUDA behind it.
            verdict = fork_fitness.why_unfit() or ""
        except BaseException as exc:
            verdict = repr(exc)
        os.write(writing, verdict.encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    return os.fdopen(reading).read()

sources = {sources!r}
verdicts = {{name: [judge(source, False), judge(source, True)] for name, source in sources.items()}}
print(json.dumps(verdicts))
"""


@pytest.mark.thorough
def test_what_starts_cuda_in_a_template_is_noticed_and_can_be_hidden(play):
    found, _ = play(ONE_GPU, TRY.format(sources=STARTS_CUDA | STARTS_NOTHING))
    assert {name: verdicts[1] for name, verdicts in found.items()} == dict.fromkeys(found, "")
    assert {name for name, verdicts in found.items() if not verdicts[0]} == set(STARTS_NOTHING)
    assert all("it had torch start cuda" in found[name][0] for name in STARTS_CUDA)


@pytest.mark.thorough
def test_a_warm_up_that_starts_cuda_gives_way_to_fresh_interpreters(play):
    body = """
    def warm_up():
        import torch
        net = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(1, 3)).sum().backward()
        try:
            optimizer.step()
        except RuntimeError:
            pass  # The stub has no CUDA behind it.

    print(json.dumps(look_with("standby", warmup=warm_up)))
    """
    (_, in_bad_fork, _), complaints = play(ONE_GPU, body)
    assert not in_bad_fork
    assert complaints.count("Workers cannot be forked") == 1
    assert "__main__.warm_up: it had torch start cuda" in complaints


def test_a_driver_that_no_flag_tells_of_is_asked_in_a_forked_child(play, cuda_library, tmp_path):
    (tmp_path / "starts_driver.py").write_text("import ctypes\nctypes.CDLL('libcuda.so.1').cuInit(0)\n")
    body = """
    with fedexec.create_executor("standby", max_workers=1, preload=["starts_driver"]) as executor:
        print(json.dumps(executor.submit(abs, -1).result()))
    """
    found, complaints = play(None, body, libraries=[cuda_library])
    assert found == 1
    assert "imported starts_driver: it started CUDA's driver" in complaints


def test_nvml_that_the_user_has_started_goes_on_in_workers(play, tmp_path):
    (tmp_path / "watches.py").write_text(
        "import pynvml\npynvml.nvmlInit()\nHANDLE = pynvml.nvmlDeviceGetHandleByIndex(0)\n"
    )
    body = """
    def total():
        import pynvml
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).total

    with fedexec.create_executor("standby", max_workers=1, preload=["watches"]) as executor:
        print(json.dumps(executor.submit(total).result()))
    """
    assert play(TWO_GPUS, body) == (25757220864, "")
