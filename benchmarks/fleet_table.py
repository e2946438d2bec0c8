"""docs/fleet.md from docs/fleet.json: a table for each scenario, and what stands behind it."""

__all__ = ["markdown"]

MIB = 2**20
ORDER = ("25", "40", "60", "paper", "80")


def markdown(document: dict) -> str:
    """The page."""
    lines = [
        "# Several models under one cap",
        "",
        "SwapNet's scenarios (arXiv 2401.16757), made by `benchmarks/fleet.py`: each row is one process in a memory",
        "cgroup of cap + floor, swap off, weights evicted first. One client a model, closed loop. *Overhead*: against",
        "the same requests through plain resident modules, one after the other in one thread. *Bound* is the longer of",
        "computing (as measured while adding the models) and of reading what the quotas do not keep. Random weights in",
        "the published shapes: 224 pixels a side, YOLOv3 320.",
        "",
    ]
    for scenario, reference in document["references"].items():
        rows = [run for run in document["runs"] if run["scenario"] == scenario]
        if rows:
            lines += _scenario(scenario, reference, rows)
    return "\n".join(lines).rstrip() + "\n"


def _scenario(scenario: str, reference: dict, rows: list[dict]) -> list[str]:
    round_seconds = sum(reference["resident_seconds"])
    demand = reference["demand_bytes"]
    names = list(reference["weight_bytes"])
    lines = [
        f"## {scenario}",
        "",
        f"Demand {demand / MIB:.0f} MiB (weights {sum(reference['weight_bytes'].values()) / MIB:.0f}), floor "
        f"{reference['floor_bytes'] / MIB:.0f} MiB, resident {round_seconds:.2f} s a round.",
        "",
        "| cap, MiB (of demand) | policy | requests | identical | peak above floor, MiB | OOM | makespan, s | overhead "
        "| predicted, s | bound, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = sorted(rows, key=lambda row: (row["cap_bytes"], row["policy"]))
    for row in rows:
        cap = f"{row['cap_bytes'] / MIB:.0f} ({row['cap_bytes'] / demand:.0%}{', SwapNet' * (row['cap'] == 'paper')})"
        if "error" in row:
            lines.append(f"| {cap} | {row['policy']} | {row['error']} | | | {row['oom_kills']} | | | | |")
            continue
        resident = round_seconds * row["requests"] / len(names)
        lines.append(
            f"| {cap} | {row['policy']} | {row['requests']} | {'yes' if row['identical'] else 'NO'} "
            f"| {(row['peak_bytes'] - row['floor_bytes']) / MIB:.0f} | {row['oom_kills']} | {row['seconds']:.1f} "
            f"| {row['seconds'] / resident - 1:+.0%} | {row['predicted_seconds']:.1f} | {row['bound_seconds']:.1f} |"
        )
    lines += [
        "",
        "Latency of each model from request to answer, which includes waiting for the others' turns, and (last column)",
        "its seconds alone and resident; and the share of its weights and activations that its quota leaves out.",
        "",
        "| model | " + " | ".join(_head(row) for row in rows if "error" not in row) + " | resident, alone |",
        "|---" * (len([row for row in rows if "error" not in row]) + 2) + "|",
    ]
    for index, name in enumerate(names):
        cells = []
        for row in rows:
            if "error" not in row:
                needed = reference["weight_bytes"][name] + reference["activation_bytes"][name]
                held = row["quotas"][name] + reference["activation_bytes"][name]
                cells.append(f"{row['models'][name]['latency_seconds']:.2f} s, -{max(0, 1 - held / needed):.0%}")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {reference['resident_seconds'][index]:.2f} s |")
    again = reference["reload"]
    if "error" in again:
        lines += ["", f"Each model loaded anew for each request, in the cgroup of SwapNet's cap: {again['error']}."]
    else:
        best = max((row["requests"] / row["seconds"] for row in rows if row["cap"] == "paper" and "error" not in row),
                   default=0.0)  # fmt: skip
        rate = again["requests"] / again["seconds"]
        lines += [
            "",
            f"Each model loaded anew for each request (safetensors, plain modules), in the cgroup of SwapNet's cap: "
            f"{rate:.2f} requests a second; the better policy here {best:.2f}, {best / rate:.1f} times as many.",
        ]
    return [*lines, ""]


def _head(row: dict) -> str:
    return f"{row['cap']}{'' if row['cap'] == 'paper' else ' %'} {row['policy']}"
