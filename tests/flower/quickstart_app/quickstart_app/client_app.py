import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart_app import task

app = ClientApp()


def prepare(msg: Message, context: Context):
    model = task.Net()
    model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    node, run = context.node_config, context.run_config
    loaders = task.load_data(
        run["data"], node["partition-id"], node["num-partitions"], run["batch-size"], run["shuffle"]
    )
    return model.to(device), device, loaders


@app.train()
def train(msg: Message, context: Context):
    model, device, (loader, _) = prepare(msg, context)
    lr = msg.content["config"]["lr"]
    loss = task.train(model, loader, context.run_config["local-epochs"], lr, device)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    model, device, (_, loader) = prepare(msg, context)
    loss, accuracy = task.test(model, loader, device)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
