"""What tests of shared memory send, and how they wait."""

import time

import numpy as np

MIB = 1 << 20


def arrays(seed=0, count=4, size=MIB):
    rng = np.random.default_rng(seed)
    return [rng.random(size // 8) for _ in range(count)]


def add_one(values):
    """Change the arguments in place, and return something else."""
    for value in values:
        value += 1
    return [value * 2 for value in values]


def echo(value):
    return value


def eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
