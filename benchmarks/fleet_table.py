"""docs/fleet.md from docs/fleet.json: a table for each scenario, and what stands behind it."""

import statistics

from turns import ROUNDS

__all__ = ["FREE", "markdown"]

MIB = 2**20
FREE = "free"
"""The disk without a limit."""
PAPER = {"self-driving": "57 to 83 %", "road-side unit": "63 to 79 %", "UAV": "64 to 75 %"}
"""SwapNet's memory reduction per model."""


def markdown(document: dict) -> str:
    """The page."""
    lines = [
        "# Several models under one cap",
        "",
        "`hermes.Fleet` and `hermes fleet run` give several models one budget ([ARCHITECTURE.md](../ARCHITECTURE.md)",
        "says how). Below are SwapNet's scenarios (arXiv 2401.16757), made by `python benchmarks/fleet.py`: each row",
        "is one process in a memory cgroup of cap + floor, swap off, weights evicted first. One client a model, closed",
        "loop; each client's first three requests come before the clock. Random weights in the published shapes: 224",
        "pixels a side, YOLOv3 320. Raw samples are in [fleet.json](fleet.json).",
        "",
        "- *Overhead*: against the same requests through plain resident modules, one after the other in one thread, in",
        f"  another process; both in turns of {ROUNDS} rounds at most, after an uncounted one; the median of ratios.",
        "- *Bound*: that resident makespan, or where it is longer the time to read what has no room under the cap",
        "  beside one request's activations, at the disk's measured rate: no schedule is faster.",
        "- *As published*: SwapNet's rotation, block by block round all models, as many as fit; each block is swapped",
        "  in, executed and swapped out, through a window that takes the model's quota. *Round-robin* is the same",
        "  rotation, but keeps of each model what fits beside a window, as *deadline* does. *At once*: requests under",
        "  way.",
        "- *Identical*: every output has the bits of the plain resident module's.",
        "- *Disturbed*: share of the cores that other processes took meanwhile, where it is more than 3 %.",
        "- *Source*: the commit that the row was made with. Rows of different ones are from different days and",
        "  processors: their ratios may be compared, their seconds not.",
        "",
    ]
    for scenario, reference in document["references"].items():
        rows = [run for run in document["runs"] if run["scenario"] == scenario]
        if rows:
            lines += _scenario(scenario, reference, sorted(rows, key=lambda row: (row["cap_bytes"], row["policy"])))
    if "delays" in document:
        lines += _delays(document["delays"])
    return "\n".join(lines).rstrip() + "\n"


def _scenario(scenario: str, reference: dict, rows: list[dict]) -> list[str]:
    probe, resident = reference["probe"], reference["resident"]
    demand, names = probe["demand_bytes"], list(probe["weight_bytes"])
    lines = [
        f"## {scenario}",
        "",
        f"Demand {demand / MIB:.0f} MiB (weights {sum(probe['weight_bytes'].values()) / MIB:.0f}, a request of "
        f"each {sum(probe['activation_bytes'].values()) / MIB:.0f}), floor "
        f"{probe['floor_bytes'] / MIB:.0f} MiB. "
        f"Resident: {resident['requests']} requests in {resident['seconds']:.1f} s{_disturbed(resident)}.",
        "",
        "| cap, MiB (of demand) | policy, at once | requests | identical | OOM kills | peak, MiB (of cap + floor) "
        "| makespan, s | overhead | bound, s | over bound | predicted, s | read a round, MiB | source |",
        "|---" * 13 + "|",
    ]
    for row in rows:
        cap = f"{row['cap_bytes'] / MIB:.0f} ({row['cap_bytes'] / demand:.0%}{', SwapNet' * (row['cap'] == 'paper')})"
        cap += "" if row["disk"] == FREE else f", disk {row['disk']} MB/s"
        if "error" in row:
            lines.append(
                f"| {cap} | {row['policy']} | {row['error']} | | | {row['oom_kills']} | | | | | | | {row['commit']} |"
            )
            continue
        rounds = row["requests"] // len(names)
        bound = _bound_seconds(reference, row)
        overhead = _over(row["turn_seconds"], row["resident"]["turn_seconds"])
        read = sum(one["bytes_read"] for one in row["models"].values()) / rounds
        cells = [
            cap,
            f"{row['policy']}, {row['max_active']}",
            row["requests"],
            "yes" if row["identical"] else "NO",
            row["oom_kills"],
            f"{row['peak_bytes'] / MIB:.0f} ({row['peak_bytes'] / row['limit_bytes']:.1%})",
            f"{row['seconds']:.1f}{_disturbed(row)}",
            f"{overhead:+.1%}",
            f"{bound:.1f}",
            f"{row['seconds'] / bound - 1:+.1%}",
            f"{row['predicted_seconds']:.1f} ({row['predicted_seconds'] / row['seconds'] - 1:+.0%})",
            f"{read / MIB:.0f}",
            row["commit"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    fine = [row for row in rows if "error" not in row]
    free = [row for row in fine if row["disk"] == FREE]
    lines += ["", *_beside(free), *_latencies(reference, free, names), ""]
    lines += [*_memory(scenario, reference, free, names), ""]
    return [*lines, *_alternatives(reference, fine), ""]


def _over(turns: list[float], resident_turns: list[float]) -> float:
    """How much longer the turns took than those beside them; the median."""
    return statistics.median(own / resident for own, resident in zip(turns, resident_turns, strict=True)) - 1


def _beside(rows: list[dict]) -> list[str]:
    """What reading alone costs."""
    lines = []
    for row in rows:
        if one := row.get("beside"):
            over = _over(one["turn_seconds"], one["resident_turn_seconds"])
            lines += [
                f"Resident modules beside which as many bytes are read as with {_head(row)}, and nobody needs them: "
                f"{over:+.1%} over resident modules alone, in turns as above.",
                "",
            ]
    return lines


def _latencies(reference: dict, rows: list[dict], names: list[str]) -> list[str]:
    """What a request takes once it has begun, and from being sent."""
    everyone = sum(statistics.median(one) for one in reference["resident"]["model_seconds"])
    lines = [
        "Latency of a request, ms, medians: from its beginning to its answer, against the resident module;",
        f"in brackets from being sent, with the others' turns (resident, in the same loop: {1e3 * everyone:.0f}).",
        "",
        "| model | resident | " + " | ".join(_head(row) for row in rows) + " |",
        "|---" * (len(rows) + 2) + "|",
    ]
    for index, name in enumerate(names):
        usual = 1e3 * statistics.median(reference["resident"]["model_seconds"][index])
        cells = []
        for row in rows:
            one = row["models"][name]
            alone = 1e3 * statistics.median(row["resident"]["model_seconds"][index])
            served, sent = (1e3 * statistics.median(one[key]) for key in ("served_seconds", "latency_seconds"))
            cells.append(f"{served:.0f}, {served - alone:+.0f} ({sent:.0f})")
        lines.append(f"| {name} | {usual:.0f} | " + " | ".join(cells) + " |")
    return lines


def _memory(scenario: str, reference: dict, rows: list[dict], names: list[str]) -> list[str]:
    """Held by each model against what it is, and what the cap allows."""
    probe, plain = reference["probe"], reference["plain_bytes"]
    lines = [
        "Memory that a model does not hold, of its weights and a request's activations; in brackets, of what its",
        f"plain run takes at its peak, as SwapNet counts ({PAPER[scenario]}): module made, file loaded, request",
        f"answered ({', '.join(f'{nbytes / MIB:.0f}' for nbytes in plain)} MiB). *All* follows from the cap alone.",
        "",
        "| cap | " + " | ".join(names) + " | all |",
        "|---" * (len(names) + 2) + "|",
    ]
    for row in rows:
        cells = []
        for name, plain_bytes in zip(names, plain, strict=True):
            weights, activations = probe["weight_bytes"][name], probe["activation_bytes"][name]
            held = min(row["quotas"][name], weights) + activations
            cells.append(f"{1 - held / (weights + activations):.0%} ({1 - held / plain_bytes:.0%})")
        allowed = max(0.0, 1 - row["cap_bytes"] / probe["demand_bytes"])
        everything = max(0.0, 1 - row["cap_bytes"] / sum(plain))
        lines.append(f"| {_head(row)} | " + " | ".join(cells) + f" | {allowed:.0%} ({everything:.0%}) |")
    return lines


def _alternatives(reference: dict, rows: list[dict]) -> list[str]:
    resident = reference["resident"]["requests"] / reference["resident"]["seconds"]
    lines = []
    for key, what in (
        ("reload", "Each model loaded anew for each request (safetensors, plain modules)"),
        ("accelerate", "Each model in accelerate's disk offload, its files written before"),
    ):
        for disk, other in reference.get(key, {}).items():
            where = f"{what}, in the cgroup of SwapNet's cap{'' if disk == FREE else f', disk {disk} MB/s'}"
            rates = [row["requests"] / row["seconds"] for row in rows if (row["cap"], row["disk"]) == ("paper", disk)]
            if "error" in other:
                lines += [f"{where}: {other['error']}.", ""]
            elif rates:
                rate = other["requests"] / other["seconds"]
                lines += [
                    f"{where}: {rate:.2f} requests a second{_disturbed(other)}; the better policy {max(rates):.2f}, "
                    f"{max(rates) / rate:.1f} times as many. All resident, without a cap: {resident:.2f}, "
                    f"{resident / rate:.1f} times: what computing alone allows.",
                    "",
                ]
    return lines


def _delays(delays: dict) -> list[str]:
    lines = [
        "## Delay model",
        "",
        "SwapNet's linear model, fitted to the blocks of each CNN, loaded, run and unloaded one at a time through",
        "`hermes.Blocks` (medians of six passes): R^2 of t_in and t_out over bytes, of t_ex over FLOPs alone, and with",
        "bytes of weights and activations as further terms where those explain more. t_out is a constant: a place in",
        "the window is given back, whatever its size, so bytes explain little of what is left.",
        "",
        "| model | blocks | t_in | rate, GB/s | t_ex, FLOPs | t_ex used | t_out | t_out, median, microseconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, one in delays.items():
        rate = 1e-9 / one["t_in"]["coefficients"]["nbytes"]
        cells = [f"{one[key]['r_squared']:.3f}" for key in ("t_in", "t_ex_flops", "t_ex", "t_out")]
        lines.append(
            f"| {kind} | {one['samples']} | {cells[0]} | {rate:.1f} | {cells[1]} | {cells[2]} | {cells[3]} "
            f"| {1e6 * one['out_median_seconds']:.0f} |"
        )
    return [*lines, ""]


def _bound_seconds(reference: dict, row: dict) -> float:
    weight_bytes, activation_bytes = (reference["probe"][key].values() for key in ("weight_bytes", "activation_bytes"))
    rounds = row["requests"] / len(weight_bytes)
    again = max(0, sum(weight_bytes) - row["cap_bytes"] + max(activation_bytes))
    return max(row["resident"]["seconds"], rounds * again / row["bytes_per_second"])


def _disturbed(row: dict) -> str:
    return f" (disturbed: {row['disturbed']:.0%})" if row.get("disturbed", 0.0) > 0.03 else ""


def _head(row: dict) -> str:
    cap = "SwapNet's" if row["cap"] == "paper" else f"{row['cap']} %"
    return f"{cap} {row['policy']}"
