"""``fedexec``, whose clients fail with probability 0.2; which do, and how, follows from who and when."""

import os
import random
import signal
import sys

from fedexec import _cli
from fedexec._workload import jobs

PROBABILITY = 0.2


def train_or_fail(parameters, config, *, data, client):
    chance = random.Random(f"{client}/{config['server_round']}")
    if chance.random() < PROBABILITY:
        chance.choice([_raise, _exit, _kill])()
    from fedexec._workload import training

    return training.train(parameters, config, data=data, client=client)


def _raise():
    raise RuntimeError("this client fails")


def _exit():
    os._exit(3)


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    jobs.train = train_or_fail
    sys.exit(_cli.main())
