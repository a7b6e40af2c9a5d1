"""A whole federation over gRPC in this process, with jobs that need no torch."""

import functools

import numpy as np
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

from fedexec.flower import TaskRecorder
from fedexec.flower.grpc import (
    ClientHost,
    ExecutorClient,
    FedAvgMp,
    executor_evaluate_fn,
    serve,
)
from fedexec.flower.grpc.address import free_address
from flower import jobs


def federate(
    executor,
    *,
    clients,
    rounds=2,
    fit=jobs.fit,
    client_evaluate=jobs.evaluate,
    server_evaluate=jobs.evaluate,
    kinds=None,
    **strategy_options,
):
    """Run a whole federation in this process; return its strategy and the recorder of its tasks."""
    recorder = TaskRecorder()
    address = free_address()
    host = ClientHost(
        [
            (kinds or {}).get(index, ExecutorClient)(
                executor,
                fit=functools.partial(fit, client=index),
                evaluate=functools.partial(client_evaluate, client=index),
                index=index,
                recorder=recorder,
            )
            for index in range(clients)
        ],
        server_address=address,
    )
    options = {"fit_clients": clients, "available_clients": clients} | strategy_options
    options.setdefault(
        "initial_parameters", ndarrays_to_parameters([np.zeros((3, 2), np.float32), np.ones(4, np.float32)])
    )
    evaluate_fn = executor_evaluate_fn(executor, server_evaluate, recorder=recorder)
    strategy = FedAvgMp(evaluate_fn=evaluate_fn, **options)
    try:
        serve(strategy, address=address, num_rounds=rounds, max_clients=clients, on_ready=host.start)
    finally:
        host.join()
    return strategy, recorder


def weights(strategy):
    return parameters_to_ndarrays(strategy.parameters)
