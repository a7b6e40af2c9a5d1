"""Which process holds how much of an NVIDIA device, drivers that stop answering, MIG: a stub plays them."""

import pytest
from nvml_driver import (
    FUNCTION_NOT_FOUND,
    GPU_A,
    GPU_B,
    GPU_IS_LOST,
    M1,
    M2,
    MIG_B,
    NO_PERMISSION,
    NOT_SUPPORTED,
    TOTAL,
    UNINITIALIZED,
    UNKNOWN,
    USED,
    A,
    B,
)

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
    several = "is the beginning of the UUIDs of several devices"
    exist = f"Devices here: 0 ({A}), 1 ({B}, in MIG mode: {M1}, {M2})"
    choices = {
        M2: [M2],
        f"{M2},{M1}": [M2, M1],
        "MIG-cccc2": [M2],
        "1": [M1, M2],
        B: [M1, M2],
        "GPU-aaaa2,0": [M1, M2, A],
        "MIG-cccc": f"FEDEXEC_DEVICE='MIG-cccc': 'MIG-cccc' {several}. {exist}",
        "MIG-d": f"FEDEXEC_DEVICE='MIG-d': 'MIG-d' is not the name of a device. {exist}",
        f"1,{M1}": f"FEDEXEC_DEVICE='1,{M1}': '{M1}' names a device for the second time. {exist}",
    }
    body = f"show([uuids(choice) for choice in {list(choices)!r}])"
    assert dict(zip(choices, driver(GPU_A + MIG_B, body), strict=True)) == choices


def test_a_gpu_in_mig_mode_without_instances_is_no_device(driver):
    found, by_name = driver(f"{GPU_A}{GPU_B}mig -\n", "show([uuids(), uuids('1')])")
    assert found == [A]
    assert by_name == (
        "FEDEXEC_DEVICE='1': '1' is not the name of a device. "
        f"Devices here: 0 ({A}), 1 ({B}, in MIG mode: no instance)"
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
