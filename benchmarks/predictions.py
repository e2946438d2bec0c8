"""What the planner predicts against what happens, and its choice against every plan that it could have made.

    python benchmarks/predictions.py grid [--model NAME]... [--disk free|250|500]... [--samples N]
    python benchmarks/predictions.py choice [--model NAME]... [--budget SIZE]

*grid*: for each model, budget and disk, a process in a memory cgroup of the budget, the plan chosen; seconds of all
its passes and its peak, predicted and measured. *choice*: plans of every granularity, number of agents and window are
given to the same run, one after the other; the fastest three and the planner's own are then run in turns, three times
each, because the fastest of many noisy runs is fast by luck. Rows go to docs/predictions.json, and from there into
docs/results.md.
"""

import argparse

import results
from comparators import PEERS
from conditions import DISKS, MODELS, ROOT, median, profile, taken
from rows import keep
from suite import one_run

from hermes.checkpoint.synth import synth
from hermes.units import parse_bytes

BUDGETS = {
    "bert-large": ("400MiB", "600MiB", "1GiB"),
    "vit-large": ("400MiB", "600MiB", "1GiB"),
    "gpt2-medium": ("400MiB", "600MiB", "1GiB"),
    "llama-3b": ("640MiB", "2GiB", "4GiB"),
    "gpt-j-6b": ("700MiB", "3GiB", "6GiB"),
}
GRANULARITIES = ("leaf", "half", "layer")
AGENTS = (2, 4)
WINDOWS = (1.0, 2.0, 4.0, 8.0)
FINALISTS = 3


def plan_of(run: dict) -> str:
    """In words."""
    return f"{run['granularity']}, {run['num_agents']} agents, window {run['ring_bytes'] >> 20} MiB"


def grid(name: str, disk: str, samples: int) -> list[dict]:
    """A row for each budget."""
    model = synth(name, ROOT / "models" / name)
    profile(name, model, disk)
    rows = []
    for budget in BUDGETS[name]:
        runs = [one_run(PEERS["hermes"], model, parse_bytes(budget), disk) for _ in range(samples)]
        if why := next((run["error"] for run in runs if "error" in run), None):
            print(name, budget, disk, why, flush=True)
            continue
        for run in runs:
            run["measured_seconds"] = sum(run["pass_seconds"])
        row = {
            "kind": "grid", "model": name, "budget": budget, "disk": disk,
            "predicted": {key: median(runs, f"predicted_{key}") for key in ("seconds", "peak_bytes")},
            "measured": {"seconds": median(runs, "measured_seconds"), "peak_bytes": median(runs, "peak_bytes")},
            "plan": plan_of(runs[0]), "taken": taken(), "runs": runs,
        }  # fmt: skip
        errors = (f"{results.error(row, field):+.1%}" for field in ("seconds", "peak_bytes"))
        print(name, budget, disk, *errors, row["plan"], flush=True)
        rows.append(row)
    return rows


def choice(name: str, budget: str) -> list[dict]:
    """One row: every plan once, then the finals."""
    model = synth(name, ROOT / "models" / name)
    profile(name, model, "free")

    def seconds(arguments: tuple[str, ...]) -> tuple[float, str] | None:
        run = one_run(PEERS["hermes"], model, parse_bytes(budget), "free", *arguments)
        if "error" in run:
            print(name, budget, *arguments, run["error"], flush=True)
            return None
        return sum(run["pass_seconds"]), plan_of(run)

    tried: dict[tuple[str, ...], tuple[float, str]] = {}
    for granularity in GRANULARITIES:
        for agents in AGENTS:
            for window in WINDOWS:
                arguments = ("streamed", granularity, str(agents), str(window))
                if (found := seconds(arguments)) is None:
                    break  # a larger window fits still less
                print(name, budget, *arguments, f"{found[0]:.2f} s", flush=True)
                tried[arguments] = found
    best = sorted(tried, key=lambda arguments: tried[arguments][0])[:FINALISTS]
    finals: dict[tuple[str, ...], list[tuple[float, str]]] = {arguments: [] for arguments in [(), *best]}
    for _ in range(3):
        for arguments, runs in finals.items():
            if (found := seconds(arguments)) is not None:
                runs.append(found)
    finalists = [
        {"plan": runs[0][1], "seconds": sorted(s for s, _ in runs)[len(runs) // 2], "samples": [s for s, _ in runs]}
        for runs in finals.values()
    ]
    for finalist in finalists:
        print(name, budget, finalist, flush=True)
    return [
        {
            "kind": "choice", "model": name, "budget": budget, "disk": "free", "finalists": finalists,
            "tried": [{"plan": plan, "seconds": s} for s, plan in tried.values()], "taken": taken(),
        }
    ]  # fmt: skip


KEYS = ("kind", "model", "budget", "disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("grid", "choice"))
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--disk", action="append", choices=DISKS)
    parser.add_argument("--budget", default="600MiB")
    parser.add_argument("--samples", type=int, default=1)
    options = parser.parse_args()
    for name in options.model or ("bert-large", "vit-large", "gpt2-medium"):
        if options.kind == "choice":
            keep("predictions", choice(name, options.budget), keys=KEYS)
            continue
        for disk in options.disk or ("free", "500", "250"):
            keep("predictions", grid(name, disk, options.samples), keys=KEYS)
    results.write()


if __name__ == "__main__":
    main()
