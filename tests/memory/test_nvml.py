"""NVIDIA's devices, as an unmodified nvidia-ml-py tells them: of a driver that a stub plays (nvml_stub.c).

What the stub cannot show is whether a real driver's figures are true.
"""

import ctypes
import json
import os
import subprocess
import sys
import textwrap

import pytest

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


@pytest.fixture
def driver(library, tmp_path):
    """Return a function that runs code on a machine with the devices of a scenario."""

    def on(scenario, body, **env):
        path = tmp_path / "scenario"
        path.write_text(scenario)
        return run(body, LD_LIBRARY_PATH=str(library), NVML_STUB=str(path), **env)

    return on


# ---------------------------------------------------------------- figures


def test_figures_come_back_exactly(driver):
    scenario = f"{GPU_A}process 4242 5000000007\nprocess 99 1\n{GPU_B}"
    found = driver(
        scenario,
        """
        found = find_devices()
        show([[each.uuid, each.name, each.is_emulated, *figures(each)] for each in found] + messages)
        """,
    )
    assert found == [
        [A, "NVIDIA H100 80GB HBM3", False, TOTAL, USED, {"4242": 5_000_000_007, "99": 1}],
        [B, "NVIDIA A100-SXM4-40GB", False, TOTAL + 1, USED + 1, {}],
    ]


def test_figures_are_read_anew_each_time(driver):
    changed = GPU_A.replace(str(USED), str(USED + 4096)) + "process 7 4096\n"
    assert driver(
        GPU_A,
        f"""
        [found] = find_devices()
        before = figures(found)
        play({changed!r})
        show([before, figures(found)])
        """,
    ) == [[TOTAL, USED, {}], [TOTAL, USED + 4096, {"7": 4096}]]


def test_forty_processes_fit(driver):
    listed = {str(pid): pid * 1000 for pid in range(1, 41)}
    scenario = GPU_A + "".join(f"process {pid} {held}\n" for pid, held in listed.items())
    assert driver(scenario, "show(figures(find_devices()[0])[2])") == listed


def test_nvml_is_started_once(driver, tmp_path):
    trace = tmp_path / "trace"
    driver(
        GPU_A,
        "find_devices(); [found] = find_devices(); figures(found); figures(found); show(None)",
        NVML_STUB_TRACE=str(trace),
    )
    called = [line.split()[1] for line in trace.read_text().splitlines()]
    assert called.count("nvmlInitWithFlags") == 1
    assert called.count("nvmlDeviceGetHandleByUUID") == 1


FORK = """
[found] = find_devices()
before = figures(found)
r, w = os.pipe()
pid = os.fork()
if pid == 0:
    play({scenario!r})
    os.write(w, json.dumps([figures(found), uuids(), messages]).encode())
    os._exit(0)
os.close(w)
child = json.loads(os.fdopen(r).read())
os.waitpid(pid, 0)
play({scenario_before!r})
show([before, child, figures(found)])
"""


def test_a_forked_process_asks_by_itself(driver, tmp_path):
    trace, own = tmp_path / "trace", [TOTAL, USED, {"5": 50}]
    scenario = f"{GPU_A}process 5 50\n"
    body = FORK.format(scenario=scenario, scenario_before=scenario)
    assert driver(scenario, body, NVML_STUB_TRACE=str(trace)) == [own, [own, [A], []], own]
    started = [line for line in trace.read_text().splitlines() if line.endswith(" nvmlInitWithFlags")]
    assert len(started) == len(set(started)) == 2


def test_a_forked_process_that_finds_no_driver_says_none(driver):
    lost = f"{GPU_A}fail nvmlInitWithFlags {DRIVER_NOT_LOADED}\n"
    before, (child, found, messages), after = driver(GPU_A, FORK.format(scenario=lost, scenario_before=GPU_A))
    assert before == after == [TOTAL, USED, {}]
    assert (child, found) == ([None, None, None], [])
    assert "Driver Not Loaded" in messages[0]


# ---------------------------------------------------------------- which devices


def test_choices(driver):
    choices = {
        None: [A, B],
        "": [],
        "  ": [],
        "-1": [],
        "NoDevFiles": [],
        "0": [A],
        "1": [B],
        "1,0": [B, A],
        " 1 , 0 ": [B, A],
        "1,-1,0": [B],
        B: [B],
        f"{B},0": [B, A],
        "GPU-aaaa2": [B],
        "GPU-aaaa1,GPU-aaaa2": [A, B],
    }
    body = f"show([uuids(choice) for choice in {list(choices)!r}])"
    assert dict(zip(choices, driver(GPU_A + GPU_B, body), strict=True)) == choices


@pytest.mark.parametrize(
    ("choice", "name", "problem"),
    [
        ("2", "2", "is no device"),
        ("0,7", "7", "is no device"),
        ("0,,1", "", "is no device"),
        ("-2", "-2", "is no device"),
        ("cuda:0", "cuda:0", "is no device"),
        ("0:1", "0:1", "is no device"),
        ("GPU-bbbb", "GPU-bbbb", "is no device"),
        ("MIG-cccc", "MIG-cccc", "is no device"),
        (A[4:], A[4:], "is no device"),
        ("G", "G", "is no device"),
        (A + "0", A + "0", "is no device"),
        ("GPU-aaaa", "GPU-aaaa", "is the beginning of several"),
        ("0,0", "0", "is there twice"),
        (f"0,{A}", A, "is there twice"),
    ],
)
@pytest.mark.parametrize("variable", ["FEDEXEC_DEVICE", "CUDA_VISIBLE_DEVICES"])
def test_a_name_that_is_no_device_is_an_error(driver, choice, name, problem, variable):
    body = """
    try:
        show([each.uuid for each in find_devices()])
    except DeviceError as exc:
        show(str(exc))
    """
    assert driver(GPU_A + GPU_B, body, **{variable: choice}) == (
        f"{variable}={choice!r}: {name!r} {problem}. There are: 0 ({A}), 1 ({B})"
    )


def test_the_environment_chooses(driver):
    body = "show([each.uuid for each in find_devices()])"
    assert driver(GPU_A + GPU_B, body, CUDA_VISIBLE_DEVICES="1") == [B]
    assert driver(GPU_A + GPU_B, body, CUDA_VISIBLE_DEVICES="") == []
    assert driver(GPU_A + GPU_B, body, CUDA_VISIBLE_DEVICES="1", FEDEXEC_DEVICE="0") == [A]
    assert driver(GPU_A + GPU_B, body, FEDEXEC_DEVICE="none") == []


def test_a_gpu_that_is_kept_from_us_is_left_out(driver):
    scenario = f"{GPU_A}{GPU_B}fail nvmlDeviceGetHandleByIndex_v2 {NO_PERMISSION} {A}\n"
    found, by_name, messages = driver(scenario, "show([uuids(), [uuids('1'), uuids('0')], messages])")
    assert found == [B]
    assert by_name == [[B], f"FEDEXEC_DEVICE='0': '0' is no device. There are: 1 ({B})"]
    assert len(messages) == 1
    assert messages[0].startswith("WARNING GPU 0 is left out")
    assert "Insufficient Permissions" in messages[0]


# ---------------------------------------------------------------- nothing to ask

ASK = """
answers = [uuids(None), uuids(""), uuids("0", "CUDA_VISIBLE_DEVICES"), uuids("0")]
show([answers, messages])
"""


@pytest.mark.parametrize(
    ("scenario", "reason", "level"),
    [
        ("", "the NVIDIA driver reports no device", "INFO"),
        (f"{GPU_A}fail nvmlInitWithFlags {DRIVER_NOT_LOADED}\n", "Driver Not Loaded", "INFO"),
        (f"{GPU_A}fail nvmlInitWithFlags {VERSION_MISMATCH}\n", "version mismatch", "WARNING"),
        (f"{GPU_A}fail nvmlDeviceGetCount_v2 {UNKNOWN}\n", "Unknown Error", "WARNING"),
    ],
    ids=["no device", "driver not loaded", "version mismatch", "count fails"],
)
def test_a_driver_without_devices(driver, scenario, reason, level):
    answers, messages = driver(scenario, ASK)
    assert answers[:3] == [[], [], []]
    assert answers[3].startswith("FEDEXEC_DEVICE='0' asks for a device, but ")
    assert reason in answers[3]
    assert [message.split()[0] for message in messages] == [level, level]  # for "" nobody is asked
    assert all(reason in message for message in messages)


def test_without_pynvml():
    answers, messages = run("sys.modules['pynvml'] = None\n" + ASK)
    reason = "nvidia-ml-py is not installed: pip install 'fedexec[gpu]'"
    assert answers == [[], [], [], f"FEDEXEC_DEVICE='0' asks for a device, but {reason}"]
    assert messages == [f"INFO no NVIDIA device: {reason}"] * 2


def test_without_a_driver():
    pytest.importorskip("pynvml", reason="needs pynvml: pip install nvidia-ml-py")
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has a driver")
    answers, messages = run(ASK)
    assert answers[:3] == [[], [], []]
    assert "NVML Shared Library Not Found" in answers[3]
    assert [message.split()[0] for message in messages] == ["INFO", "INFO"]
    assert run("show(find_devices())") == run("show(find_devices())", CUDA_VISIBLE_DEVICES="0") == []


def test_importing_asks_nobody():
    assert run("show('pynvml' in sys.modules)") is False


# ---------------------------------------------------------------- process lists


def listed(*entries):
    return GPU_A + "".join(f"process {pid} {held}\n" for pid, held in entries)


LIST = """
[found] = find_devices()
show([figures(found), found.process_bytes(), messages])
"""


def test_a_process_whose_memory_is_not_told_is_not_there(driver):
    answer, _, messages = driver(listed((10, 100), (11, "none"), (12, 0)), LIST)
    assert answer == [TOTAL, USED, {"10": 100, "12": 0}]
    assert messages == []


def test_all_that_is_in_use_may_be_one_process(driver):
    assert driver(listed((10, USED - 1), (11, 1)), LIST)[0] == [TOTAL, USED, {"10": USED - 1, "11": 1}]


@pytest.mark.parametrize(
    "scenario",
    [
        listed((10, 100), (0, 100)),
        listed((0, "none")),
        listed((10, 100), (0xFFFFFFFF, 100)),
        listed((0xFFFFFFFF, "none"), (10, 100)),
        listed((10, 100), (11, 100), (10, 200)),
        listed((10, "none"), (10, 200)),
        listed((10, USED), (11, 1)),
        listed((10, 100), (11, 200), (12, 300)) + "early535\n",
        listed((10, 100), (11, 200)) + "early535\n",
    ],
    ids=[
        "pid 0",
        "pid 0, not told",
        "pid -1",
        "pid -1, not told",
        "a pid twice",
        "a pid twice, not told",
        "more than is in use",
        "scrambled, three",
        "scrambled, two",
    ],
)
def test_a_list_that_cannot_be_true_is_none(driver, scenario):
    answer, again, messages = driver(scenario, LIST)
    assert answer == [TOTAL, USED, None]
    assert again is None
    assert len(messages) == 1
    assert messages[0].startswith(f"WARNING NVIDIA H100 80GB HBM3 ({A}): the driver's process list cannot be")


def test_each_device_is_warned_of_once(driver):
    body = "show([[each.process_bytes() for each in find_devices() * 2], messages])"
    answers, messages = driver(f"{listed((0, 1))}{GPU_B}process 0 1\n", body)
    assert answers == [None] * 4
    assert [A in messages[0], B in messages[1], len(messages)] == [True, True, 2]


@pytest.mark.parametrize("used", [(USED, 10), (10, USED)], ids=["ended after", "began before"])
def test_processes_that_come_and_go_around_the_list_do_not_spoil_it(driver, used):
    before, after = (listed((10, 1000)).replace(str(USED), str(figure)) for figure in used)
    body = f"""
    import pynvml
    [found] = find_devices()
    ask = pynvml.nvmlDeviceGetComputeRunningProcesses
    def ask_and_change(handle):
        entries = ask(handle)
        play({after!r})
        return entries
    pynvml.nvmlDeviceGetComputeRunningProcesses = ask_and_change
    show(found.process_bytes())
    """
    assert driver(before, body) == {"10": 1000}


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("crowd", "Insufficient Size"),
        (f"fail nvmlDeviceGetComputeRunningProcesses_v3 {NOT_SUPPORTED}", "Not Supported"),
        (f"fail nvmlDeviceGetComputeRunningProcesses_v3 {NO_PERMISSION}", "Insufficient Permissions"),
        (f"fail nvmlDeviceGetComputeRunningProcesses_v3 {FUNCTION_NOT_FOUND}", "too old"),
    ],
)
def test_a_list_that_is_not_given_is_none(driver, problem, said):
    answer, again, messages = driver(f"{listed((10, 100))}{problem}\n", LIST)
    assert answer == [TOTAL, USED, None]
    assert again is None
    assert len(messages) == 1
    assert said in messages[0]


def test_a_process_is_its_own_canary(driver):
    """A list that does not show it with what torch (played here) has reserved speaks of other pids."""
    body = f"""
    import sys, types
    from fedexec.memory import self_usage
    cuda = types.SimpleNamespace(
        is_initialized=lambda: True,
        memory_allocated=lambda: 4000,
        memory_reserved=lambda: 5000,
        max_memory_allocated=lambda: 6000,
        max_memory_reserved=lambda: 7000,
    )
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    mine, answers = os.getpid(), []
    lists = [(mine, 8000)], [(mine, 4999)], [(mine + 1, 8000)], [(mine, "none")], [(mine, 8000), (0, 1)]
    for entries in lists:
        play({GPU_A!r} + "".join(f"process {{pid}} {{held}}\\n" for pid, held in entries))
        read = self_usage.read()
        answers.append([bool(read.uuid), read.held_bytes, read.peak_bytes, read.torch.peak_reserved_bytes])
    show(answers)
    """
    unknown = [True, None, None, 7000]  # the device, of which there is one, but not what it holds there
    assert driver(GPU_A, body) == [[True, 8000, 10000, 7000], *[unknown] * 4]


# ---------------------------------------------------------------- a driver that stops answering


@pytest.mark.parametrize("code", [UNINITIALIZED, GPU_IS_LOST, UNKNOWN, 12345])
def test_a_lost_device_is_unknown_never_zero(driver, code):
    scenario = f"{GPU_A}process 10 100\n{GPU_B}process 11 200\n"
    known = [[TOTAL, USED, {"10": 100}], [TOTAL + 1, USED + 1, {"11": 200}]]
    body = f"""
    found = find_devices()
    answers = [[figures(each) for each in found]]
    for lost in ("fail * {code} {A}", "fail * {code}", ""):
        play({scenario!r} + lost + "\\n")
        answers.append([figures(each) for each in found])
        figures(found[0])
    show([answers, messages])
    """
    answers, messages = driver(scenario, body)
    unknown = [None, None, None]
    assert answers == [known, [unknown, known[1]], [unknown, unknown], known]
    assert [message.partition(":")[0] for message in messages] == [
        f"WARNING NVIDIA H100 80GB HBM3 ({A})",
        f"WARNING NVIDIA A100-SXM4-40GB ({B})",
    ]


def test_a_device_without_memory_figures_is_unknown(driver):
    scenario = f"{listed((10, 100))}fail nvmlDeviceGetMemoryInfo {NOT_SUPPORTED}\n"
    answer, _, messages = driver(scenario, LIST)
    assert answer == [None, None, None]  # nothing to hold the process list against
    assert len(messages) == 1


def test_a_device_that_is_gone_when_first_asked(driver):
    scenario = f"{GPU_A}fail nvmlDeviceGetHandleByUUID {GPU_IS_LOST}\n"
    answer, _, messages = driver(scenario, LIST)
    assert answer == [None, None, None]
    assert len(messages) == 1
    assert "GPU is lost" in messages[0]


# ---------------------------------------------------------------- MIG


def test_mig_instances_are_the_devices(driver):
    scenario = GPU_A + MIG_B.replace("mig -", "process 21 3000000001\nmig -") + "process 22 9\n"
    found = driver(scenario, "show([[each.uuid, each.name, *figures(each)] for each in find_devices()])")
    assert found == [
        [A, "NVIDIA H100 80GB HBM3", TOTAL, USED, {}],
        [M1, "NVIDIA A100 MIG 1g.5gb", 5_000_000_001, 4_000_000_001, {"21": 3_000_000_001}],
        [M2, "MIG 2g", 10_000_000_001, 17, {"22": 9}],
    ]


def test_mig_choices(driver):
    exist = f"There are: 0 ({A}), 1 ({B}, in MIG mode: {M1}, {M2})"
    choices = {
        M2: [M2],
        f"{M2},{M1}": [M2, M1],
        "MIG-cccc2": [M2],
        "1": [M1, M2],
        B: [M1, M2],
        "GPU-aaaa2,0": [M1, M2, A],
        "MIG-cccc": f"FEDEXEC_DEVICE='MIG-cccc': 'MIG-cccc' is the beginning of several. {exist}",
        "MIG-d": f"FEDEXEC_DEVICE='MIG-d': 'MIG-d' is no device. {exist}",
        f"1,{M1}": f"FEDEXEC_DEVICE='1,{M1}': '{M1}' is there twice. {exist}",
    }
    body = f"show([uuids(choice) for choice in {list(choices)!r}])"
    assert dict(zip(choices, driver(GPU_A + MIG_B, body), strict=True)) == choices


def test_a_gpu_in_mig_mode_without_instances_is_no_device(driver):
    found, by_name = driver(f"{GPU_A}{GPU_B}mig -\n", "show([uuids(), uuids('1')])")
    assert found == [A]
    assert by_name == (
        f"FEDEXEC_DEVICE='1': '1' is no device. There are: 0 ({A}), 1 ({B}, in MIG mode: no instance)"
    )


def test_old_names_of_mig_instances(driver):
    one, ten = f"MIG-{B}/1/1", f"MIG-{B}/1/10"
    scenario = f"{GPU_B}mig {ten} 1000 10 ten\nmig {one} 1000 10 one\n"
    assert driver(scenario, f"show([uuids({one!r}), uuids({ten!r})])") == [[one], [ten]]


def test_an_instance_without_a_name_has_its_gpus(driver):
    scenario = f"{MIG_B}fail nvmlDeviceGetName {NOT_SUPPORTED} {M1}\n"
    found = driver(scenario, "show([each.name for each in find_devices()])")
    assert found == ["NVIDIA A100-SXM4-40GB MIG", "MIG 2g"]


def test_a_gpu_that_does_not_know_mig(driver):
    scenario = f"{GPU_A}fail nvmlDeviceGetMigMode {NOT_SUPPORTED}\n"
    assert driver(scenario, "show([uuids(), messages])") == [[A], []]
