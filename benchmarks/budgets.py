"""The claims of the README, measured: five models at three budgets each, every run in a memory cgroup of its budget.

    python benchmarks/budgets.py [MODEL ...]        (root, about half an hour for all five)

For each run: identical to the reference or not, peak against budget, seconds and peak against the prediction, and the
steady pass against its bound max(bytes streamed / direct-read rate, resident compute), all measured in this run. Files
are evicted before every run. Writes docs/budgets.json (raw) and docs/budgets.md.
"""

import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from capped import run_capped  # noqa: E402
from hermes.checkpoint import open_checkpoint, open_reader  # noqa: E402
from hermes.checkpoint.synth import synth  # noqa: E402
from hermes.profile.disk import measure_bandwidth  # noqa: E402
from hermes.units import format_bytes, parse_bytes  # noqa: E402

BUDGETS = {
    "bert-large": ("400MiB", "600MiB", "1GiB"),
    "vit-large": ("400MiB", "600MiB", "1GiB"),
    "gpt2-medium": ("400MiB", "600MiB", "1GiB"),
    "llama-3b": ("640MiB", "2GiB", "4GiB"),
    "gpt-j-6b": ("700MiB", "3GiB", "6GiB"),
}
TOO_LARGE_TO_HOLD = ("gpt-j-6b",)  # compared with the sequential engine instead
SAMPLES = {"llama-3b": 1, "gpt-j-6b": 1}
"""Pairs of runs, capped and not; elsewhere three, of which the median counts."""
SAMPLE_BYTES = 2**30


def evict(model: Path) -> None:
    for path in model.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_rates(model: Path) -> dict[int, float]:
    """Direct-read rate of this moment, by number of agents."""
    checkpoint = open_checkpoint(model)
    with open_reader(checkpoint) as reader:
        records = measure_bandwidth(checkpoint, reader, sample_bytes=SAMPLE_BYTES, agent_counts=(1, 2, 4))
    return {record.num_agents: record.bytes_per_second for record in records}


def one_run(model: Path, mode: str, budget: str, limit: str | None) -> dict:
    evict(model)
    command = [sys.executable, str(ROOT / "benchmarks" / "one_run.py"), str(model), mode, budget]
    if limit is None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        extra = {}
    else:
        done = run_capped(command, limit_bytes=parse_bytes(limit), cwd=ROOT, timeout_seconds=1200)
        extra = {"charged_peak_bytes": done.peak_bytes, "oom_kills": done.oom_kills, "major_faults": done.major_faults}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:], "returncode": done.returncode, **extra}
    return json.loads(done.stdout.splitlines()[-1]) | extra


def median_run(runs: list[dict]) -> dict:
    """The run with the middle seconds; any that failed, or gave other bits than the rest, instead."""
    for run in runs:
        if "error" in run or run["digest"] != runs[0]["digest"] or run.get("oom_kills"):
            return run
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]


def measure(name: str) -> list[dict]:
    model = synth(name, ROOT / "models" / name)
    profile = [str(Path(sys.executable).parent / "hermes"), "profile", str(model)]
    if name in ("bert-large", "vit-large"):
        profile += ["--seq", "128"]
    else:
        profile += ["--seq", "16", "--new-tokens", "8"]
    subprocess.run(profile, check=True, capture_output=True)
    held = name not in TOO_LARGE_TO_HOLD
    reference = one_run(model, "resident" if held else "sequential", BUDGETS[name][-1], None)
    rows = []
    for budget in BUDGETS[name]:
        row = {"model": name, "budget": budget, "budget_bytes": parse_bytes(budget), "reference": reference}
        capped, uncapped, rates = [], [], [read_rates(model)]
        for _ in range(SAMPLES.get(name, 3)):  # in turns, so that a slow minute of the machine's hits both
            capped.append(one_run(model, "streamed", budget, budget))
            if budget == BUDGETS[name][1]:
                uncapped.append(one_run(model, "streamed", budget, None))
            rates.append(read_rates(model))
        row["read_rates"] = rates
        row["read_bytes_per_second"] = max(statistics.median(rate[agents] for rate in rates) for agents in rates[0])
        row["run"], row["uncapped"] = median_run(capped), median_run(uncapped) if uncapped else None
        row["samples"] = [[run.get("seconds") for run in runs] for runs in (capped, uncapped)]
        row["compared_with"] = "resident" if held else "sequential"
        rows.append(row)
        print(line(row), flush=True)
    return rows


def of_bound(row: dict) -> float:
    """Share of max(bytes streamed / read rate, resident compute) that the steady pass reached."""
    compute = row["reference"]["steady_seconds"] if row["compared_with"] == "resident" else 0.0
    return max(row["run"]["steady_bytes"] / row["read_bytes_per_second"], compute) / row["run"]["steady_seconds"]


def line(row: dict) -> str:
    """One row of the table."""
    run, reference = row["run"], row["reference"]
    if "error" in run:
        return f"| {row['model']} | {row['budget']} | {run['error']} |" + " |" * 8
    cells = [
        row["model"],
        row["budget"],
        ("yes" if run["digest"] == reference["digest"] else "NO") + f" ({row['compared_with']})",
        f"{format_bytes(run['peak_bytes'])} ({run['peak_bytes'] / run['predicted_peak_bytes'] - 1:+.0%} of predicted)",
        f"{run['oom_kills']}",
        f"{run['seconds']:.2f} ({run['seconds'] / run['predicted_seconds'] - 1:+.0%})",
        f"{run['seconds'] / row['uncapped']['seconds']:.2f}" if row["uncapped"] else "",
        f"{run['steady_seconds']:.3f}",
        f"{run['steady_bytes'] / 1e6:.0f}",
        f"{of_bound(row):.2f}",
        f"{reference['steady_seconds']:.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = """\
| model | budget | identical to | peak | OOM kills | seconds (against predicted) | capped / uncapped | steady pass, s \
| MB read a pass | of bound | reference pass, s |
|---|---|---|---|---|---|---|---|---|---|---|"""


def short_line(row: dict) -> str:
    """The same for the README."""
    run = row["run"]
    cells = [
        row["model"],
        row["budget"],
        format_bytes(run["peak_bytes"]),
        "yes" if run["digest"] == row["reference"]["digest"] else "NO",
        f"{run['steady_seconds']:.2f}",
        f"{run['steady_bytes'] / 1e9:.2f}",
        f"{of_bound(row):.2f}",
        f"{row['reference']['steady_seconds']:.2f}, {format_bytes(row['reference']['peak_bytes'])}",
    ]
    return "| " + " | ".join(cells) + " |"


SHORT_HEADER = """\
| model | budget | peak | identical | seconds a pass | GB read a pass | of bound | reference: s a pass, peak |
|---|---|---|---|---|---|---|---|"""


def write_report(about: dict, rows: list[dict]) -> None:
    """docs/budgets.md, and the table in the README."""
    text = [
        "# Five models under a hard cap",
        "",
        f"Made by `python benchmarks/budgets.py` on {about['date']} at {about['commit']}: {about['cpu']}, "
        f"{about['cores']} cores. Each run is a process of its own in a memory cgroup whose limit is the budget, swap "
        "off, files evicted. Encoders: 5 passes over 128 tokens or one 224x224 image; decoders: 16 tokens, 8 more. "
        "Small models: the median of three runs.",
        "",
        "*Of bound*: max(bytes streamed / direct-read rate, resident pass) over the steady pass. The rate is "
        "that of the best number of agents, each the median of samples of 1 GiB before, between and after the runs.",
        "*Reference pass*: transformers, fully resident (for gpt-j-6b: Hermes's sequential engine).",
        "",
        HEADER,
        *(line(row) for row in rows),
        "",
    ]
    (ROOT / "docs" / "budgets.md").write_text("\n".join(text))
    readme = ROOT / "README.md"
    before, begin, rest = readme.read_text().partition("<!-- results:begin -->")
    _, end, after = rest.partition("<!-- results:end -->")
    table = "\n".join([SHORT_HEADER, *(short_line(row) for row in rows)])
    readme.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def main() -> None:
    names = sys.argv[1:] or list(BUDGETS)
    path = ROOT / "docs" / "budgets.json"
    stored = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if names == ["--report"]:
        write_report(stored["about"], stored["rows"])
        return
    rows = stored["rows"]
    print(HEADER)
    for name in names:
        rows = [row for row in rows if row["model"] != name] + measure(name)
    rows.sort(key=lambda row: (list(BUDGETS).index(row["model"]), row["budget_bytes"]))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "cpu": next(x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").open() if x.startswith("model name")),
        "cores": os.cpu_count(),
        "cache": "files evicted before every run",
    }
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    write_report(about, rows)


main()
