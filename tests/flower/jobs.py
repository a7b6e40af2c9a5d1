"""What clients of these tests do: numpy only, so that a worker starts in milliseconds."""

import os
import signal
import sys
import time

import numpy as np


def fit(parameters, config, *, client):
    """Move the weights by an amount that depends on who, when and from where."""
    moved = [np.float32(0.9) * array + np.float32(client + config["server_round"]) for array in parameters]
    return moved, 10 + client, {"knows_flower": int("flwr" in sys.modules)}


def evaluate(parameters, config, *, client=None):
    return float(sum(array.sum() for array in parameters)), 5, {"accuracy": 0.5}


def faulty_fit(parameters, config, *, client, culprits, how):
    """Fail in round 1 if this client is one of the culprits."""
    if client in culprits and config["server_round"] == 1:
        if how == "raise":
            raise ValueError("no data today")
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(3600)
        if how == "rubbish":
            return "nonsense"
    return fit(parameters, config, client=client)
