import os

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedexec.flower import offload

app = ClientApp()


def mod(message: Message, context: Context, call_next) -> Message:
    """Add the process that the ClientApp runs in."""
    reply = call_next(message, context)
    reply.content["metrics"]["outside"] = os.getpid()
    return reply


@app.train(mods=[mod])
@offload
def train(message: Message, context: Context) -> Message:
    before = context.state["visits"]["count"] if "visits" in context.state else 0
    assert isinstance(before, int)
    visits = before + 1
    context.state["visits"] = MetricRecord({"count": visits})
    metrics = MetricRecord({"num-examples": 1, "inside": os.getpid(), "visits": visits})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)
