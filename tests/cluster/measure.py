"""Measures both engines on clusters of this machine, and prints a table: ``python tests/cluster/measure.py``.

All nodes share the cores and the memory of one machine, and their network is its loopback interface.
"""

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from clusters import Cluster

import fedexec

ROUNDS = 5


def rate(executor, number=100):
    """Return how many tasks that do nothing run in a second."""
    begun = time.perf_counter()
    list(executor.map(abs, range(number)))
    return number / (time.perf_counter() - begun)


def dispatch(engine):
    """Compare tasks that do nothing: one node, the local executor, and Ray's own fresh processes."""
    cluster = Cluster(engine, nodes=1)
    rates: dict[str, list[float]] = {"one node": [], "standby": []}
    with (
        fedexec.create_executor("standby", max_workers=2) as local,
        fedexec.create_executor(engine, max_workers=2, **cluster.settings) as remote,
    ):
        rate(local), rate(remote)
        for _ in range(ROUNDS):
            rates["standby"].append(rate(local))
            rates["one node"].append(rate(remote))
        if engine == "ray":
            rates["max_calls=1"] = [rate_of_ray() for _ in range(3)]
        latencies = []
        for _ in range(50):
            begun = time.perf_counter()
            remote.submit(abs, -1).result()
            latencies.append(time.perf_counter() - begun)
    cluster.close()
    for name, values in rates.items():
        print(f"  {name}: {statistics.median(values):.1f} tasks/s ({min(values):.1f} to {max(values):.1f})")
    ratio = statistics.median(rates["one node"]) / statistics.median(rates["standby"])
    print(f"  one node / standby: {ratio:.2f}; latency {1000 * statistics.median(latencies):.1f} ms")


def absolute(number):
    return abs(number)


def rate_of_ray(number=8):
    """Return how many of Ray's own tasks, each in a fresh process, run in a second."""
    import ray

    fresh = ray.remote(max_calls=1, num_cpus=1)(absolute)
    begun = time.perf_counter()
    ray.get([fresh.remote(-1) for _ in range(number)])
    return number / (time.perf_counter() - begun)


def many(engine):
    """Have clients that sleep: 64 at once on four nodes, and 400."""
    cluster = Cluster(engine, nodes=4)
    with fedexec.create_executor(engine, node_workers=16, **cluster.settings) as executor:
        for number, ideal in ((64, 0.5), (400, 3.5)):
            list(executor.map(time.sleep, [0.0] * 128))
            begun = time.perf_counter()
            list(executor.map(time.sleep, [0.5] * number))
            seconds = time.perf_counter() - begun
            print(f"  {number} clients that sleep 0.5 s on 64 slots: {seconds:.2f} s, ideal {ideal:.2f} s")
    cluster.close()


def loopback_bytes():
    """Return how many bytes the loopback interface has received."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[1])


def total(weights, number):
    """Stand for a client: read the weights."""
    return float(weights[number])


def weights(engine):
    """Send 100 MB to 32 clients, on one node and on two."""
    array = np.ones(100_000_000 // 8)
    seconds = {}
    for nodes in (1, 2):
        cluster = Cluster(engine, nodes=nodes)
        with fedexec.create_executor(engine, node_workers=2, **cluster.settings) as executor:
            list(executor.map(abs, range(8)))
            took = []
            for _ in range(3):
                array += 1
                before, begun = loopback_bytes(), time.perf_counter()
                list(executor.map(total, [array] * 32, range(32)))
                took.append(time.perf_counter() - begun)
                sent = (loopback_bytes() - before) / nodes
            seconds[nodes] = statistics.median(took)
            each = f"{seconds[nodes]:.2f} s, {sent / 1e6:.0f} MB over the link of each"
            print(f"  100 MB to 32 clients, {nodes} node(s): {each}")
        cluster.close()
    print(f"  two nodes / one node: {seconds[2] / seconds[1]:.2f}")


def client(directory, number):
    """Stand for a client that takes a while; leave a file for each run that was done."""
    name = f"{number}-{time.time_ns()}"
    time.sleep(0.2)
    Path(directory, f"{name}-done").touch()
    return number


def kills(engine, times=20):
    """Kill a node in mid-round at a random moment, again and again."""
    cluster = Cluster(engine, nodes=2)
    names = [0, 1]
    noticed, lost, twice = [], 0, 0
    with fedexec.create_executor(engine, retries=2, node_workers=4, **cluster.settings) as executor:
        for turn in range(times):
            directory = tempfile.mkdtemp(dir=cluster.directory)
            victim = names.pop(0)
            when = random.Random(turn).uniform(0.0, 1.0)
            killed: list[float] = []

            def kill(victim=victim, when=when, killed=killed):
                time.sleep(when)
                killed.append(time.monotonic())
                cluster.kill_node(victim)

            killer = threading.Thread(target=kill)
            killer.start()
            futures = [executor.submit(client, directory, number) for number in range(24)]
            before = {node.id for node in executor.nodes()}
            while {node.id for node in executor.nodes()} == before and time.monotonic() - (killed or [1e9])[
                0
            ] < 60:
                time.sleep(0.01)
            noticed.append(time.monotonic() - killed[0])
            results = [future.exception() for future in futures]
            lost += sum(error is not None for error in results)
            done = [path.name.split("-")[0] for path in Path(directory).glob("*-done")]
            twice += len(done) - len(set(done))
            killer.join()
            names.append(cluster.add_node())
            while len(executor.nodes()) < 2:
                time.sleep(0.05)
    cluster.close()
    print(
        f"  {times} nodes killed: {lost} tasks lost, {twice} done twice; noticed after "
        f"{statistics.median(noticed):.2f} s (at most {max(noticed):.2f} s)"
    )


def place(seconds):
    """Stand for a client; return when it began, and the process of its node, which the keeper has started."""
    begun = time.time()
    time.sleep(seconds)
    *_, node, _keeper, _init = psutil.Process().parents()
    return begun, node.pid


def joins(engine, times=5):
    """Add a node in mid-round; measure how long it takes until a client begins there."""
    cluster = Cluster(engine, nodes=1)
    took = []
    with fedexec.create_executor(engine, node_workers=2, **cluster.settings) as executor:
        first = executor.submit(place, 0.0).result()[1]
        for _ in range(times):
            futures = [executor.submit(place, 0.5) for _ in range(60)]
            time.sleep(1.0)
            name = cluster.add_node()
            ready = time.time()
            there = [begun for begun, node in (future.result() for future in futures) if node != first]
            took.append(min(there) - ready)
            cluster.kill_node(name)
            while len(executor.nodes()) > 1:
                time.sleep(0.05)
    cluster.close()
    print(f"  a client began on a new node after {statistics.median(took):.2f} s (at most {max(took):.2f} s)")


PARTS = {"dispatch": dispatch, "many": many, "weights": weights, "kills": kills, "joins": joins}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", nargs="*", default=["dask", "ray"])
    parser.add_argument("--part", nargs="*", default=list(PARTS), choices=PARTS)
    arguments = parser.parse_args()
    for engine in arguments.engine:
        for part in arguments.part:
            print(f"{engine}, {part}:", flush=True)
            PARTS[part](engine)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
