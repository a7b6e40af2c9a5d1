"""Speed on every backend of code whose user has set no preload.

``python bench/warm.py`` prints every comparison; ``--only NAME`` prints one; ``--repeat N`` takes the median
of N runs. Each script runs in its own process, is measured as a whole, and takes turns with the others.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparing import Comparison, run_comparisons

HERE = Path(__file__).parent
BACKENDS = ("loky", "standby", "pool", "process", "inline")
# the highest time of a whole script, as a multiple of loky's
OF_LOKY = {"standby": 1.5, "pool": 2.0, "process": 2.5}
TASKS = 16

SCRIPT = """
import json, sys, time
begun = time.perf_counter()
{imports}
import fedexec

{function}

backend = sys.argv[1]
with fedexec.create_executor(backend, max_workers=2) as executor:
    list(executor.map(task, range({tasks})))
    first = time.perf_counter() - begun
    middle = time.perf_counter()
    list(executor.map(task, range({tasks})))
    second = time.perf_counter() - middle
print(json.dumps({{"whole": first, "second": second, "learning": dict(executor.stats().learning)}}))
"""

TORCH = """
def task(number):
    torch.manual_seed(number)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    x, y = torch.randn(512, 64), torch.randint(0, 10, (512,))
    for _ in range({steps}):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return number
"""

PANDAS = """
def task(number):
    x, y = make_classification(300, random_state=number)
    frame = pd.DataFrame(x).assign(y=y)
    model = LogisticRegression().fit(frame.drop(columns="y"), frame["y"])
    return float(frame.groupby("y").mean().to_numpy().sum()) + model.score(x, y)
"""


def compare_torch(repeat: int) -> bool:
    """A script that imports torch: 16 tasks of 0.02 s, then 16 more in the same executor."""
    imports = "import torch\nimport torch.nn.functional as F"
    return _scripts(imports, TORCH.format(steps=20), repeat, OF_LOKY, {})


def compare_long(repeat: int) -> bool:
    """The same with 16 tasks of 0.2 s; the second 16 are compared with in-process compute on two workers."""
    imports = "import torch\nimport torch.nn.functional as F"
    return _scripts(imports, TORCH.format(steps=200), repeat, {}, {"standby": 1.3})


def compare_pandas(repeat: int) -> bool:
    """A script that imports pandas and scikit-learn: 16 small fits, then 16 more."""
    imports = (
        "import pandas as pd\nfrom sklearn.datasets import make_classification\n"
        "from sklearn.linear_model import LogisticRegression"
    )
    return _scripts(imports, PANDAS, repeat, OF_LOKY, {})


def compare_simulate(repeat: int) -> bool:
    """simulate(executor=...) with a user's executor without a preload, against simulate(): rounds 2 to 4."""
    runs: dict[str, list[float]] = {"simulate()": [], "simulate(executor=...)": []}
    for _ in range(repeat):
        for name in runs:
            seconds = _json([sys.executable, __file__, "simulate", name])
            runs[name].append(statistics.median(seconds[1:]))
    ours, theirs = (statistics.median(times) for times in runs.values())
    for name, times in runs.items():
        print(f"{name:26}{statistics.median(times):8.2f} s per round   {_noise(times)}")
    print(f"ratio {theirs / ours:.2f} (at most 1.15)")
    return theirs / ours <= 1.15


COMPARISONS: dict[str, Comparison] = {
    "torch": compare_torch,
    "long": compare_long,
    "pandas": compare_pandas,
    "simulate": compare_simulate,
}


def _scripts(
    imports: str, function: str, repeat: int, limits: dict[str, float], second: dict[str, float]
) -> bool:
    """Run a script on every backend; return whether its ratios to loky and inline are within limits."""
    runs: dict[str, list[dict]] = {backend: [] for backend in BACKENDS}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(SCRIPT.format(imports=imports, function=function, tasks=TASKS))
        for _ in range(repeat):
            for backend, results in runs.items():
                results.append(_json([sys.executable, str(script), backend]))
    whole = {backend: statistics.median(run["whole"] for run in results) for backend, results in runs.items()}
    again = {
        backend: statistics.median(run["second"] for run in results) for backend, results in runs.items()
    }
    print(f"{'':10}{'first':>9}{'noise':>8}{'of loky':>9}{'second':>9}{'of inline':>11}  learnt")
    kept = True
    for backend, results in runs.items():
        of_loky, of_inline = whole[backend] / whole["loky"], again[backend] / again["inline"]
        kept &= of_loky <= limits.get(backend, of_loky) and of_inline <= second.get(backend, of_inline)
        learning = results[-1]["learning"]
        learnt = f"{learning['modules']} modules in {learning['seconds']:.1f} s" if learning else "nothing"
        noise = _noise([run["whole"] for run in results])
        print(
            f"{backend:10}{whole[backend]:8.2f}s{noise:>8}{of_loky:9.2f}{again[backend]:8.2f}s"
            f"{of_inline:11.2f}  {learnt}"
        )
    lines = [f"{backend} at most {limit:g} times loky" for backend, limit in limits.items()]
    lines += [f"{backend}'s second at most {limit:g} times inline's" for backend, limit in second.items()]
    print("limits:", ", ".join(lines))
    return kept


def _noise(values: Sequence[float]) -> str:
    return f"{(max(values) - min(values)) / statistics.median(values):.0%}"


def _json(command: list[str]) -> Any:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _simulate(name: str) -> None:
    """Print the seconds of each round with the tutorial's CNN; runs in a process of its own."""
    os.environ["FEDEXEC_BENCH"] = json.dumps(
        {"fraction": 0.5, "rounds": 4, "timeout": 600, "report": "report"}
    )
    os.environ["PYTHONPATH"] = str(HERE)
    sys.path.insert(0, str(HERE))
    import fedexec
    from fedexec.flower import simulate

    executor = fedexec.create_executor(max_workers=2) if "executor" in name else None
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        done = simulate("simulation_cnn:server", "simulation_cnn:client", num_nodes=20, executor=executor)
    print(json.dumps([found.seconds for found in done.rounds if found.server_round]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["simulate"]:
        _simulate(sys.argv[2])
    else:
        sys.exit(run_comparisons(__doc__, COMPARISONS, repeat=3))
