"""SwapNet's scenarios under one cap: four or five CNNs at once, closed loop, each run in a memory cgroup of its own.

    python benchmarks/fleet.py WEIGHTS [SCENARIO ...] [--requests N] [--caps paper 25 40 60 80] [--policies ...]

Root; about a minute a run. The cap is what weights and activations may take above the floor (the process with every
skeleton and kernel, before any weight), which is measured first; the cgroup's limit is cap + floor. Each model has one
client that sends its next request when the last is answered; the requests are shared out evenly. Every output is
compared, by digest, with that of the plain resident module. Rows are added to docs/fleet.json; docs/fleet.md is made
from them. WEIGHTS holds what examples/vision/weights.py writes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "examples" / "vision")]

MIB = 2**20
SCENARIOS = {
    "self-driving": (843, ("yolov3", "fcn-resnet101", "vgg19", "resnet101")),
    "road-side unit": (900, ("yolov3", "yolov3", "resnet101", "resnet101", "vgg19")),
    "UAV": (1000, ("yolov3", "resnet101")),
}
"""SwapNet's budgets in MiB, and its models. Its FCN has 207 MB, which is FCN on ResNet-101; on ResNet-50 it is 135."""
SCENES = ("road", "junction", "field")
RESULTS = ROOT / "docs" / "fleet.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--caps", nargs="+", default=["paper", "25", "40", "60", "80"])
    parser.add_argument("--policies", nargs="+", default=["round-robin", "deadline"])
    parser.add_argument("--baselines", type=int, default=0, help="rounds of the resident and the reloading baseline")
    parser.add_argument("--child", help="(internal) one run, as JSON")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[json.loads(options.child)["what"]](options.weights, **json.loads(options.child))))
        return
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"references": {}, "runs": []}
    for scenario in options.scenarios:
        measure(scenario, options, document)
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    from fleet_table import markdown

    (ROOT / "docs" / "fleet.md").write_text(markdown(document))


def measure(scenario: str, options: argparse.Namespace, document: dict) -> None:
    paper, names = SCENARIOS[scenario]
    known = document["references"].get(scenario)
    if known is None or options.baselines:
        rounds = options.baselines or 3
        known = child(options.weights, what="probe", scenario=scenario)
        known |= child(options.weights, what="resident", scenario=scenario, rounds=rounds)
        limit_bytes = known["floor_bytes"] + paper * MIB
        known |= {
            "reload": child(options.weights, limit_bytes, what="reload", scenario=scenario, rounds=min(rounds, 4))
        }
        document["references"][scenario] = known
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    for cap in options.caps:
        cap_bytes = paper * MIB if cap == "paper" else known["demand_bytes"] * int(cap) // 100
        for policy in options.policies:
            limit_bytes = cap_bytes + known["floor_bytes"]
            row = child(
                options.weights, limit_bytes, what="fleet", scenario=scenario, policy=policy,
                rounds=max(1, options.requests // len(names)), budget_bytes=limit_bytes,
            )  # fmt: skip
            row |= {"scenario": scenario, "cap": cap, "cap_bytes": cap_bytes, "limit_bytes": limit_bytes}
            row |= {"policy": policy, "at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
            if "digests" in row:
                row["identical"] = row.pop("digests") == known["digests"]
            document["runs"] = [
                r for r in document["runs"] if (r["scenario"], r["cap"], r["policy"]) != (scenario, cap, policy)
            ] + [row]
            RESULTS.write_text(json.dumps(document, indent=1) + "\n")
            print(scenario, cap, policy, {k: v for k, v in row.items() if k not in ("models", "quotas")}, flush=True)


def child(weights: Path, limit_bytes: int | None = None, **what: object) -> dict:
    """One run in a process of its own, in a cgroup where there is a limit; the weights are evicted first."""
    for path in sorted(weights.glob("*.safetensors")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, str(weights), "--child", json.dumps(what)]
    if limit_bytes is None:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    from capped import run_capped

    run = run_capped(command, limit_bytes=limit_bytes, timeout_seconds=280)
    charged = {"charged_bytes": run.peak_bytes, "oom_kills": run.oom_kills, "major_faults": run.major_faults}
    if run.returncode:
        return charged | {"error": (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]}
    return json.loads(run.stdout.splitlines()[-1]) | charged


def probe(weights: Path, *, scenario: str, **_: object) -> dict:
    """The floor, and the bytes that all models would take at once: weights, and activations of a request of each."""
    fleet, _, names = make_fleet(weights, scenario, limit_bytes=64 * 2**30, policy="deadline")
    with fleet:
        plan = fleet.start()
        bytes_of = {name: fleet.report().models[name].weight_bytes for name in names}
        activations = {name: fleet.candidates[name].activation_bytes for name in names}
    return {
        "floor_bytes": plan.floor_bytes,
        "demand_bytes": sum(bytes_of.values()) + sum(activations.values()),
        "weight_bytes": bytes_of,
        "activation_bytes": activations,
    }


def fleet_run(weights: Path, *, scenario: str, policy: str, rounds: int, budget_bytes: int, **_: object) -> dict:
    fleet, inputs, names = make_fleet(weights, scenario, limit_bytes=budget_bytes, policy=policy)
    digests: dict[str, list[str]] = {name: ["", "", ""] for name in names}

    def client(name: str) -> None:
        for number in range(rounds):
            output = fleet.submit(name, inputs[name][number % 3]).result()
            found = digest(output)
            before = digests[name][number % 3]
            digests[name][number % 3] = found if before in ("", found) else "differs"

    with fleet:
        plan = fleet.start()
        clients = [threading.Thread(target=client, args=(name,)) for name in names]
        start = time.perf_counter()
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        seconds = time.perf_counter() - start
        report = fleet.report()
    return {
        "requests": rounds * len(names),
        "seconds": seconds,
        "predicted_seconds": report.predicted_seconds[plan.policy],
        "bound_seconds": report.bound_seconds,
        "bytes_per_second": plan.bytes_per_second,
        "peak_bytes": report.peak_bytes,
        "floor_bytes": plan.floor_bytes,
        "max_active": plan.max_active,
        "window": next(iter(plan.plans.values())).granularity,
        "quotas": dict(plan.quotas),
        "models": {
            name: {
                "latency_seconds": one.latency_seconds,
                "predicted_latency_seconds": one.predicted_latency_seconds,
                "bytes_read": one.bytes_read,
            }
            for name, one in report.models.items()
        },
        "digests": [digests[name][: min(3, rounds)] for name in names] if rounds >= 3 else None,
    }


def make_fleet(weights: Path, scenario: str, *, limit_bytes: int, policy: str) -> tuple:
    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of

    import hermes

    fleet = hermes.Fleet(budget=limit_bytes, policy=policy)
    names, inputs = [], {}
    for number, kind in enumerate(SCENARIOS[scenario][1]):
        name = f"{kind} {number}"
        with torch.device("meta"):
            module = MODELS[kind].build()
        inputs[name] = [tensor_of(paint(scene), MODELS[kind].side) for scene in SCENES]
        fleet.add(name, module, weights / f"{kind}.safetensors", example_args=(inputs[name][0],))
        names.append(name)
    return fleet, inputs, names


def resident(weights: Path, *, scenario: str, rounds: int, **_: object) -> dict:
    """Plain modules, all in memory, one request after the other in one thread: the swap-free yardstick."""
    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of
    from safetensors.torch import load_file

    modules, inputs, digests = [], [], []
    for kind in SCENARIOS[scenario][1]:
        module = MODELS[kind].build()
        module.load_state_dict(load_file(weights / f"{kind}.safetensors"))
        modules.append(module)
        inputs.append([tensor_of(paint(scene), MODELS[kind].side) for scene in SCENES])
    with torch.no_grad():
        for module, pixels in zip(modules, inputs, strict=True):
            digests.append([digest(module(x)) for x in pixels])  # and the kernels are warm
        seconds = [0.0] * len(modules)
        for number in range(rounds):
            for index, module in enumerate(modules):
                start = time.perf_counter()
                module(inputs[index][number % 3])
                seconds[index] += time.perf_counter() - start
    return {"digests": digests, "resident_seconds": [total / rounds for total in seconds]}


def reload(weights: Path, *, scenario: str, rounds: int, **_: object) -> dict:
    """Each model alone, loaded anew for each request: what fits any cap that the largest model fits."""
    import gc

    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of
    from safetensors import safe_open

    start, requests = time.perf_counter(), 0
    for number in range(rounds):
        for kind in SCENARIOS[scenario][1]:
            with torch.device("meta"):
                module = MODELS[kind].build()
            with safe_open(weights / f"{kind}.safetensors", "pt") as file:
                module.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, assign=True)
            with torch.no_grad():
                module(tensor_of(paint(SCENES[number % 3]), MODELS[kind].side))
            del module
            gc.collect()
            requests += 1
    return {"seconds": time.perf_counter() - start, "requests": requests}


def digest(output: object) -> str:
    """Of every bit of a tensor, or of a dictionary of tensors."""
    found = hashlib.sha256()
    for tensor in output.values() if isinstance(output, dict) else (output,):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


CHILDREN = {"probe": probe, "fleet": fleet_run, "resident": resident, "reload": reload}

if __name__ == "__main__":
    main()
