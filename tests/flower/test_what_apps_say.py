"""What an app says is seen: its clients' output, their failures, and whatever its strategy reports."""

import logging
import os
import re
import sys
import threading
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status
from flwr.common.logger import log
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import fedexec
from fedexec.flower import simulate
from fedexec.flower.simulation.client_metrics import metrics_of_replies, weighted_means
from fedexec.flower.simulation.client_output import marked
from fedexec.flower.simulation.failure_log import FailureLog

ARRAYS = ArrayRecord([np.zeros(2, np.float32)])


def say(partition):
    print("printed by", partition)
    print("two lines\nat once", end="")
    sys.stderr.write("an error of ")
    sys.stderr.write(f"{partition}\n")
    log(logging.WARNING, "logged by %s", partition)


def client_app():
    app = ClientApp()

    @app.train()
    def train(message, context):
        partition = context.node_config["partition-id"]
        say(partition)
        if partition == 0 and context.run_config["fails"]:
            raise ValueError(f"no data in round {message.content['config']['server-round']}")
        metrics: dict[str, Any] = {"num-examples": 1 + partition, "train_loss": float(partition)}
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        metrics: dict[str, Any] = {"num-examples": 1, "eval_auc": float(context.node_config["partition-id"])}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app


def server_app(kind=FedAvg, rounds=2):
    app = ServerApp()

    @app.main()
    def main(grid, context):
        kind().start(
            grid, ARRAYS, num_rounds=rounds, evaluate_fn=lambda number, arrays: MetricRecord({"auc": 0.5})
        )

    return app


def run(server, *, fails=False, backend="inline", nodes=3):
    with fedexec.create_executor(backend, max_workers=2) as executor:
        return simulate(server, client_app(), num_nodes=nodes, executor=executor, run_config={"fails": fails})


@pytest.mark.thorough_but("standby")
@pytest.mark.parametrize("backend", ["standby", "pool", "process", "loky"])
def test_each_line_of_a_client_is_marked_and_whole(capfd, backend):
    run(server_app(rounds=1), backend=backend)
    out, err = capfd.readouterr()
    expected = [
        f"[partition {n}] {line}" for n in range(3) for line in ("at once", f"printed by {n}", "two lines")
    ]
    assert sorted(out.splitlines()) == expected
    for partition in range(3):
        assert f"[partition {partition}] an error of {partition}\n" in err
        assert re.search(rf"\[partition {partition}\] .*logged by {partition}\n", err)


def test_a_stream_is_put_back_and_a_line_that_is_not_whole_is_written_at_the_end(capsys):
    before = sys.stdout, sys.stderr
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("mine").addHandler(handler)
    try:
        with marked(7):
            print("10%", end="\r")
            print("20%", end="\r")
            print("begun", end="")
            assert sys.stdout.isatty() is before[0].isatty()
            assert handler.stream is sys.stderr
        assert (sys.stdout, sys.stderr, handler.stream) == (*before, before[1])
    finally:
        logging.getLogger("mine").removeHandler(handler)
    assert capsys.readouterr().out == "[partition 7] 10%\r[partition 7] 20%\r[partition 7] begun\n"


def test_lines_of_threads_and_forked_processes_are_whole(capfd):
    def talk(name):
        for _ in range(200):
            for letter in name:
                sys.stdout.write(letter * 3)
            print()

    with marked(2):
        threads = [threading.Thread(target=talk, args=(name,)) for name in ("abcd", "wxyz")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("of the parent ", end="")
        if os.fork() == 0:
            print("of the child", end="")
            sys.stdout.flush()
            os._exit(0)
        os.wait()
    lines = capfd.readouterr().out.splitlines()
    assert lines[-2:] == ["[partition 2] of the parent of the child", "[partition 2] of the parent "]
    assert sorted(lines[:-2]) == ["[partition 2] aaabbbcccddd"] * 200 + ["[partition 2] wwwxxxyyyzzz"] * 200


def test_a_failure_is_logged_with_its_place_and_traceback_at_the_first_time_only(caplog):
    caplog.set_level(logging.INFO, "fedexec")
    run(server_app(), fails=True)
    first, second = (record for record in caplog.records if record.name == "fedexec.flower")
    assert (first.levelno, second.levelno) == (logging.WARNING, logging.INFO)
    lines = first.getMessage().splitlines()
    assert re.fullmatch(
        r"node \d+ \(partition 0\): ValueError: no data in round 1 \(.*\.py, line \d+\)", lines[0]
    )
    assert lines[1:3] == ["Traceback (most recent call last):", lines[2]]
    assert re.match(r'  File ".*test_what_apps_say\.py", line \d+, in train', lines[2]), (
        "the app's own code first"
    )
    assert lines[-1] == "ValueError: no data in round 1"
    assert "\n" not in second.getMessage()


def test_failures_that_differ_in_numbers_are_of_one_kind_and_others_are_not(caplog):
    caplog.set_level(logging.INFO, "fedexec")
    failures = FailureLog()
    for reason in ("Worker 12 died", "Worker 13 died", "ValueError: other"):
        failures.note("node 1", reason, "")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]


def test_what_clients_measure_in_training_and_evaluation_is_in_the_rounds():
    rounds = run(server_app()).rounds
    assert [current.metrics for current in rounds] == [{"auc": 0.5}] * 3
    assert rounds[1].train_metrics == {"train_loss": pytest.approx(8 / 6)}
    assert rounds[1].client_metrics == {"eval_auc": pytest.approx(1.0)}


class AggregatesNothing(FedAvg):
    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, replies)[0], None

    def aggregate_evaluate(self, server_round, replies):
        self.number = len(list(replies))


class TakesOneByOne(AggregatesNothing):
    def start(self, grid, *args, **kwargs):
        return super().start(grid, *args, **kwargs)

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, (reply for reply in replies))


@pytest.mark.parametrize("kind", [AggregatesNothing, TakesOneByOne])
def test_what_a_strategy_does_not_aggregate_is_the_clients_mean(kind):
    current = run(server_app(kind)).rounds[-1]
    assert current.train_metrics == {"train_loss": pytest.approx(8 / 6)}
    assert current.client_metrics == {"eval_auc": pytest.approx(1.0)}


def test_means_of_an_older_app_are_weighted_and_leave_out_what_is_no_number():
    status = Status(Code.OK, "")
    replies = [
        (None, EvaluateRes(status, 0.5, 1, {"accuracy": 0.0, "name": "a", "is_best": True})),
        (None, EvaluateRes(status, 0.5, 3, {"accuracy": 1.0, "huge": 10**400})),
        (None, FitRes(status, Parameters([], ""), 0, {"accuracy": 5.0})),
    ]
    assert weighted_means(metrics_of_replies(replies)) == {"accuracy": 0.75}
