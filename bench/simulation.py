"""Comparison of Flower's own simulation engine (Ray) with `fedexec.flower.simulate`, on the same app.

``python bench/simulation.py`` prints every comparison; ``--only NAME`` prints one; ``--repeat N`` takes the
median of N runs. Each run is a whole command in its own process.
"""

import importlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from comparing import run_comparisons

HERE = Path(__file__).parent
ENGINES = {
    "Flower (Ray)": ["ray"],
    "fedexec standby": ["standby"],
    "fedexec inline, one at a time": ["inline", "max-workers=1"],
}  # name -> engine, and settings of its executor
# The lower bound: any engine that gives each fit its own process takes about as long, or longer.
FORKS = "bare forks, results dropped"


def main() -> int:
    """Run the selected comparisons.

    Returns
    -------
    int
        Exit code: 1 if a promise is broken.
    """
    if importlib.util.find_spec("ray") is None:
        print("ray is not installed, so Flower's own engine is left out", file=sys.stderr)
        del ENGINES["Flower (Ray)"]
    return run_comparisons(__doc__, COMPARISONS, repeat=1)


# ---------------------------------------------------------------- comparisons


def compare_time(repeat: int) -> bool:
    """The tutorial's CNN on the digits: 20 nodes, 10 sampled, 3 rounds."""
    runs: dict[str, list[dict]] = {engine: [] for engine in (*ENGINES, FORKS)}
    for _ in range(repeat):  # Engines take turns, because the speed of a shared machine varies by the minute.
        for engine, command in (ENGINES | {FORKS: ["forks"]}).items():
            runs[engine].append(run(command, app="simulation_cnn:client", nodes=20, fraction=0.5, rounds=3))
    print(f"{'':32}{'rounds':>9}{'whole':>9}{'accuracy':>10}")
    medians = {}
    for engine, results in runs.items():
        medians[engine] = {key: statistics.median(r[key] for r in results) for key in ("rounds", "whole")}
        accuracy = results[0]["accuracy"]
        shown = f"{medians[engine]['rounds']:7.2f} s{medians[engine]['whole']:7.1f} s"
        print(f"{engine:32}{shown}{'' if accuracy is None else f'{accuracy:10.3f}'}")
    if "Flower (Ray)" not in medians:
        return True
    ray, ours = medians["Flower (Ray)"], medians["fedexec standby"]
    print(f"rounds of bare forks faster than Ray: {ray['rounds'] / medians[FORKS]['rounds']:.2f}")
    return promise("rounds faster than Ray", ray["rounds"] / ours["rounds"], 6) & promise(
        "whole command faster than Ray", ray["whole"] / ours["whole"], 4
    )


def compare_throughput(repeat: int) -> bool:
    """A ClientApp that does nothing: messages per second (5 rounds of 100 nodes)."""
    kept = True
    for backend, minimum in (("standby", 50), ("inline", 1000)):
        rates = [
            500 / run([backend], app="simulation_apps:idle", nodes=100, fraction=1.0, rounds=5)["rounds"]
            for _ in range(repeat)
        ]
        kept &= promise(f"messages per second, {backend}", statistics.median(rates), minimum)
    return kept


def compare_results(repeat: int) -> bool:
    """The weights that both engines compute: 4 nodes, all sampled, 2 rounds."""
    weights = {}
    for engine, command in ENGINES.items():
        result = run(command, app="simulation_cnn:client", nodes=4, fraction=1.0, rounds=2)
        weights[engine] = result["weights"]
    reference = weights["fedexec standby"]
    for engine, arrays in weights.items():
        pairs = zip(arrays, reference, strict=True)
        print(f"{engine:32}greatest difference {max(np.abs(a - b).max() for a, b in pairs):.1e}")
    return all(
        np.allclose(a, b, rtol=1e-3, atol=1e-4)
        for arrays in weights.values()
        for a, b in zip(arrays, reference, strict=True)
    )


def compare_memory(repeat: int) -> bool:
    """Peak memory of the driver: 100 nodes per round for 5 rounds, sampled from 100 or from 10,000 nodes."""
    few = run(["standby"], app="simulation_apps:idle", nodes=100, fraction=1.0, rounds=5)["peak_mib"]
    many = run(["standby"], app="simulation_apps:idle", nodes=10_000, fraction=0.01, rounds=5)["peak_mib"]
    print(f"100 registered: {few:.0f} MiB; 10,000 registered: {many:.0f} MiB")
    return promise("10,000 against 100 registered, at most", many / few, 1.3, at_most=True)


def compare_deaths(repeat: int) -> bool:
    """A client is killed in round 1: number of failures in each of 3 rounds with 10 nodes."""
    kept = True
    for engine, command in ENGINES.items():
        if command[0] == "inline":
            continue
        result = run(command, app="simulation_apps:mortal", nodes=10, fraction=1.0, rounds=3, timeout=60)
        if "failures" not in result:
            result |= {"failures": "the run failed", "replies": "no"}
        print(f"{engine:32}{result['failures']} of {result['replies']} replies")
        kept &= command[0] != "standby" or result["failures"] == [1, 0, 0]
    return kept


BLAZEFL = {
    "BlazeFL, processes": ["blazefl", "processes"],
    "BlazeFL, threads": ["blazefl", "threads"],
    "fedexec standby": ["standby", "max-workers=2"],
    "Flower (Ray)": ["ray"],
}


def compare_blazefl(repeat: int) -> bool:
    """BlazeFL's federated averaging, its CNN and ResNet-18: 20 clients, 10 sampled, 3 rounds, 2 at once."""
    if importlib.util.find_spec("blazefl") is None:
        print("BlazeFL is left out: pip install blazefl, on Python 3.12 or newer")
        return True
    from blazefl_apps import make_samples

    kept = True
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # two clients, two cores
    for model, samples in (("cnn", 500), ("resnet18", 50)):
        runs: dict[str, list[dict]] = {engine: [] for engine in BLAZEFL}
        with tempfile.TemporaryDirectory() as data:
            make_samples(data, 20, samples)
            for _ in range(repeat):
                for engine, command in BLAZEFL.items():
                    if engine in ENGINES or not engine.startswith("Flower"):
                        given = {"nodes": 20, "fraction": 0.5, "rounds": 3, "model": model, "data": data}
                        runs[engine].append(run(command, environment, app="blazefl_apps:client", **given))
        print(f"{model:32}{'rounds':>9}{'whole':>9}")
        whole = {}
        for engine, results in runs.items():
            if results:
                rounds, whole[engine] = (
                    statistics.median(r[key] for r in results) for key in ("rounds", "whole")
                )
                print(f"{engine:32}{rounds:7.2f} s{whole[engine]:7.1f} s")
        ours = whole["fedexec standby"]
        kept &= promise("as fast as its processes", whole["BlazeFL, processes"] / ours, 1)
        kept &= promise("as fast as its threads", whole["BlazeFL, threads"] / ours, 0.9)
        weights = [result["weights"][0] for result in runs["fedexec standby"]]
        kept &= all(np.array_equal(weights[0], each) for each in weights)
    return kept


COMPARISONS = {
    "blazefl": compare_blazefl,
    "time": compare_time,
    "throughput": compare_throughput,
    "results": compare_results,
    "memory": compare_memory,
    "deaths": compare_deaths,
}


def promise(what: str, value: float, limit: float, *, at_most: bool = False) -> bool:
    """Print a figure with its promised limit.

    Parameters
    ----------
    what : str
        Description of the figure.
    value, limit : float
        The figure and its limit.
    at_most : bool
        Whether the limit is an upper one.

    Returns
    -------
    bool
        Whether the promise is kept.
    """
    kept = value <= limit if at_most else value >= limit
    print(f"{what}: {value:.2f} (promised: {limit:g}){'' if kept else '  NOT KEPT'}")
    return kept


# ---------------------------------------------------------------- one run


def run(command: list[str], variables: dict[str, str] | None = None, **settings: object) -> dict:
    """Run one engine in its own process.

    Parameters
    ----------
    command : list of str
        The engine, and settings of its executor.
    variables : dict of str to str, optional
        More of its environment.
    **settings : object
        Settings of the apps; see ``simulation_apps.settings``.

    Returns
    -------
    dict
        The run's report, and the seconds of the whole command (``whole``).
    """
    # A short path, because Ray creates sockets there, whose paths have a limit.
    scratch = Path(tempfile.mkdtemp(prefix="fx"))
    report = scratch / "report.json"
    settings = {"timeout": 3600, **settings, "report": str(report)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDEXEC_")} | {
        "FEDEXEC_BENCH": json.dumps(settings),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_TMPDIR": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
        **(variables or {}),
    }
    path = [str(HERE), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    try:
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(HERE / "simulation.py"), "--run", *command],
            env=environment, cwd=scratch, capture_output=True, text=True,
        )  # fmt: skip
        whole = time.perf_counter() - begun
        if not report.exists():
            print(done.stderr[-2000:], file=sys.stderr)
            return {"whole": whole}
        result = json.loads(report.read_text()) | {"whole": whole}
        if Path(f"{report}.npz").exists():
            with np.load(f"{report}.npz") as arrays:
                result["weights"] = [arrays[name] for name in arrays]
        peak = scratch / "peak"
        result["peak_mib"] = float(peak.read_text()) if peak.exists() else None
        return result
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_here(engine: str, *chosen: str) -> None:
    """Run one engine in this process.

    Parameters
    ----------
    engine : str
    *chosen : str
        Settings of its executor, ``name=value``.
    """
    settings = json.loads(os.environ["FEDEXEC_BENCH"])
    module, _, name = settings["app"].partition(":")
    if engine == "forks":
        importlib.import_module(module).fork_for_each_fit()
        return
    if engine == "blazefl":
        importlib.import_module(module).run_blazefl(*chosen)
        return
    if engine == "ray":
        from flwr.simulation import run_simulation

        apps = importlib.import_module(module)
        resources: dict[str, dict[str, Any]] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        run_simulation(apps.server, getattr(apps, name), settings["nodes"], backend_config=resources)
        return
    from fedexec.flower import simulate
    from fedexec.memory.host import peak_and_rss

    config = {"executor-backend": engine, "executor-threads-per-worker": 1}
    config |= {f"executor-{name}": value for name, _, value in (each.partition("=") for each in chosen)}
    simulate(f"{module}:server", settings["app"], num_nodes=settings["nodes"], run_config=config, seed=0)
    Path("peak").write_text(str((peak_and_rss()[0] or 0) / 2**20))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_here(*sys.argv[2:])
    else:
        sys.exit(main())
