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
        moved, examples, metrics = fit(parameters, config, client=client)
        if how == "nan":
            moved[1][2] = np.nan
        if how == "a layer less":
            moved.pop()
        if how == "another shape":
            moved[0] = moved[0].T
        if how == "text":
            moved[1] = np.array(["a", "b", "c", "d"])
        if how == "other types":
            moved = [array.astype(np.float64) for array in moved]  # the same values
        if how == "more digits":
            moved[1] = moved[1] + np.float64(1e-9)
        if how == "integers":
            moved = [array.astype(np.int32) for array in moved]
        if how == "truth values":
            moved[0] = moved[0] > 0
        if how == "far away":
            moved[0] += np.float32(3.2e37)
        if how == "all the samples":
            examples = 2**62
        if how == "array metric":
            metrics["loss"] = np.float32(1)
        if how == "no samples":
            examples = 0
        return moved, examples, metrics
    return fit(parameters, config, client=client)


def evaluate_or_die(parameters, config, *, directory, times):
    """Die so many times, then evaluate."""
    before = len(list(directory.iterdir()))
    if before < times:
        (directory / str(before)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(parameters, config)


def count_up(parameters, config, *, client):
    """Train a model that has a counter."""
    return [parameters[0] + np.float32(client), parameters[1] + 1 + client], 1, {}


def odd_evaluate(parameters, config, *, client, given, culprits=(0,)):
    """Evaluate as others do, but for what a culprit gives: a loss, samples, metrics."""
    loss, samples, metrics = evaluate(parameters, config)
    if client in culprits:
        return given.get("loss", loss), given.get("samples", samples), given.get("metrics", metrics)
    return loss, samples, metrics


def lost_loss(parameters, config, *, client):
    return float("nan") if client == 1 else 1.0, 5, {}


def wait_for(parameters, config, *, client, file):
    """Take until there is a file."""
    while client == 1 and not file.exists():
        time.sleep(0.01)
    return fit(parameters, config, client=client)
