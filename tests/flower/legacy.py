"""An app as it was written before the message API: server_fn, client_fn, NumPyClient."""

import numpy as np
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        return [np.float32(0.9) * array + self.partition for array in parameters], 10 + self.partition, {}

    def evaluate(self, parameters, config):
        return float(sum(array.sum() for array in parameters)), 5, {"accuracy": 0.5}


def client_fn(context: Context):
    return Client(context.node_config["partition-id"]).to_client()


def evaluate_fn(server_round, parameters, config):
    return float(sum(array.sum() for array in parameters)), {"accuracy": 0.5}


def server_fn(context: Context):
    strategy = FedAvg(
        fraction_fit=1.0,
        fraction_evaluate=0.5,
        min_available_clients=int(context.run_config.get("min-available", 2)),
        initial_parameters=ndarrays_to_parameters([np.zeros((3, 2), np.float32), np.ones(4, np.float32)]),
        evaluate_fn=evaluate_fn,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))


client = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
