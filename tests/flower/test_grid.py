"""ExecutorGrid: messages to nodes and their replies, also when a node fails, is late or does not exist."""

import gc
import os
import random
import threading
import time
import weakref

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedexec
from fedexec.flower import ExecutorGrid, NodeConfigError, RunRecorder
from fedexec.flower.flower_internals import ErrorCode, become_server
from flower import apps

BACKENDS = ["inline", "standby", "pool", "loky"]


@pytest.fixture(autouse=True)
def server():
    become_server(run_id=1)


@pytest.fixture(scope="module")
def standby():
    with fedexec.create_executor("standby", max_workers=2, preload=["flower.apps"]) as executor:
        yield executor


@pytest.fixture(scope="module")
def inline():
    with fedexec.create_executor("inline", max_workers=2) as executor:
        yield executor


def content(server_round=1):
    arrays = ArrayRecord([np.zeros((3, 2), np.float32), np.ones(4, np.float32)])
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": server_round})})


def train(grid, nodes=None, server_round=1, **options):
    """Make a train message for each of some nodes, of the same content, as Flower's strategies do."""
    record = content(server_round)
    chosen = grid.get_node_ids() if nodes is None else nodes
    return [Message(record, dst_node_id=node, message_type="train", **options) for node in chosen]


def metric(reply, name):
    return reply.content["metrics"][name]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_message_gets_its_reply_in_the_order_of_the_partitions(backend):
    with fedexec.create_executor(backend, max_workers=3, preload=["flower.apps"]) as executor:
        grid = ExecutorGrid(executor, "flower.apps:client", num_nodes=6, seed=0)
        nodes = grid.get_node_ids()
        messages = train(grid, random.Random(3).sample(nodes, 6))
        replies = grid.send_and_receive(messages)
    assert [metric(reply, "partition") for reply in replies] == list(range(6))
    assert [reply.metadata.src_node_id for reply in replies] == nodes
    answered = {reply.metadata.reply_to_message_id for reply in replies}
    assert answered == {message.metadata.message_id for message in messages}
    np.testing.assert_array_equal(apps.weights(replies[2])[0], np.full((3, 2), 3, np.float32))
    assert len({reply.metadata.message_id for reply in replies}) == 6


def test_node_ids_follow_from_the_seed(inline):
    ids = [ExecutorGrid(inline, apps.client, num_nodes=5, seed=seed).get_node_ids() for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert len(set(ids[0])) == 5
    assert next(iter(ExecutorGrid(inline, apps.client, num_nodes=5).get_nodes())).node_id > 0


def test_a_nodes_state_is_kept_and_its_messages_run_one_after_the_other(standby):
    grid = ExecutorGrid(standby, "flower.apps:client", num_nodes=2)
    first, second = grid.get_node_ids()
    replies = grid.send_and_receive(train(grid, [first, first, second, first]))
    counts = [(metric(reply, "partition"), metric(reply, "visits")) for reply in replies]
    assert sorted(counts) == [(0, 1), (0, 2), (0, 3), (1, 1)]
    assert metric(grid.send_and_receive(train(grid, [second]))[0], "visits") == 2


def test_configs_reach_the_node(standby):
    app = ClientApp()

    @app.query()
    def tell(message, context):
        told = {**context.node_config, **context.run_config, "id": context.node_id, "run": context.run_id}
        return Message(RecordDict({"told": ConfigRecord(told)}), reply_to=message)

    grid = ExecutorGrid(
        standby, app, num_nodes=2, run_config={"lr": 0.1},
        node_config=lambda partition: {"path": f"data/{partition}"},
    )  # fmt: skip
    node = grid.get_node_ids()[1]
    (reply,) = grid.send_and_receive([Message(RecordDict(), node, "query")])
    assert dict(reply.content["told"]) == {
        "partition-id": 1, "num-partitions": 2, "path": "data/1", "lr": 0.1, "id": node, "run": 1,
    }  # fmt: skip


def test_a_node_config_that_flower_cannot_carry_names_the_node(inline):
    grid = ExecutorGrid(inline, apps.client, num_nodes=2, node_config={"data": [1, 2]})
    with pytest.raises(NodeConfigError, match=r"partition 0 has 'data': \[1, 2\]"):
        grid.send_and_receive(train(grid))


def test_an_app_with_mods_and_one_from_a_function_travel(standby):
    seen = 7

    def mod(message, context, call_next):
        reply = call_next(message, context)
        reply.content["mod"] = MetricRecord({"seen": seen, "pid": os.getpid()})
        return reply

    app = ClientApp(mods=[mod])
    app.train()(apps.train)
    grid = ExecutorGrid(standby, app, num_nodes=1)
    (reply,) = grid.send_and_receive(train(grid))
    assert reply.content["mod"]["seen"] == 7
    assert reply.content["mod"]["pid"] != os.getpid()


# ---------------------------------------------------------------- nodes that fail


@pytest.mark.parametrize(
    ("how", "code", "reason"),
    [
        ("raise", ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ValueError: no data today"),
        ("leave", ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "SystemExit: 4"),
        ("exit", ErrorCode.CLIENT_APP_CRASHED, "exited with code 3"),
        ("kill", ErrorCode.CLIENT_APP_CRASHED, "SIGKILL"),
        ("rubbish", ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "returned a dict instead of a Message"),
        ("echo", ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "a Message that is not a reply"),
    ],
)
def test_a_node_that_fails_is_one_error_and_lives_in_the_next_round(standby, how, code, reason):
    recorder = RunRecorder()
    grid = ExecutorGrid(
        standby,
        "flower.apps:faulty",
        num_nodes=4,
        run_config={"culprits": "1", "how": how},
        recorder=recorder,
    )
    replies = grid.send_and_receive(train(grid))
    assert [reply.has_error() for reply in replies] == [False, True, False, False]
    assert replies[1].error.code == code
    assert reason in str(replies[1].error.reason)
    assert f"node {grid.get_node_ids()[1]} (partition 1)" in str(replies[1].error.reason)
    assert replies[1].metadata.src_node_id == grid.get_node_ids()[1]
    assert not any(reply.has_error() for reply in grid.send_and_receive(train(grid, server_round=2)))
    assert [[failure["client"] for failure in round_.failures] for round_ in recorder.rounds] == [[1], []]
    assert len(recorder.tasks) == 8


def test_a_task_that_takes_too_long_is_one_error():
    with fedexec.create_executor("standby", max_workers=2, timeout=4, preload=["flower.apps"]) as executor:
        grid = ExecutorGrid(
            executor, "flower.apps:faulty", num_nodes=3, run_config={"culprits": "2", "how": "hang"}
        )
        replies = grid.send_and_receive(train(grid))
    assert [reply.has_error() for reply in replies] == [False, False, True]
    assert "was ended after 4 s" in str(replies[2].error.reason)


def test_after_the_timeout_the_others_are_there_and_the_late_one_is_ended(standby):
    config = {"culprits": "0", "how": "hang"}
    grid = ExecutorGrid(standby, "flower.apps:faulty", num_nodes=3, run_config=config)
    replies = grid.send_and_receive(train(grid), timeout=5)
    assert [metric(reply, "partition") for reply in replies] == [1, 2]
    again = grid.send_and_receive(train(grid, server_round=2), timeout=30)
    assert [metric(reply, "partition") for reply in again] == [0, 1, 2]
    assert standby.stats().running == 0


def test_a_message_that_outlives_its_ttl_is_an_error(standby):
    config = {"culprits": "0", "how": "hang"}
    recorder = RunRecorder()
    grid = ExecutorGrid(standby, "flower.apps:faulty", num_nodes=2, run_config=config, recorder=recorder)
    replies = grid.send_and_receive(train(grid, ttl=5.0))
    assert replies[0].error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert "within its ttl of 5 s" in str(replies[0].error.reason)
    assert metric(replies[1], "partition") == 1
    assert len(grid.send_and_receive(train(grid, server_round=2))) == 2
    assert len(recorder.tasks) == 4, "the end of the late one was noted as well"
    with pytest.raises(ValueError, match="cannot be sent"):
        expired = train(grid, [grid.get_node_ids()[0]])[0]
        expired.metadata.created_at -= expired.metadata.ttl
        grid.push_messages([expired])


def test_a_node_that_does_not_exist_is_an_error(inline):
    grid = ExecutorGrid(inline, apps.client, num_nodes=2)
    (reply,) = grid.send_and_receive(train(grid, [12345]))
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
    assert "node 12345" in str(reply.error.reason)


def test_an_app_that_cannot_be_loaded_is_an_error_that_names_it(standby):
    for name, reason in (
        ("flower.apps:nobody", "'flower.apps:nobody' cannot be loaded: AttributeError"),
        ("flower.apps:server", "'flower.apps:server' is not a ClientApp, it is a ServerApp"),
        ("no.such.module:app", "ModuleNotFoundError"),
    ):
        grid = ExecutorGrid(standby, name, num_nodes=1)
        (reply,) = grid.send_and_receive(train(grid))
        assert reply.error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION
        assert reason in str(reply.error.reason)


def test_an_executor_that_is_shut_down_raises():
    executor = fedexec.create_executor("inline")
    grid = ExecutorGrid(executor, apps.client, num_nodes=2)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        grid.send_and_receive(train(grid))


# ---------------------------------------------------------------- push and pull, threads, memory


def test_replies_can_be_pulled_once(standby):
    grid = ExecutorGrid(standby, "flower.apps:client", num_nodes=3)
    ids = list(grid.push_messages(train(grid)))
    replies: list[Message] = []
    deadline = time.monotonic() + 30
    while len(replies) < 3 and time.monotonic() < deadline:
        replies += grid.pull_messages(ids)
    assert sorted(metric(reply, "partition") for reply in replies) == [0, 1, 2]
    assert grid.pull_messages(ids) == []


@pytest.mark.thorough_but("standby")
@pytest.mark.parametrize("backend", BACKENDS)
def test_messages_that_are_never_pulled_are_no_failures_and_keep_no_content(backend, caplog):
    with fedexec.create_executor(backend, max_workers=2) as executor:
        recorder = RunRecorder()
        grid = ExecutorGrid(executor, "flower.apps:client", num_nodes=2, recorder=recorder)
        messages = train(grid) + train(grid, server_round=2)
        contents = [weakref.ref(message.content) for message in messages]
        grid.push_messages(messages)
        deadline = time.monotonic() + 30
        while len(recorder.tasks) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        del messages
        gc.collect()
        assert [content() for content in contents] == [None] * 4
        grid.push_messages(train(grid, server_round=3))
        grid.close()  # some run now, or wait
    assert len(recorder.tasks) == 6
    assert [round_.failures for round_ in recorder.rounds] == [[], [], []]
    assert caplog.messages == []


def test_a_pushed_message_that_fails_is_a_failure_though_nobody_pulls_its_reply(inline):
    recorder = RunRecorder()
    config = {"culprits": "1", "how": "raise"}
    grid = ExecutorGrid(inline, "flower.apps:faulty", num_nodes=2, run_config=config, recorder=recorder)
    grid.push_messages(train(grid))
    deadline = time.monotonic() + 30
    while len(recorder.tasks) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    grid.close()
    assert [failure["client"] for failure in recorder.rounds[0].failures] == [1]


def test_many_threads_may_send(inline):
    grid = ExecutorGrid(inline, apps.client, num_nodes=20)
    answers = {}

    def send(node):
        (answers[node],) = grid.send_and_receive(train(grid, [node]))

    threads = [threading.Thread(target=send, args=(node,)) for node in grid.get_node_ids()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(metric(reply, "partition") for reply in answers.values()) == list(range(20))


def test_clients_that_use_the_global_generators_differ_but_repeat(standby):
    app = ClientApp()

    @app.train()
    def draw(message, context):
        return apps.reply(message, None, numbers=[random.random(), float(np.random.rand())])

    def drawn(seed):
        grid = ExecutorGrid(standby, app, num_nodes=3, seed=seed)
        return [
            tuple(metric(reply, "numbers")) for _ in range(2) for reply in grid.send_and_receive(train(grid))
        ]

    assert drawn(1) == drawn(1)
    assert len({*drawn(1), *drawn(2), *drawn(None), *drawn(None)}) == 24


def test_the_weights_of_a_round_lie_in_shared_memory_once(standby, monkeypatch):
    from fedexec._channel.segment_pool import SegmentPool

    written = []
    original = SegmentPool._place

    def place(self, layout, size, buffers, since):
        segment = original(self, layout, size, buffers, since)
        written.append((id(segment), segment.read_at))
        return segment

    monkeypatch.setattr(SegmentPool, "_place", place)
    app = ClientApp()
    app.train()(lambda message, context: apps.reply(message, None))
    grid = ExecutorGrid(standby, app, num_nodes=8)
    record = RecordDict({"arrays": ArrayRecord([np.ones(1 << 20, np.float32)])})
    grid.send_and_receive([Message(record, node, "train") for node in grid.get_node_ids()])
    assert len(written) == 8
    assert len(set(written)) == 1, "the arrays were compared or written again"


def test_what_took_longest_begins_first_and_results_stay_in_order(tmp_path):
    """The order of a round follows from the one before; unknown nodes count as the mean."""
    app = ClientApp()

    @app.query()
    def query(message, context):
        partition = context.node_config["partition-id"]
        with (tmp_path / "order").open("a") as file:
            file.write(f"{partition} ")
        time.sleep({0: 0.05, 1: 0.4, 2: 0.2}.get(partition, 0.0))
        return Message(RecordDict({"p": MetricRecord({"p": partition})}), reply_to=message)

    def ask(partitions):
        (tmp_path / "order").write_text("")
        ids = grid.get_node_ids()
        replies = grid.send_and_receive([Message(RecordDict(), ids[each], "query") for each in partitions])
        assert [reply.content["p"]["p"] for reply in replies] == sorted(partitions)
        return [int(each) for each in (tmp_path / "order").read_text().split()]

    with fedexec.create_executor("inline", max_workers=1) as executor:
        grid = ExecutorGrid(executor, app, num_nodes=5)
        become_server(1)
        assert ask([0, 1, 2]) == [0, 1, 2]
        assert ask([0, 1, 2]) == [1, 2, 0]
        assert ask([0, 3, 1, 2, 4]) == [1, 3, 4, 2, 0], "the mean of the three is 0.22 s"
        grid.close()


def test_what_nodes_need_is_checked_before_the_first_message_and_heeded(tmp_path):
    app = ClientApp()

    @app.query()
    def query(message, context):
        mark = tmp_path / str(context.node_config["partition-id"])
        mark.touch()
        time.sleep(0.2)
        most = len(list(tmp_path.iterdir()))
        mark.unlink()
        return Message(RecordDict({"n": MetricRecord({"most": most})}), reply_to=message)

    with fedexec.create_executor("inline", max_workers=4) as executor:
        with pytest.raises(fedexec.SettingsError, match=r"of partition 2: a task needs .* of memory"):
            needs = lambda partition: {"memory": 1 << (60 if partition == 2 else 20)}  # noqa: E731
            ExecutorGrid(executor, app, num_nodes=4, node_resources=needs)
        with pytest.raises(fedexec.SettingsError, match="of every node: 'gpus' is none of"):
            ExecutorGrid(executor, app, num_nodes=4, node_resources={"gpus": 1})
        become_server(1)
        half = fedexec.memory.host.available_bytes() * 2 // 3
        grid = ExecutorGrid(executor, app, num_nodes=4, node_resources={"memory": half})
        asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        replies = grid.send_and_receive(asked)
        assert [reply.content["n"]["most"] for reply in replies] == [1] * 4
        grid.close()
