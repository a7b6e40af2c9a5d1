"""NVIDIA's devices, as an unmodified nvidia-ml-py tells them: of a driver that a stub plays (nvml_stub.c).

What the stub cannot show is whether a real driver's figures are true.
"""

import ctypes

import pytest
from nvml_driver import (
    DRIVER_NOT_LOADED,
    GPU_A,
    GPU_B,
    NO_PERMISSION,
    TOTAL,
    UNKNOWN,
    USED,
    VERSION_MISMATCH,
    A,
    B,
    run,
)

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


@pytest.mark.thorough_but("GPU-aaaa", "0,,1", "0,0")
@pytest.mark.parametrize(
    ("choice", "name", "problem"),
    [
        ("2", "2", "is not the name of a device"),
        ("0,7", "7", "is not the name of a device"),
        ("0,,1", "", "is not the name of a device"),
        ("-2", "-2", "is not the name of a device"),
        ("cuda:0", "cuda:0", "is not the name of a device"),
        ("0:1", "0:1", "is not the name of a device"),
        ("GPU-bbbb", "GPU-bbbb", "is not the name of a device"),
        ("MIG-cccc", "MIG-cccc", "is not the name of a device"),
        (A[4:], A[4:], "is not the name of a device"),
        ("G", "G", "is not the name of a device"),
        (A + "0", A + "0", "is not the name of a device"),
        ("GPU-aaaa", "GPU-aaaa", "is the beginning of the UUIDs of several devices"),
        ("0,0", "0", "names a device for the second time"),
        (f"0,{A}", A, "names a device for the second time"),
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
        f"{variable}={choice!r}: {name!r} {problem}. Devices here: 0 ({A}), 1 ({B})"
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
    assert by_name == [[B], f"FEDEXEC_DEVICE='0': '0' is not the name of a device. Devices here: 1 ({B})"]
    assert len(messages) == 1
    assert messages[0].startswith("WARNING GPU 0 is not used")
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
    assert messages == [f"INFO there is no NVIDIA device that can be used: {reason}"] * 2


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
    assert answers[3].endswith("there is no NVIDIA driver: libnvidia-ml.so.1 is not found")
    assert [message.split()[0] for message in messages] == ["INFO", "INFO"]
    assert run("show(find_devices())") == run("show(find_devices())", CUDA_VISIBLE_DEVICES="0") == []


def test_importing_asks_nobody():
    assert run("show('pynvml' in sys.modules)") is False
