"""What a node does."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart_fedexec import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this node's digits."""
    net = load_model(message)
    images, labels = load_digits(context)
    loss = task.train(
        net,
        images,
        labels,
        epochs=context.run_config["local-epochs"],
        learning_rate=message.content["config"]["learning-rate"],
        batch_size=context.run_config["batch-size"],
        seed=(context.node_config["partition-id"], message.content["config"]["server-round"]),
    )
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(labels)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on this node's digits."""
    images, labels = load_digits(context)
    loss, accuracy = task.test(load_model(message), images, labels)
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def load_model(message: Message) -> task.Net:
    """Return the global model."""
    net = task.Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net


def load_digits(context: Context):
    """Return the digits of the partition that this node was given."""
    return task.load_partition(context.node_config["partition-id"], context.node_config["num-partitions"])
