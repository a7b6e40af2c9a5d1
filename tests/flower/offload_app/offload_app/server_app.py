import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedexec.flower import offload

app = ServerApp()


class Watching(FedAvg):
    """Keeps what each node said."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            said.append(reply.error.reason if reply.has_error() else dict(reply.content["metrics"]))
        return super().aggregate_train(server_round, replies)


said: list[Any] = []


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = Watching(fraction_evaluate=0.0)
    result = strategy.start(grid, ArrayRecord([np.ones(1000)]), num_rounds=2, evaluate_fn=offload(evaluate))
    pids = [metrics["pid"] for metrics in result.evaluate_metrics_serverapp.values()]
    report = {"server": os.getpid(), "evaluated": pids, "nodes": said}
    Path(str(context.run_config["report"])).write_text(json.dumps(report))


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    return MetricRecord({"pid": os.getpid(), "loss": float(arrays["0"].numpy().sum())})
