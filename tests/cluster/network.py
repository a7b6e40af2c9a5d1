"""Measures an engine on two nodes whose network links are real: ``python tests/cluster/network.py dask``.

It needs root and ``ip``, because each node is a network namespace with an address of its own, linked to this
one by a pair of virtual interfaces. Bytes are those that an interface counts; a cut takes it down.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from clusters import send_to_family

import fedexec

NETWORK = "10.77.0"  # .1 is this end, .2 and .3 are the nodes
NODES = (1, 2)
CUT_SECONDS = 10.0
SCHEDULER, WORKER = "distributed.cli.dask_scheduler", "distributed.cli.dask_worker"


def run(command):
    subprocess.run(command, shell=True, check=True)


@contextlib.contextmanager
def network():
    """Make the namespaces and their links, and take them away again."""
    with contextlib.ExitStack() as stack:
        run(f"ip link add fxbr type bridge && ip addr add {NETWORK}.1/24 dev fxbr && ip link set fxbr up")
        stack.callback(run, "ip link del fxbr")
        for node in NODES:
            inside = f"ip netns exec fx{node} ip"
            run(f"ip netns add fx{node}")
            stack.callback(run, f"ip netns del fx{node}")
            run(f"ip link add fxv{node} type veth peer name eth0 netns fx{node}")
            stack.callback(run, f"ip link del fxv{node}")
            run(f"ip link set fxv{node} master fxbr up && {inside} addr add {NETWORK}.{node + 1}/24 dev eth0")
            run(f"{inside} link set eth0 up && {inside} link set lo up")
        yield


@contextlib.contextmanager
def cluster(engine, directory):
    """Start a cluster, one node in each namespace, and give the settings of an executor on it."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(prefix, *command):
        with (directory / f"{len(processes)}.log").open("wb") as log:
            processes.append(subprocess.Popen([*prefix, *command], stdout=log, stderr=log, cwd=directory))

    if engine == "dask":
        address, quiet = f"tcp://{NETWORK}.1:18786", ("--dashboard-address", "127.0.0.1:0")
        start((sys.executable, "-m"), SCHEDULER, "--host", f"{NETWORK}.1", "--port", "18786", *quiet)
    else:
        address = f"{NETWORK}.1:6399"
        os.environ["RAY_AUTH_MODE"] = "disabled"  # nobody else is in this network
        ray = (str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats")
        options = (f"--node-ip-address={NETWORK}.1", "--port=6399", "--num-cpus=0")
        start(ray, "--head", *options, "--include-dashboard=false", f"--temp-dir={directory}/r")
    time.sleep(8.0)
    for node in NODES:
        inside, host = ("ip", "netns", "exec", f"fx{node}"), f"{NETWORK}.{node + 1}"
        if engine == "dask":
            start((*inside, sys.executable, "-m"), WORKER, address, "--host", host, "--no-nanny", *quiet)
        else:
            start((*inside, *ray), f"--address={address}", f"--node-ip-address={host}", "--num-cpus=2")
            time.sleep(8.0)  # nodes that start at once on one machine take the same name for a socket
    try:
        yield {f"{engine}_address": address, "node_workers": 2}
    finally:
        for process in processes:
            send_to_family(process.pid, signal.SIGTERM if engine == "ray" else signal.SIGKILL)
            process.wait()


def wait_for(condition, seconds=60.0):
    """Wait until a condition holds; return how long that took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "it never came"
        time.sleep(0.01)
    return time.monotonic() - begun


def received(node):
    """Return the bytes that a node has received over its link."""
    return int(Path(f"/sys/class/net/fxv{node}/statistics/tx_bytes").read_text())


def total(weights, number):
    """Stand for a client: read the weights."""
    return float(weights[number])


def client(directory, number, seconds):
    """Stand for a client that takes a while; leave a file that says when it began and was last alive."""
    mark = Path(directory, f"{number}-{time.time()}")
    mark.write_text(str(os.getpid()))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)
        os.utime(mark)
    mark.rename(f"{mark}-done")


def weights(executor):
    array = np.ones(100_000_000 // 8)
    list(executor.map(abs, range(8)))
    for _ in range(2):
        array += 1
        before, begun = [received(node) for node in NODES], time.monotonic()
        list(executor.map(total, [array] * 32, range(32)))
        sent = [f"{(received(node) - b) / 1e6:.1f} MB" for node, b in zip(NODES, before, strict=True)]
        print(f"  100 MB to 32 clients: {time.monotonic() - begun:.2f} s, {' and '.join(sent)}", flush=True)


def cut(executor, directory):
    futures = [executor.submit(client, directory, number, 1.0) for number in range(40)]
    time.sleep(2.5)
    begun = time.time()
    run("ip link set fxv1 down")
    threading.Timer(CUT_SECONDS, run, ["ip link set fxv1 up"]).start()
    noticed = wait_for(lambda: len(executor.nodes()) == 1)
    print(f"  link cut for {CUT_SECONDS:.0f} s: noticed after {noticed:.2f} s", flush=True)
    errors = [error for future in futures if (error := future.exception())]
    print(f"  {len(errors)} of {len(futures)} clients failed, {executor.stats().retries} ran again")
    runs: dict[str, list[tuple[float, float, bool]]] = {}
    for path in Path(directory).iterdir():
        number, began, *done = path.name.split("-")
        runs.setdefault(number, []).append((float(began), path.stat().st_mtime, bool(done)))
    for number, each in sorted(runs.items()):
        for (_, alive, is_done), (again, _, _) in zip(sorted(each), sorted(each)[1:], strict=False):
            print(
                f"  client {number}: first run {'done' if is_done else 'ended'} {alive - begun:.2f} s after "
                f"the cut, the second began after {again - begun:.2f} s"
            )
    wait_for(lambda: len(executor.nodes()) == 2)
    print(f"  both nodes are used {time.time() - begun - CUT_SECONDS:.1f} s after the link's return")


CALLER = """
import sys; sys.path.insert(0, {here!r})
import network, fedexec
if __name__ == "__main__":
    with fedexec.create_executor({engine!r}, **{settings!r}) as executor:
        list(executor.map(network.client, [{directory!r}] * 4, range(4), [100.0] * 4))
"""


def killed_behind_a_cut(engine, settings, directory):
    script = CALLER.format(
        here=str(Path(__file__).parent), engine=engine, settings=settings, directory=directory
    )
    caller = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(Path(directory).iterdir())) == 4)
    pids = [int(path.read_text()) for path in Path(directory).iterdir()]
    for node in NODES:
        run(f"ip link set fxv{node} down")
    caller.kill()
    caller.wait()
    gone = wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    print(f"  all links cut and the caller killed: its workers are gone after {gone:.2f} s")


def main():
    (engine,) = sys.argv[1:]
    with (
        tempfile.TemporaryDirectory(prefix="n-") as name,
        network(),
        cluster(engine, Path(name)) as settings,
    ):
        marks = [tempfile.mkdtemp(dir=name) for _ in range(2)]
        print(f"{engine}, two nodes in network namespaces:", flush=True)
        with fedexec.create_executor(engine, retries=2, **settings) as executor:
            wait_for(lambda: len(executor.nodes()) == 2)
            weights(executor)
            cut(executor, marks[0])
        killed_behind_a_cut(engine, settings, marks[1])


if __name__ == "__main__":
    main()
