"""Nodes that come, go, hang and are cut off, with an engine of the tests and real node agents."""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import toy_engine

import fedexec
from fedexec import _registry
from fedexec._cli import main
from fedexec.cluster import node_agent, nodes, versions
from fedexec.testing.tasks import DEADLINE, poll

TIMEOUT = 4.0


@pytest.fixture
def machines(monkeypatch):
    """Return the machines of the toy engine, of which there is none at first."""
    info = _registry.BackendInfo("toy", "toy_engine:ToyBackend", "for tests", fedexec.Capability.REMOTE)
    monkeypatch.setitem(_registry._BUILTIN, "toy", info)
    toy_engine.MACHINES.up.clear()
    yield toy_engine.MACHINES
    for machine in list(toy_engine.MACHINES.up.values()):
        toy_engine.MACHINES.remove(machine)


def use_much(nbytes):
    data = bytearray(b"x") * nbytes
    time.sleep(30)
    return len(data)


def note(directory, number, seconds):
    """Leave a file for each run of a task, then take a while."""
    run = Path(directory, f"{number}-{os.getpid()}")
    run.touch()
    time.sleep(seconds)
    Path(directory, f"{run.name}-done").touch()
    return number


once_noted = fedexec.once(lambda directory, number, seconds: note(directory, number, seconds))


def runs(directory, number, suffix=""):
    return [
        path for path in Path(directory).glob(f"{number}-*") if path.name.endswith("done") == bool(suffix)
    ]


def test_tasks_use_all_nodes_and_say_on_which_they_ran(machines):
    machines.add(cores=2)
    machines.add(cores=1)
    with fedexec.create_executor("toy") as executor:
        assert sorted(node.slots for node in executor.nodes()) == [1, 2]
        begun = time.monotonic()
        futures = [executor.submit(time.sleep, 1) for _ in range(3)]
        for future in futures:
            future.result(DEADLINE)
        assert time.monotonic() - begun < 1.9, "three slots run three tasks at once"
        assert {future.usage and future.usage.node for future in futures} == {executor.nodes()[0].host}
    assert [machine.calls.count("run") for machine in machines.up.values()] == [2, 1]


def test_tasks_of_a_node_that_dies_run_on_another(machines, tmp_path):
    first, second = machines.add(), machines.add()
    with fedexec.create_executor("toy", retries=1) as executor:
        futures = [executor.submit(note, tmp_path, number, 0.3) for number in range(12)]
        poll(lambda: len(list(tmp_path.iterdir())) >= 4, "both nodes run tasks")
        machines.remove(first)
        assert [future.result(DEADLINE) for future in futures] == list(range(12))
        assert executor.stats().worker_deaths == executor.stats().retries <= 2
    for number in range(12):
        assert len(runs(tmp_path, number, "done")) == 1, "done once"
    assert second.calls.count("run") >= 10


def test_without_retries_a_lost_node_is_told(machines, tmp_path):
    machine = machines.add()
    machines.add(cores=1)
    with fedexec.create_executor("toy", max_workers=2) as executor:
        futures = [executor.submit(note, tmp_path, number, 20) for number in range(2)]
        poll(lambda: len(list(tmp_path.iterdir())) == 2, "both run")
        machines.remove(machine)
        errors = [future.exception(DEADLINE) for future in futures if machine_of(future, machine)]
        lost = [error for error in errors if error is not None]
        executor.kill_workers()
    assert lost
    for error in lost:
        assert isinstance(error, fedexec.NodeLostError)
        assert isinstance(error, fedexec.WorkerDiedError)
        assert "note" in str(error)


def machine_of(future, machine):
    try:
        return isinstance(future.exception(3), fedexec.NodeLostError)
    except TimeoutError:
        return False


def test_what_must_not_run_twice_does_not(machines, tmp_path):
    first = machines.add(cores=1)
    with fedexec.create_executor("toy", retries=3) as executor:
        future = executor.submit(once_noted, tmp_path, 0, 20)
        poll(lambda: runs(tmp_path, 0), "it runs")
        machines.add()
        machines.remove(first)
        with pytest.raises(fedexec.NodeLostError):
            future.result(DEADLINE)
    assert len(runs(tmp_path, 0)) == 1


def test_a_node_that_is_cut_off_ends_its_workers_before_they_run_elsewhere(machines, tmp_path):
    first = machines.add(cores=1)
    with fedexec.create_executor("toy", retries=5, node_timeout=TIMEOUT) as executor:
        future = executor.submit(write_the_time, tmp_path)
        poll(lambda: list(tmp_path.iterdir()), "it runs")
        (old,) = tmp_path.iterdir()
        first.is_cut = True
        machines.add(cores=1)
        poll(lambda: len(list(tmp_path.iterdir())) == 2, "it runs elsewhere")
        (new,) = set(tmp_path.iterdir()) - {old}
        begun = float(new.read_text().split()[0])
        assert float(old.read_text().split()[-1]) < begun, "the old run had ended before the new one began"
        first.reconnect()
        executor.end(future)
    poll(lambda: first.agents[0].node_agent is not None, "reconnected")


def write_the_time(directory):
    """Write the time again and again, until the worker ends."""
    with Path(directory, str(os.getpid())).open("w") as file:
        while True:
            file.write(f"{time.time()} ")
            file.flush()
            time.sleep(0.02)


def test_a_short_cut_loses_nothing(machines, tmp_path):
    machine = machines.add(cores=1)
    with fedexec.create_executor("toy", node_timeout=10) as executor:
        future = executor.submit(note, tmp_path, 0, 3)
        poll(lambda: runs(tmp_path, 0), "it runs")
        machine.is_cut = True
        threading.Timer(2, machine.reconnect).start()
        assert future.result(DEADLINE) == 0
    assert len(runs(tmp_path, 0)) == 1


def test_a_node_that_comes_runs_tasks_that_wait(machines):
    machines.add(cores=1)
    with fedexec.create_executor("toy") as executor:
        futures = [executor.submit(time.sleep, 0.5) for _ in range(12)]
        begun = time.monotonic()
        new = machines.add(cores=4)
        poll(lambda: new.calls.count("run") >= 3, "the new node runs tasks", seconds=5)
        assert time.monotonic() - begun < 5
        for future in futures:
            future.result(DEADLINE)


def test_an_agent_that_dies_is_replaced_on_its_machine(machines):
    machine = machines.add(cores=1)
    with fedexec.create_executor("toy", retries=1) as executor:
        assert executor.submit(abs, -1).result(DEADLINE) == 1
        machine.kill()
        poll(lambda: len(machine.agents) == 2, "there is a new agent")
        assert executor.submit(abs, -2).result(DEADLINE) == 2


def test_an_agent_that_the_engine_has_made_anew_refuses_to_run_anything():
    agent: Any = node_agent.NodeAgent()
    value, error = asyncio.run(agent.run("session", None))
    assert value is None
    assert b"StaleAgentError" in error


def test_large_arrays_go_to_a_node_once(machines):
    first, second = machines.add(), machines.add()
    weights = np.ones(1 << 20)
    with fedexec.create_executor("toy") as executor:
        assert list(executor.map(np.sum, [weights] * 12)) == [float(1 << 20)] * 12
        assert [machine.calls.count("keep") for machine in (first, second)] == [1, 1]
        weights[0] = 5.0
        assert list(executor.map(np.sum, [weights] * 4)) == [float((1 << 20) + 4)] * 4
        assert first.calls.count("keep") + second.calls.count("keep") in (3, 4)
        result = executor.submit(np.add, weights, 1).result(DEADLINE)
        result += 1  # a result can be written to
        assert result[-1] == 3.0


def test_what_all_tasks_have_goes_once_whatever_else_each_has(machines):
    machine = machines.add()
    weights, own = np.ones(1 << 18), [np.full(1 << 18, number) for number in range(3)]
    small = [np.zeros(1 << 14) for _ in range(20)]  # each is small, together they are not
    with fedexec.create_executor("toy") as executor:
        results = list(executor.map(added, [weights] * 6, own * 2, [small] * 6))
    assert results == [1.0, 2.0, 3.0] * 2
    assert machine.calls.count("keep") == 5, "the weights, three arrays, and the small ones"


def added(weights, own, small):
    return float(weights[-1] + own[-1] + small[-1][-1])


def test_nodes_need_a_backend_of_one_machine_with_processes(machines):
    for name in ("inline", "toy"):
        with pytest.raises(fedexec.SettingsError, match="node_backend must"):
            fedexec.create_executor("toy", node_backend=name)


def test_a_time_limit_shorter_than_two_signs_of_life_is_refused(machines):
    with pytest.raises(fedexec.SettingsError, match="node_timeout must be at least 2 seconds"):
        fedexec.create_executor("toy", node_timeout=0.1)


def test_footprints_and_the_machine_of_a_death_are_known_at_once(machines):
    machines.add(cores=1)
    with fedexec.create_executor("toy", max_workers="auto") as executor:
        executor.submit(abs, -1).result(DEADLINE)
        (footprint,) = executor.footprints().values()
        assert footprint.host_bytes
        error = executor.submit(os._exit, 3).exception(DEADLINE)
    assert executor.nodes() == ()
    assert isinstance(error, fedexec.WorkerDiedError)
    assert f"on node {error.node}" in str(error)
    assert "(toy-" in error.node


def test_a_node_that_hangs_holds_up_neither_the_start_nor_the_end(machines, caplog, monkeypatch):
    monkeypatch.setattr("fedexec.cluster.nodes.PATIENCE_SECONDS", 0.5)
    machines.add()
    hanging = machines.add()
    hanging.answers.clear()
    begun = time.monotonic()
    with fedexec.create_executor("toy") as executor:
        assert list(executor.map(abs, range(4))) == [0, 1, 2, 3]
        assert [node.id for node in executor.nodes()] != [hanging.name]
        started = time.monotonic()
    assert started - begun < 20
    assert time.monotonic() - started < 4
    hanging.answers.set()
    poll(lambda: "fedexec-node" not in [each.name for each in threading.enumerate()], "the engine went on")
    assert hanging.agents
    assert "open" not in hanging.calls
    assert f"node {hanging.name} is not ready yet; tasks begin without it" in caplog.text


def test_errors_of_nodes_arrive_as_they_are(machines):
    machines.add()
    with fedexec.create_executor("toy", memory_limit="300MiB", enforce_limits=True) as executor:
        error = executor.submit(use_much, 800_000_000).exception(DEADLINE)
    assert isinstance(error, fedexec.WorkerMemoryError)
    assert isinstance(error, MemoryError)
    assert "on node" not in error.task
    assert error.node


def test_nodes_and_not_the_caller_decide_what_tasks_need(machines, monkeypatch):
    machines.add(cores=2)
    monkeypatch.setattr("fedexec.memory.host.available_bytes", lambda: 1)
    with fedexec.create_executor("toy") as executor:
        asking = executor.with_options(memory="10MiB")
        begun = time.monotonic()
        for future in [asking.submit(time.sleep, 2.0) for _ in range(2)]:
            future.result(DEADLINE)
        assert time.monotonic() - begun < 3.8, "both at once"


def raise_at_warmup():
    raise KeyError("no data")


def test_a_warmup_that_fails_is_named(machines):
    machines.add()
    with pytest.raises(fedexec.PreloadError, match=r"test_nodes\.raise_at_warmup.*KeyError"):
        fedexec.create_executor("toy", warmup=raise_at_warmup)


def test_contents_that_no_task_needs_are_forgotten(machines, monkeypatch):
    monkeypatch.setattr("fedexec.cluster.contents.IDLE_SECONDS", 0.2)
    machine = machines.add()
    with fedexec.create_executor("toy") as executor:
        for number in range(3):
            executor.submit(np.sum, np.full(1 << 20, number)).result(DEADLINE)
        backend: Any = executor._scheduler._backend
        poll(lambda: not backend._contents.alive()[1], "they are forgotten")
    assert machine.calls.count("keep") == 3


def test_what_tasks_print_and_what_nodes_log_arrives(machines, capfd, caplog):
    machines.add()
    machines.add()
    with caplog.at_level(logging.INFO), fedexec.create_executor("toy", max_workers=2) as executor:
        list(executor.map(print, ["first", "second"]))
        executor.submit(os.write, 2, b"to stderr\n").result(DEADLINE)
    out, err = capfd.readouterr()
    assert sorted(out.split()) == ["first", "second"]
    assert "to stderr\n" in err
    settings = [record for record in caplog.records if "backend=standby" in record.getMessage()]
    assert [record.levelname for record in settings].count("INFO") == 1, "what two nodes say is told once"


def test_a_module_that_a_node_does_not_have_is_named(machines, tmp_path, monkeypatch):
    machines.add()
    with fedexec.create_executor("toy") as executor:
        (tmp_path / "only_here.py").write_text("def f(): return 1\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        only_here = __import__("only_here")
        assert executor.submit(only_here.f).result(DEADLINE) == 1, "nodes have the directory"
        (tmp_path / "only_here.py").unlink()
        error = executor.submit(only_here.f).exception(DEADLINE)
    assert isinstance(error, fedexec.UnpickleError)
    assert "cannot import 'only_here'" in error.__notes__[-1]


def test_a_node_with_another_fedexec_is_not_used(machines, monkeypatch):
    machines.add()
    monkeypatch.setattr(versions, "versions", lambda: {"fedexec": "9.9", "python": "3.11.1"})
    with pytest.raises(fedexec.BackendUnavailableError, match=r"fedexec 0\.\S+ \(here 9\.9\)"):
        fedexec.create_executor("toy")


def test_a_node_with_another_numpy_is_told(machines, monkeypatch, caplog):
    machines.add()
    here = versions.versions() | {"numpy": "0.1"}
    monkeypatch.setattr(versions, "versions", lambda: here)
    with fedexec.create_executor("toy") as executor:
        assert executor.submit(abs, -1).result(DEADLINE) == 1
    assert any("(here 0.1)" in record.getMessage() for record in caplog.records)


def test_a_cluster_without_nodes_is_an_error_after_a_stated_wait(machines, monkeypatch, caplog):
    monkeypatch.setattr(nodes, "START_SECONDS", 1.0)
    monkeypatch.setattr(nodes, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(fedexec.BackendUnavailableError, match="no node after 1 s"):
        fedexec.create_executor("toy")
    assert any("no node yet" in record.getMessage() for record in caplog.records)


def test_if_all_nodes_are_lost_tasks_wait_and_then_fail(machines, monkeypatch):
    monkeypatch.setattr(nodes, "NO_NODE_SECONDS", 2.0)
    machine = machines.add()
    with fedexec.create_executor("toy") as executor:
        executor.submit(abs, -1).result(DEADLINE)
        machines.remove(machine)
        with pytest.raises(fedexec.NodeLostError):
            executor.submit(abs, -1).result(DEADLINE)


def test_the_command_lists_the_nodes(machines, capsys):
    machines.add(cores=3)
    assert main(["nodes", "--backend", "toy", "--json"]) == 0
    (node,) = json.loads(capsys.readouterr().out)
    assert node["slots"] == 3
    assert node["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert main(["nodes", "--backend", "toy"]) == 0
    assert "1 node, 3 tasks at once" in capsys.readouterr().out


def test_the_command_needs_a_cluster(capsys):
    assert main(["nodes", "--backend", "inline"]) != 0
    assert "this machine only" in capsys.readouterr().err


def test_doctor_looks_at_the_nodes(machines, monkeypatch, capsys, tmp_path):
    machines.add(cores=3)
    monkeypatch.setenv("FEDEXEC_BACKEND", "toy")
    main(["doctor"])
    assert "3 tasks at once" in capsys.readouterr().out


def test_an_agent_that_is_stopped_ends_with_the_executor(machines, tmp_path):
    machine = machines.add(cores=1)
    with fedexec.create_executor("toy", node_timeout=TIMEOUT) as executor:
        executor.submit(abs, -1).result(DEADLINE)
        pid = machine.agents[0].node_agent._connection._process.pid
        os.kill(pid, signal.SIGSTOP)
    poll(lambda: not psutil.pid_exists(pid), "it has ended")
