"""A server among strangers, and among clients that do not answer: real gRPC, spoken by hand where need be."""

import functools
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.common import FitIns, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.proto.transport_pb2 import ClientMessage, Scalar
from flwr.proto.transport_pb2_grpc import FlowerServiceStub
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import ResWrapper
from flwr.server.superlink.fleet.grpc_bidi.grpc_client_proxy import GrpcClientProxy

import fedexec
from fedexec.flower.grpc import ClientHost, ExecutorClient, FedAvgMp, RefusedError, serve
from fedexec.flower.grpc.address import free_address
from fedexec.flower.grpc.client_auth import AdmittedClients, prove
from fedexec.flower.grpc.service import Connection
from fedexec.testing.tasks import DEADLINE, poll
from flower import jobs

SECRET = b"what both sides know of each other"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Stranger:
    """A connection that says what it is told to."""

    def __init__(self, address, channel=None):
        self._channel = channel or grpc.insecure_channel(address, UNLIMITED)
        self._says: queue.SimpleQueue[ClientMessage | None] = queue.SimpleQueue()
        self.hears = FlowerServiceStub(self._channel).Join(iter(self._says.get, None), wait_for_ready=True)

    def say(self, **properties):
        answer = ClientMessage.GetPropertiesRes()
        for name, value in properties.items():
            kind = {bool: "bool", int: "sint64", str: "string", bytes: "bytes"}[type(value)]
            answer.properties[name].CopyFrom(Scalar(**{kind: value}))
        self._says.put(ClientMessage(get_properties_res=answer))

    def send(self, message):
        self._says.put(message)

    def end(self):
        """Have the connection ended by the other side, and return how."""
        try:
            for _ in self.hears:
                pass
        except grpc.RpcError as exc:
            return exc.code()
        return grpc.StatusCode.OK

    def close(self):
        self._says.put(None)
        self.hears.cancel()
        self._channel.close()


def members(executor, address, indices, *, fit=jobs.fit, **options):
    clients = [
        ExecutorClient(
            executor,
            fit=functools.partial(fit, client=index),
            evaluate=functools.partial(jobs.evaluate, client=index),
            index=index,
            secret=SECRET,
        )
        for index in indices
    ]
    return ClientHost(clients, server_address=address, **options)


def run(on_ready, *, clients=2, rounds=1, model=None, evaluate_clients=0, numbers=10, **options):
    """Serve a federation of so many clients; `on_ready(address)` starts them."""
    address = free_address()
    initial = [np.zeros((3, 2), np.float32), np.ones(4, np.float32)] if model is None else model
    strategy = FedAvgMp(
        fit_clients=numbers,
        available_clients=clients,
        evaluate_clients=evaluate_clients,
        initial_parameters=ndarrays_to_parameters(initial),
    )
    serve(
        strategy, address=address, num_rounds=rounds, max_clients=numbers, numbers=numbers, secret=SECRET,
        on_ready=lambda: on_ready(address), **options,
    )  # fmt: skip
    return strategy


# ---------------------------------------------------------------- who does not answer


def test_a_silent_client_is_a_failure_of_its_round_and_the_others_go_on():
    go_on = threading.Event()

    def fit(parameters, config, *, client):
        if client == 1:
            go_on.wait(DEADLINE)
        return jobs.fit(parameters, config, client=client)

    averages = []
    for indices in ((0, 1, 2), (0, 2)):
        with fedexec.create_executor("inline", max_workers=3) as executor:
            host: list[ClientHost] = []

            def start(address, indices=indices, executor=executor, host=host):
                host.append(members(executor, address, indices, fit=fit))
                host[0].start()

            strategy = run(start, clients=len(indices), rounds=2, round_timeout=1)
            go_on.set()
        averages.append(parameters_to_ndarrays(strategy.parameters))
        failures = [round_.failures for round_ in strategy.rounds]
        if 1 in indices:
            assert failures == [
                [], [{"client": 1, "reason": "lost: TimeoutError: no answer within 1 s"}], [],
            ]  # fmt: skip
            assert strategy.rounds[2].clients == [0, 2]
        else:
            assert failures == [[], [], []]
    for left, right in zip(*averages, strict=True):
        np.testing.assert_array_equal(left, right)


class SlowContext:
    """A connection whose end gRPC reports late: never, here."""

    def add_callback(self, callback):
        return True

    def cancel(self):
        return True


def test_a_client_whose_connection_has_ended_is_no_member_when_its_failure_is_told():
    clients, connection = AdmittedClients(), Connection(SlowContext())
    messages = connection.ins_wrapper_iterator()
    assert clients.register(GrpcClientProxy("somebody", connection))
    next(messages)  # the server's first question
    answer = ClientMessage(get_properties_res=ClientMessage.GetPropertiesRes())
    connection.set_res_wrapper(ResWrapper(client_message=answer))
    poll(lambda: clients.num_available() == 1, "the client takes part")
    client = clients.all()["somebody"]
    with pytest.raises(TimeoutError):
        client.fit(FitIns(Parameters([], "numpy.ndarray"), {}), timeout=0.05, group_id=1)
    assert clients.num_available() == 0


STOPPING = """
import os, signal, sys
from fedexec.flower.grpc.client_auth import prove
from flower.test_strangers import SECRET, Stranger
stranger = Stranger(sys.argv[1])
challenge = next(stranger.hears).get_properties_ins.config["challenge"].string
stranger.say(client=1, proof=prove(SECRET, challenge))
sys.stdin.read()
"""


@pytest.mark.thorough
def test_a_stopped_client_that_takes_not_even_the_model_is_a_failure_of_its_round(caplog):
    """The system's buffers do not hold the model, so that sending it does not end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    caplog.set_level(logging.DEBUG, "fedexec.flower")
    model = [np.zeros(1 << 23, np.float32)]
    with fedexec.create_executor("inline", max_workers=2) as executor:
        processes = []

        def start(address):
            process = subprocess.Popen(
                [sys.executable, "-c", STOPPING, address],
                env=environment, stdin=subprocess.PIPE,
            )  # fmt: skip
            processes.append(process)
            poll(lambda: "client 1 takes part" in caplog.text, "it was admitted")
            os.kill(process.pid, signal.SIGSTOP)
            members(executor, address, [0]).start()

        try:
            strategy = run(start, clients=2, model=model, round_timeout=5)
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    (failure,) = strategy.rounds[1].failures
    assert failure == {"client": 1, "reason": "lost: TimeoutError: no answer within 5 s"}


# ---------------------------------------------------------------- who may not take part


@pytest.mark.parametrize("size", [400 << 20, 100 << 10])
def test_a_strangers_long_answer_is_refused(size):
    told = []

    def start(address):
        stranger = Stranger(address)
        next(stranger.hears)
        stranger.say(proof="x" * size)
        told.append(stranger.end())
        stranger.close()
        members(executor, address, [0]).start()

    with fedexec.create_executor("inline") as executor:
        strategy = run(start, clients=1)
    assert told[0] in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
    assert strategy.rounds[1].clients == [0]


def test_what_nobody_has_asked_for_is_not_read():
    sent: list[Any] = []

    def start(address):
        def answers():
            while len(sent) < 20_000:
                sent.append(1)
                yield message
            done.wait()

        message = ClientMessage()
        message.get_properties_res.properties["proof"].string = "x" * (50 << 10)
        done = threading.Event()
        with grpc.insecure_channel(address) as channel:
            hears = FlowerServiceStub(channel).Join(answers())
            next(hears)
            host = members(executor, address, [0])
            host.start()
            poll(lambda: sent, "it has begun to send")
            ended = threading.Event()
            hears.add_callback(ended.set)
            ended.wait(2)  # were it read, this would be enough for a gigabyte
            done.set()

    with fedexec.create_executor("inline") as executor:
        strategy = run(start, clients=1)
    assert strategy.rounds[1].clients == [0]
    assert len(sent) < 2_000, "so much the buffers of the connection hold"


@pytest.mark.thorough
def test_a_thousand_silent_strangers_keep_nobody_out():
    strangers: list[Stranger] = []

    def start(address):
        channel = grpc.insecure_channel(address)
        strangers.extend(Stranger(address, channel) for _ in range(1000))
        next(strangers[-1].hears)  # they are all there
        members(executor, address, [0, 1]).start()

    with fedexec.create_executor("inline") as executor:
        try:
            strategy = run(start, rounds=2)
        finally:
            for stranger in strangers:
                stranger.close()
    assert [round_.clients for round_ in strategy.rounds] == [[], [0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (10, "its number 10 is not among 0 to 9"),
        (-1, "-1 is not a valid client number"),
        (True, "True is not a valid client number"),
        ("0", "'0' is not a valid client number"),
        (0, "client 0 is connected already"),
    ],
)
def test_a_number_that_is_none_or_taken_is_refused_with_a_warning(index, told, caplog):
    def start(address):
        members(executor, address, [0]).start()
        poll(lambda: "client 0 takes part" in caplog.text, "it was admitted")
        wrong = members(executor, address, [index])
        wrong.start()
        reason = "another client has its number" if index == 0 else "its number is not valid"
        with pytest.raises(RefusedError, match=reason):
            wrong.join()
        members(executor, address, [1]).start()

    caplog.set_level(logging.DEBUG, "fedexec.flower")
    with fedexec.create_executor("inline") as executor:
        strategy = run(start)
    assert f"a client was refused: {told}" in caplog.text
    assert strategy.rounds[1].clients == [0, 1]


def test_one_that_is_refused_among_others_of_its_machine_is_told_at_once(caplog):
    def start(address):
        members(executor, address, [0]).start()
        poll(lambda: "client 0 takes part" in caplog.text, "it was admitted")
        mixed = members(executor, address, [0, 1])
        mixed.start()
        poll(lambda: "refused client 0 of this machine: another client has its number" in caplog.text, "told")
        mixed_hosts.append(mixed)

    mixed_hosts: list[Any] = []
    caplog.set_level(logging.DEBUG, "fedexec.flower")
    with fedexec.create_executor("inline") as executor:
        strategy = run(start)
    assert strategy.rounds[1].clients == [0, 1]
    with pytest.raises(RefusedError, match="client 0"):
        mixed_hosts[0].join()


def test_who_is_refused_for_want_of_room_comes_again(monkeypatch, caplog):
    monkeypatch.setattr("fedexec.flower.grpc.server.ROOM_AT_LEAST", 0)
    caplog.set_level(logging.DEBUG, "fedexec.flower")

    def start(address):
        early = Stranger(address)
        challenge = next(early.hears).get_properties_ins.config["challenge"].string
        early.say(proof=prove(SECRET, challenge))  # without a number
        poll(lambda: "a client without a number takes part" in caplog.text, "it was admitted")
        members(executor, address, range(10)).start()
        poll(
            lambda: "a client was refused: 10 clients take part already" in caplog.text,
            "there was no room for one",
        )
        early.close()
        poll(lambda: "a client without a number takes part no more" in caplog.text, "the server knows")

    with fedexec.create_executor("inline") as executor:
        strategy = run(start, clients=10)
    assert strategy.rounds[1].clients == list(range(10))
    assert strategy.rounds[1].failures == []


def test_where_there_is_never_room_a_client_says_so(monkeypatch, caplog):
    monkeypatch.setattr("fedexec.flower.grpc.server.ROOM_AT_LEAST", 0)
    caplog.set_level(logging.DEBUG, "fedexec.flower")

    def start(address):
        everybody = members(executor, address, range(10))
        everybody.start()
        poll(lambda: caplog.text.count("takes part") == 10, "all were admitted")
        late = ClientHost(
            [ExecutorClient(executor, fit=functools.partial(jobs.fit, client=10), secret=SECRET)],
            server_address=address, connect_timeout=0.5,
        )  # fmt: skip
        late.start()
        with pytest.raises(RefusedError, match="no room"):
            late.join()

    with fedexec.create_executor("inline") as executor:
        run(start, clients=10)


def test_a_client_that_expects_tls_of_a_server_without_it_is_told_in_words():
    failures = []

    def start(address):
        with fedexec.create_executor("inline") as executor:
            host = members(executor, address, [0], root_certificates=b"no certificate", connect_timeout=5)
            host.start()
            with pytest.raises(ConnectionError) as caught:
                host.join()
            failures.append(str(caught.value))
            members(executor, address, [0]).start()
            run_is_over.wait(DEADLINE)

    run_is_over = threading.Event()
    starting = []

    def start_apart(address):
        starting.append(threading.Thread(target=start, args=(address,)))
        starting[0].start()

    run(start_apart, clients=1)
    run_is_over.set()
    starting[0].join(DEADLINE)
    assert "lost the server at 127.0.0.1:" in failures[0]
    assert "UNAVAILABLE: " in failures[0]
    assert "only one side uses TLS (server: --certificates, client: --root-certificates)" in failures[0]
