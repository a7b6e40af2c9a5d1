"""Who may take part: real Flower, real gRPC, clients with the secret, with another, with none."""

import functools

import numpy as np
import pytest
from flwr.client import start_client
from flwr.common import ndarrays_to_parameters

import fedexec
from fedexec.flower.grpc import ClientHost, ExecutorClient, FedAvgMp, RefusedError, serve
from fedexec.flower.grpc.address import free_address
from fedexec.flower.grpc.client_auth import prove
from flower import jobs

SECRET = b"what both sides know of each other"


def clients(executor, indices, secret):
    return [
        ExecutorClient(executor, fit=functools.partial(jobs.fit, client=index), index=index, secret=secret)
        for index in indices
    ]


@pytest.mark.parametrize("other", [b"what somebody else knows", None])
def test_a_stranger_takes_no_part_and_is_told(other, caplog):
    address = free_address()
    strategy = FedAvgMp(
        fit_clients=10, available_clients=2, initial_parameters=ndarrays_to_parameters([np.zeros(3)])
    )
    with fedexec.create_executor("inline") as executor:
        members = ClientHost(clients(executor, (4, 7), SECRET), server_address=address)
        strangers = ClientHost(clients(executor, (5,), other), server_address=address)

        def refuse_strangers_then_start():
            strangers.start()
            with pytest.raises(RefusedError, match="give both the same --client-secret"):
                strangers.join()
            members.start()

        serve(
            strategy, address=address, num_rounds=2, max_clients=3, secret=SECRET,
            on_ready=refuse_strangers_then_start,
        )  # fmt: skip
        members.join()
    assert [round_.clients for round_ in strategy.rounds] == [[], [4, 7], [4, 7]]
    assert "a client was refused: it does not know the secret" in caplog.text


def test_a_client_of_flowers_own_is_a_stranger_too(caplog):
    """One that knows nothing of challenges is sent away, and does not hold up the others."""
    address = free_address()
    strategy = FedAvgMp(
        fit_clients=10, available_clients=1, initial_parameters=ndarrays_to_parameters([np.zeros(3)])
    )
    with fedexec.create_executor("inline") as executor:
        member = ClientHost(clients(executor, (0,), SECRET), server_address=address)

        def start():
            (plain,) = clients(executor, (0,), None)
            plain.get_properties = lambda config: {"client": 0, "proof": prove(b"a guess", "challenge")}
            start_client(server_address=address, client=plain.to_client(), insecure=True)
            member.start()

        serve(strategy, address=address, num_rounds=1, max_clients=2, secret=SECRET, on_ready=start)
        member.join()
    assert strategy.rounds[1].clients == [0]


def test_a_server_without_a_secret_takes_clients_that_have_one():
    address = free_address()
    strategy = FedAvgMp(
        fit_clients=1, available_clients=1, initial_parameters=ndarrays_to_parameters([np.zeros(3)])
    )
    with fedexec.create_executor("inline") as executor:
        host = ClientHost(clients(executor, (0,), SECRET), server_address=address)
        serve(strategy, address=address, num_rounds=1, max_clients=1, on_ready=host.start)
        host.join()
    assert strategy.rounds[1].clients == [0]
