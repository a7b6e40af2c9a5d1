"""`offload`: a function of a Flower app in a worker, its node's state there and back."""

import os
import signal
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedexec
from fedexec.errors import SettingsError
from fedexec.flower import offload, offloading
from fedexec.flower.flower_internals import become_server
from flower import apps

ARRAYS = [np.arange(6, dtype=np.float32).reshape(3, 2), np.ones(4, np.float32)]


@pytest.fixture(scope="module")
def executor():
    with fedexec.create_executor("standby", max_workers=1, preload=["flower.apps"]) as executor:
        yield executor


def message(arrays=ARRAYS):
    become_server(run_id=1)
    record = RecordDict({"arrays": ArrayRecord(list(arrays))})
    return Message(record, dst_node_id=7, message_type="train")


def context(**run_config):
    return Context(
        run_id=1, node_id=7, node_config={"partition-id": 3}, state=RecordDict(), run_config=run_config
    )


def test_a_client_app_trains_in_a_fresh_process_and_keeps_its_state(executor):
    app = ClientApp()

    @app.train()
    @offload(executor=executor)
    def train(message: Message, context: Context) -> Message:
        return apps.reply(message, apps.weights(message), pid=os.getpid(), visits=apps.visits(context))

    node = context()
    state = node.state
    replies = [app(message(), node) for _ in range(3)]
    assert [reply.content["metrics"]["visits"] for reply in replies] == [1, 2, 3]
    assert node.state is state
    assert len({reply.content["metrics"]["pid"] for reply in replies} - {os.getpid()}) == 3
    assert replies[0].metadata.dst_node_id == message().metadata.src_node_id
    for sent, received in zip(ARRAYS, apps.weights(replies[0]), strict=True):
        np.testing.assert_array_equal(received, sent)


def test_records_that_have_computed_their_ids_travel(executor):
    sent = message()
    assert sent.content.object_id  # from here on its arrays cannot be pickled
    received = offload(apps.weights, executor=executor)(sent)
    np.testing.assert_array_equal(received[0], ARRAYS[0])
    copied = offload(lambda message: message.content, executor=executor)(sent)
    assert copied.object_id == sent.content.object_id


def test_mods_go_around_it(executor):
    seen = []

    def mod(message, context, call_next):
        seen.append(message.metadata.message_type)
        return call_next(message, context)

    app = ClientApp(mods=[mod])
    app.train()(offload(apps.train, executor=executor))
    sent = message()
    sent.content["config"] = ConfigRecord({"server-round": 1})
    assert app(sent, context()).content["metrics"]["partition"] == 3
    assert seen == ["train"]


def test_an_evaluate_fn_of_either_signature(executor):
    by_message = offload(apps.evaluate_globally, executor=executor)
    metrics = by_message(1, ArrayRecord(ARRAYS))
    assert isinstance(metrics, MetricRecord)
    assert metrics["loss"] == 19
    assert metrics["pid"] != os.getpid()

    factor = 2.0
    arrays = [array.copy() for array in ARRAYS] + [np.zeros(1 << 20, np.float32), np.zeros(0)]

    @offload(executor=executor)
    def by_grpc(server_round, arrays, config):
        arrays[0] += 1  # a copy
        return factor * server_round, {"sum": float(arrays[0].sum()), **config}

    assert by_grpc(3, arrays, {"a": 1}) == (6.0, {"sum": 21.0, "a": 1})
    np.testing.assert_array_equal(arrays[0], ARRAYS[0])


def test_what_it_raises_arrives_and_the_state_stays(executor):
    @offload(executor=executor)
    def fail(context):
        apps.visits(context)
        raise ValueError("no data today")

    node = context()
    with pytest.raises(ValueError, match="no data today"):
        fail(node)
    assert len(node.state) == 0


def test_a_death_is_an_error_of_that_call_alone(executor):
    with pytest.raises(fedexec.WorkerDiedError, match="SIGKILL"):
        offload(lambda: os.kill(os.getpid(), signal.SIGKILL), executor=executor)()
    assert offload(lambda: 42, executor=executor)() == 42


def test_inside_a_worker_it_just_runs(executor):
    offloaded: Any = apps.offloaded_train
    answer = offload(offloaded.__wrapped__, executor=executor)(message(), context())
    metrics = answer.content["metrics"]
    assert metrics["inner"] == metrics["pid"] != os.getpid()


def test_without_isolation_it_is_a_plain_call():
    with fedexec.create_executor("inline", max_workers=1) as executor:
        node = context()
        assert offload(apps.visits, executor=executor)(node) == 1
        assert node.state["visits"]["count"] == 1


def script(text, *args, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEDEXEC_")}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text), *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        env=clean | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )  # fmt: skip


CHOICE = """
    import os
    from flwr.app import Context, RecordDict
    from fedexec.flower import offload

    @offload
    def where(context):
        return os.getpid()

    config = {"executor-backend": "inline"}
    print(where(Context(1, 7, {}, RecordDict(), config)) == os.getpid())
"""


@pytest.mark.parametrize(("environment", "here"), [({}, "True"), ({"FEDEXEC_BACKEND": "standby"}, "False")])
def test_the_apps_config_chooses_the_executor_and_the_environment_wins(environment, here):
    output, errors = script(CHOICE, **environment).communicate(timeout=60)
    assert output.strip() == here, errors


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(SettingsError, match=r"'executor-backnd'.*'executor-backend'"):
        offload(apps.visits)(context(**{"executor-backnd": "inline"}))


def test_ctrl_c_ends_the_worker():
    waiting = script(
        """
        import time
        from fedexec.flower import offload

        @offload
        def hang():
            print("hanging", flush=True)
            time.sleep(3600)

        hang()
        """
    )
    assert waiting.stdout.readline().strip() == "hanging"
    family = psutil.Process(waiting.pid).children(recursive=True)
    os.killpg(waiting.pid, signal.SIGINT)
    try:
        _, errors = waiting.communicate(timeout=30)
    finally:
        waiting.kill()
    assert "KeyboardInterrupt" in errors
    assert psutil.wait_procs(family, timeout=5)[1] == []


def test_a_function_can_be_offloaded_while_the_executor_starts_in_another_thread():
    with offloading._lock:  # held as long as that takes
        assert callable(offload(len))
