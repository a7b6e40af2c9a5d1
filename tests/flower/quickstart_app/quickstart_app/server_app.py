import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.utils.data import DataLoader

from quickstart_app import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = task.Net()
        model.load_state_dict(arrays.to_torch_state_dict())
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        rows = task.dataset(config["data"], len(list(grid.get_node_ids()))).load_split("train")
        loader = DataLoader(rows.with_transform(task.apply_transforms), batch_size=128)
        loss, accuracy = task.test(model.to(device), loader, device)
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    FedAvg(fraction_evaluate=float(config["fraction-evaluate"])).start(
        grid=grid,
        initial_arrays=ArrayRecord(task.Net().state_dict()),
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
