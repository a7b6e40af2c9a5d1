"""What the app uses of flwr_datasets, which few machines have; it imports pyarrow too, if that is there."""

from pathlib import Path

import numpy as np

try:
    from pyarrow import parquet  # as flwr_datasets does: it starts a thread in the template of the workers
except ImportError:
    parquet = None


class Rows:
    """Rows of two columns, with what torch's DataLoader asks of a data set."""

    def __init__(self, columns, transform=None):
        self.columns = columns
        self.transform = transform

    def __len__(self):
        return len(self.columns["label"])

    def __getitems__(self, numbers):
        batch = {name: [values[number] for number in numbers] for name, values in self.columns.items()}
        batch = self.transform(batch) if self.transform else batch
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]

    def select(self, numbers):
        columns = {name: [values[number] for number in numbers] for name, values in self.columns.items()}
        return Rows(columns, self.transform)

    def with_transform(self, transform):
        return Rows(self.columns, transform)

    def train_test_split(self, test_size, seed):
        numbers = np.random.default_rng(seed).permutation(len(self))
        tests = round(len(self) * test_size)
        return Splits(train=self.select(numbers[tests:]), test=self.select(numbers[:tests]))


class Splits(dict):
    def with_transform(self, transform):
        return Splits({name: rows.with_transform(transform) for name, rows in self.items()})


class IidPartitioner:
    def __init__(self, num_partitions):
        self.num_partitions = num_partitions


class FederatedDataset:
    def __init__(self, *, dataset, partitioners, cache_dir):
        self.directory = Path(dataset)
        self.partitioners = partitioners
        self.rows = {}

    def load_partition(self, partition_id, split="train"):
        return self.load_split(split).select(
            range(partition_id, len(self.load_split(split)), self.partitioners[split].num_partitions)
        )

    def load_split(self, split):
        if split not in self.rows:
            self.rows[split] = Rows(read(self.directory / f"{split}.parquet"))
        return self.rows[split]


def read(file):
    if parquet is not None:
        return parquet.read_table(file).to_pydict()
    with np.load(file.with_suffix(".npz")) as columns:
        return dict(columns)
