import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

try:
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import IidPartitioner
except ImportError:
    from quickstart_app.federated import FederatedDataset, IidPartitioner


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc = nn.Linear(4 * 3 * 3, 10)

    def forward(self, x):
        return self.fc(self.pool(functional.relu(self.conv(x))).flatten(1))


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.asarray(image, dtype=np.float32).reshape(1, 8, 8) / 16)


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def __call__(self, tensor):
        return (tensor - self.mean) / self.std


fds = None  # filled at the first message, in whatever process that is

pytorch_transforms = Compose([ToTensor(), Normalize(0.5, 0.5)])


def apply_transforms(batch):
    batch["img"] = [pytorch_transforms(image) for image in batch["img"]]
    return batch


def dataset(directory, num_partitions):
    global fds
    if fds is None:
        partitioner = IidPartitioner(num_partitions=num_partitions)
        fds = FederatedDataset(
            dataset=directory, partitioners={"train": partitioner}, cache_dir=f"{directory}-cache"
        )
    return fds


def load_data(directory, partition_id, num_partitions, batch_size, shuffle):
    partition = dataset(directory, num_partitions).load_partition(partition_id)
    split = partition.train_test_split(test_size=0.2, seed=42).with_transform(apply_transforms)
    # Shuffled, the order of each epoch is drawn from torch's global generator.
    return DataLoader(split["train"], batch_size=batch_size, shuffle=shuffle), DataLoader(split["test"], 32)


def train(net, loader, epochs, lr, device):
    criterion = nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = criterion(net(batch["img"].to(device)), batch["label"].to(device))
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(loader))


def test(net, loader, device):
    correct, loss = 0, 0.0
    with torch.no_grad():
        for batch in loader:
            outputs = net(batch["img"].to(device))
            labels = batch["label"].to(device)
            loss += functional.cross_entropy(outputs, labels).item()
            correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(loader), correct / len(loader.dataset)
