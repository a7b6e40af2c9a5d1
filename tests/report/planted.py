"""Files of benchmarks with figures that a test chose: how they are read is what is tested."""

import json
import statistics

from fedexec._report.schema import FRESH, KEY, REUSED, SCHEMA, THREAD, Course, Record, name_of

MIB = 1 << 20
ISOLATION = {
    "standby": FRESH,
    "pool": FRESH,
    "process": FRESH,
    "loky": REUSED,
    "kept": REUSED,
    "inline": THREAD,
}


def spread(median, noise=0.01, n=9):
    """Return n rounds around a median, whose quartiles lie `noise` of it to either side."""
    return [median * (1 + noise * 2 * (2 * index / (n - 1) - 1)) for index in range(n)]


def benchmark(group, strategy, seconds, *rest, **record):
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (0, 0, 0)
    made = Record(
        group=group, strategy=strategy, isolation=ISOLATION.get(strategy, FRESH), cpu="A CPU", machine="m1",
    )  # fmt: skip
    return {
        "name": name_of(group, strategy, *rest),
        "group": group,
        "stats": {"median": statistics.median(seconds), "iqr": high - low, "data": seconds},
        "extra_info": {KEY: made.as_dict() | record},
    }


def strategy(
    name, median, *, noise=0.01, compute=0.4, host=500, residual=None, peak=None, digest="d", survived=3,
    usable=True, out_of_memory=0, warm=None, n=9, workload="cnn", **record,
):  # fmt: skip
    """Return the benchmarks of one strategy: a round of ten clients, two at once, and what goes with it."""
    memory = {
        "host_peak_bytes": host * MIB,
        "device_peak_bytes": None if peak is None else peak * MIB,
        "device_residual_bytes": None if residual is None else residual * MIB,
        "device_end_bytes": None if residual is None else 0,
    }
    common = {"workload": workload, "clients": 10, "workers": 2} | record
    made = [
        benchmark(
            "round", name, spread(median, noise, n), workload, compute_seconds=compute, digest=digest,
            **common,
        ),
        benchmark(
            "footprint", name, [median], workload, memory=memory, tasks=100, out_of_memory=out_of_memory,
            emulated="emulated:24GiB" if peak is not None else None, **common,
        ),
        benchmark("faults", name, [0.1], faults={"survived": survived, "others": 3, "usable": usable}),
    ]  # fmt: skip
    if warm is not None:
        made.append(benchmark("start-up", name, spread(warm), "warm", variant="warm"))
    return made


def write(path, *strategies, failed=None, missing=None, planned=None, **content):
    """Write a file as `fedexec bench` does."""
    benchmarks = [one for made in strategies for one in made]
    names = [one["name"] for one in benchmarks] if planned is None else planned
    course = Course(
        mode="quick", planned=[*names, *(failed or {})], failed=failed or {}, missing=missing or {}
    )
    whole = {
        "machine_info": {"cpu": {"brand_raw": "A CPU", "count": 2}},
        "commit_info": {"id": "0123456789abcdef"},
        "datetime": "2026-01-02T03:04:05",
        "version": "5.1.0",
        "benchmarks": benchmarks,
        KEY: course.as_dict(),
    }
    path.write_text(json.dumps(whole | content))
    return path


def of_schema(path, schema=SCHEMA + 1):
    """Have a file say that it is of another schema."""
    content = json.loads(path.read_text())
    content[KEY]["schema"] = schema
    path.write_text(json.dumps(content))
    return path


def whole(path):
    """Write a file in which everything was measured, of five strategies and a peer."""
    made = []
    for name, median, peak, residual, host, beside in (
        ("inline", 1.00, 520, 520, 640, 0.0),
        ("standby", 1.04, 1000, 0, 1000, 0.006),
        ("pool", 1.10, 1000, 0, 1050, 0.02),
        ("process", 1.60, 1000, 0, 1020, 0.12),
        ("loky", 1.02, 1000, 1000, 1010, 0.002),
        ("tutorial", 15.0, 1000, 0, 1900, 3.0),
    ):
        parts = strategy(
            name, median, compute=0.4, host=host, residual=residual, peak=peak, warm=beside + 0.001,
            survived=0 if name == "inline" else 3, peer=name == "tutorial", noise=0.02,
        )  # fmt: skip
        extra = {part["group"]: part["extra_info"][KEY] for part in parts}
        extra["round"]["phases"] = {
            "start": beside * 0.2, "import": beside * 0.6, "transfer": 0.002 + beside * 0.1, "compute": 0.2,
            "exit": beside * 0.1,
        }  # fmt: skip
        extra["footprint"]["memory"]["timeline"] = _timeline(median, peak * MIB, residual * MIB, host * MIB)
        for workers in (1, 2, 4):
            at_once = {"workload": "cnn", "clients": 10, "workers": workers, "variant": "workers"}
            parts.append(
                benchmark(
                    "scaling", name, spread(2 * median / min(workers, 2)), f"cnn/w-{workers}", **at_once
                )
            )
        parts.append(benchmark("start-up", name, spread(1.5 + beside), "cold", variant="cold"))
        made.append(parts)
    return write(path, *made, missing={"ray-warm": "ray is not installed"})


def _timeline(median, peak, residual, host):
    """Return three rounds, one after the other, of what a timeline would have seen."""
    seconds = [index * median / 20 for index in range(66)]
    busy = [1 <= index % 20 <= 17 and index < 60 for index in range(66)]
    held = [peak if now else residual if index > 1 else 0 for index, now in enumerate(busy)]
    marks = [
        {
            "seconds": number * median, "label": "round", "server_round": number, "host_bytes": host // 2,
            "device_bytes": {"GPU": residual},
        }
        for number in (1, 2, 3)
    ]  # fmt: skip
    marks.append(marks[-1] | {"seconds": seconds[-1], "label": "shutdown", "device_bytes": {"GPU": 0}})
    held[-1] = 0
    return {
        "began": 0.0,
        "host": {
            "peak_bytes": host,
            "seconds": seconds,
            "bytes": [host if now else host // 2 for now in busy],
        },
        "devices": {"GPU": {"name": "EMULATED", "peak_bytes": peak, "seconds": seconds, "bytes": held}},
        "marks": marks,
    }
