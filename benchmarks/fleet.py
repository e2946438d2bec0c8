"""SwapNet's scenarios under one cap: several CNNs at once, closed loop, each run in a memory cgroup of its own.

    python benchmarks/fleet.py WEIGHTS [SCENARIO ...] [--requests N] [--caps paper 25 40 60 80] [--policies ...]
        [--disk MB/s]

Root; one to two minutes a run. The cap is what weights and activations may take above the floor (the process with every
skeleton and kernel, before any weight), which is measured first; the cgroup's limit is cap + floor. Each model has one
client that sends its next request when the last is answered; the requests are shared out evenly. Each client's first
three requests, one a picture, come before the clock starts, here as with the resident modules: memory is touched and
kernels are built. The fleet and the resident modules are measured in turns, some seconds each, because the machine's
speed changes within minutes. Every output is compared, by digest, with that of the plain resident module. Rows are
added to docs/fleet.json, and docs/fleet.md is made from them. WEIGHTS holds what examples/vision/weights.py writes.
`--peer PYTHON` also runs accelerate's disk offload with an interpreter that has it (`make peers`).
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from conditions import DISKS, DOCS, MIB, cold_run, evict, taken
from fleet_table import FREE, markdown
from turns import conduct

SCENARIOS = {
    "self-driving": (843, ("yolov3", "fcn-resnet101", "vgg19", "resnet101")),
    "road-side unit": (900, ("yolov3", "yolov3", "resnet101", "resnet101", "vgg19")),
    "UAV": (1000, ("yolov3", "resnet101")),
}
"""SwapNet's budgets in MiB, and its models. Its FCN has 207 MB, which is FCN on ResNet-101; on ResNet-50 it is 135."""
RESULTS = DOCS / "fleet.json"
POLICIES = ("as published", "round-robin", "deadline")
"""As published: SwapNet's rotation, each block swapped out after its turn. "round-robin" keeps what fits."""
BESIDE_ROUNDS = 20
QUIET = 0.03
"""Of the cores' time, that other processes may take during a run."""
ATTEMPTS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--caps", nargs="*", default=["paper", "25", "40", "60", "80"])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--baselines", action="store_true", help="measure what is compared with again")
    parser.add_argument("--disk", choices=DISKS, default=FREE, help="as it is, or MB/s")
    parser.add_argument("--peer", help="a Python that has accelerate")
    parser.add_argument("--delays", action="store_true", help="fit the delay model of each CNN first")
    parser.add_argument("--table", action="store_true", help="make the page only")
    options = parser.parse_args()
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"references": {}, "runs": []}
    if options.delays:
        kinds = sorted({kind for _, names in SCENARIOS.values() for kind in names})
        document["delays"] = {kind: run_apart(options.weights, what="delays", kind=kind) for kind in kinds}
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    for scenario in [] if options.table else options.scenarios:
        measure(scenario, options, document)
    (DOCS / "fleet.md").write_text(markdown(document))


def measure(scenario: str, options: argparse.Namespace, document: dict) -> None:
    paper, kinds = SCENARIOS[scenario]
    rounds = max(1, options.requests // len(kinds))
    known = document["references"].setdefault(scenario, {})

    def save() -> None:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")

    def refer(where: dict, key: str, make: Callable[[], object]) -> None:
        if options.baselines or key not in where:
            where[key] = make()
            save()

    refer(known, "probe", lambda: run_apart(options.weights, what="probe", kinds=kinds))
    refer(known, "resident", lambda: quiet(options.weights, what="resident", kinds=kinds, rounds=rounds))
    refer(
        known,
        "plain_bytes",
        lambda: [run_apart(options.weights, what="plain", kind=kind)["bytes"] for kind in kinds],
    )
    floor_bytes, demand_bytes = known["probe"]["floor_bytes"], known["probe"]["demand_bytes"]
    capped = {"limit_bytes": floor_bytes + paper * MIB, "disk": options.disk}
    refer(
        known.setdefault("reload", {}), options.disk,
        lambda: quiet(options.weights, **capped, what="reload", kinds=kinds, rounds=4),
    )  # fmt: skip
    if options.peer:
        refer(
            known.setdefault("accelerate", {}), options.disk,
            lambda: run_accelerate(options.weights, options.peer, kinds, capped),
        )  # fmt: skip
    yardstick = partial(run_apart, options.weights, what="resident", kinds=kinds, rounds=rounds)
    for cap, policy in itertools.product(options.caps, options.policies):
        cap_bytes = paper * MIB if cap == "paper" else demand_bytes * int(cap) // 100
        limit_bytes = cap_bytes + floor_bytes
        run = partial(
            run_apart, options.weights, limit_bytes, disk=options.disk,
            what="fleet", kinds=kinds, policy=policy, rounds=rounds, budget_bytes=limit_bytes,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            plain, row = conduct(Path(folder), rounds, (yardstick, run))
        row["resident"] = {key: plain[key] for key in ("seconds", "turn_seconds", "model_seconds")}
        if "models" in row and cap == "paper":
            row["beside"] = beside_reading(options.weights, kinds, row, rounds)
        key = {"scenario": scenario, "cap": cap, "policy": policy, "disk": options.disk}
        row |= key | {"cap_bytes": cap_bytes, "limit_bytes": limit_bytes}
        made = taken()
        row |= {"at": made["date"], "commit": made["commit"]}
        if "digests" in row:
            row["identical"] = row.pop("digests") == known["resident"]["digests"]
        document["runs"] = [one for one in document["runs"] if not key.items() <= one.items()] + [row]
        save()
        print(*key.values(), {k: v for k, v in row.items() if k not in ("models", "quotas", *key)}, flush=True)


def beside_reading(weights: Path, kinds: Sequence[str], row: dict, rounds: int) -> dict:
    """Resident modules, and in turns with them the same beside which as many bytes are read as by the fleet."""
    nbytes = sum(one["bytes_read"] for one in row["models"].values()) // rounds
    run = partial(run_apart, weights, what="resident", kinds=kinds, rounds=BESIDE_ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        calls = (run, partial(run, read_bytes=nbytes, window_bytes=sum(row["windows"].values())))
        plain, beside = conduct(Path(folder), BESIDE_ROUNDS, calls)
    return {"turn_seconds": beside["turn_seconds"], "resident_turn_seconds": plain["turn_seconds"]}


def run_accelerate(weights: Path, python: str, kinds: Sequence[str], capped: dict) -> dict:
    with tempfile.TemporaryDirectory(dir=weights) as folder:
        run_apart(weights, python=python, what="split", kinds=kinds, folder=folder)
        return quiet(weights, **capped, python=python, what="accelerate", kinds=kinds, rounds=4, folder=folder)


def quiet(weights: Path, limit_bytes: int | None = None, **options: object) -> dict:
    """The first of a few runs that other processes left alone, or the one that they disturbed least."""
    best: dict = {}
    for _ in range(ATTEMPTS):
        row = run_apart(weights, limit_bytes, **options)
        if not best or row.get("disturbed", 0.0) < best["disturbed"]:
            best = {"disturbed": 0.0} | row
        if best["disturbed"] <= QUIET:
            break
    return best


def run_apart(
    weights: Path, limit_bytes: int | None = None, *, disk: str = FREE, python: str = sys.executable, **what: object
) -> dict:
    """One run in a process of its own, in a cgroup where there is a limit; the weights are evicted first."""
    command = [python, str(Path(__file__).with_name("fleet_runs.py")), str(weights.resolve()), json.dumps(what)]
    if limit_bytes is None:
        evict(weights)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    run = cold_run(command, weights, limit_bytes=limit_bytes, disk=disk, timeout_seconds=280)
    charged = {"charged_bytes": run.peak_bytes, "oom_kills": run.oom_kills, "major_faults": run.major_faults}
    if run.returncode:
        return charged | {"error": (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]}
    return json.loads(run.stdout.splitlines()[-1]) | charged


if __name__ == "__main__":
    main()
