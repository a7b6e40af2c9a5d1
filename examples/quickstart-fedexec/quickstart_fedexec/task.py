"""The model, its data, and what is done with both."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fedexec._workload.data import DataSpec, load_data


class Net(nn.Module):
    """The CNN of "PyTorch: A 60 Minute Blitz"."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        """Map images to logits."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def load_partition(partition_id, num_partitions):
    """Return one client's images and labels."""
    samples = load_data(DataSpec(clients=num_partitions), client=partition_id)
    return torch.from_numpy(samples.images), torch.from_numpy(samples.labels)


def load_test_set():
    """Return the images and labels that nobody trains on."""
    samples = load_data(DataSpec())
    return torch.from_numpy(samples.images), torch.from_numpy(samples.labels)


def train(net, images, labels, *, epochs, learning_rate, batch_size, seed):
    """Train, always the same way for the same seed; return the mean loss of the last epoch."""
    shuffle = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=0.9)
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(labels), generator=shuffle).split(batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
    return total / len(labels)


def test(net, images, labels):
    """Return loss and accuracy."""
    with torch.inference_mode():
        logits = net(images)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return F.cross_entropy(logits, labels).item(), accuracy
