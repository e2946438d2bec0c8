"""Hermes beside what a user would pick instead: one machine, one kernel-enforced cap, one precision, files evicted.

    python benchmarks/suite.py [--model NAME]... [--cap 25|50|75|100|SIZE]... [--disk free|90|250|500]...
                               [--peer NAME]... [--samples N] [--report]

A cap in per cent is of the model's weights, with Hermes's floor added; 100 leaves room for the whole model and half as
much again, and is no cap that binds. Disks are throttled by the kernel, in MB/s. Rows that were measured before stay
in docs/results.json unless measured again; docs/results.md is made from it. `make peers` installs the peers.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from capped import run_capped  # noqa: E402
from hermes.checkpoint import open_checkpoint, open_reader  # noqa: E402
from hermes.checkpoint.synth import synth  # noqa: E402
from hermes.profile.disk import measure_bandwidth  # noqa: E402
from hermes.units import format_bytes, parse_bytes  # noqa: E402

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
HERE = ROOT / "benchmarks" / "peers"
MODELS = ("bert-large", "vit-large", "gpt2-medium", "gpt-j-6b", "llama-3b")
MIB = 2**20
FLOOR_BYTES_OF_PEERS = 450 * MIB
"""What transformers with accelerate holds before any weight; it is told to keep no more weights than the rest."""
TIMEOUT_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How one comparator is run, and what it is."""

    what: str
    command: Callable[[Path, int], list[str]]
    prepare: tuple[str, ...] = ()
    leaves: str = ""
    only: tuple[str, ...] = MODELS
    installed: bool = False  # in .venv-peers, or here


def script(name: str, *more: str) -> Callable[[Path, int], list[str]]:
    """A command that takes the model and nothing of the cap."""
    return lambda model, cap: [f"{name}.py", str(model), *more]


PEERS = {
    "hermes": Peer(what="Hermes", command=lambda model, cap: ["hermes_run.py", str(model), str(cap)]),
    "hermes-nothing-resident": Peer(
        what="Hermes, no weight kept between passes",
        command=lambda model, cap: ["hermes_run.py", str(model), str(cap), "nothing-resident"],
    ),
    "baseline": Peer(what="transformers, all loaded first", command=script("resident")),
    "pipeswitch-torch": Peer(
        what="PipeSwitch port, torch.save files",
        command=script("pipelines", "pipeswitch", "torch", "1"),
        prepare=("pipelines.py", "pipeswitch", "safetensors", "1", "--split"),
        leaves="layers",
    ),
    "pipeswitch-safetensors": Peer(
        what="PipeSwitch port, safetensors", command=script("pipelines", "pipeswitch", "safetensors", "1")
    ),
    "pipeload-2": Peer(
        what="PIPELOAD as published, 2 agents",
        command=script("pipelines", "pipeload", "torch", "2"),
        prepare=("pipelines.py", "pipeswitch", "safetensors", "1", "--split"),
        leaves="layers",
    ),
    "pipeload-6": Peer(
        what="PIPELOAD as published, 6 agents",
        command=script("pipelines", "pipeload", "torch", "6"),
        prepare=("pipelines.py", "pipeswitch", "safetensors", "1", "--split"),
        leaves="layers",
    ),
    "accelerate": Peer(
        what="transformers + accelerate, disk offload",
        command=lambda model, cap: ["accelerate_offload.py", str(model), str(max(1, cap - FLOOR_BYTES_OF_PEERS))],
        installed=True,
    ),
    "llama.cpp": Peer(
        what="llama.cpp, mmap, bf16",
        command=script("llamacpp"),
        prepare=("llamacpp.py", "--convert"),
        leaves="gguf",
        only=("llama-3b",),
        installed=True,
    ),
    "airllm": Peer(
        what="AirLLM",
        command=script("airllm_run"),
        prepare=("airllm_run.py", "--split"),
        leaves="airllm",
        only=("llama-3b",),
        installed=True,
    ),
}


def evict(directory: Path) -> None:
    """Files below the directory out of the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def prepare(name: str, peer: Peer, model: Path) -> str | None:
    """Write the files of its own that a peer wants; why it cannot be run, or None."""
    if peer.installed and not PEERS_PYTHON.exists():
        return "not installed (make peers)"
    if not peer.prepare or (model.with_name(f"{model.name}.{peer.leaves}")).exists():
        return None
    first, *rest = peer.prepare
    done = subprocess.run(
        [str(python_of(peer)), str(HERE / first), str(model), *rest], capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else f"cannot be prepared: {last_line(done.stderr)}"


def python_of(peer: Peer) -> Path:
    """The interpreter that has the peer's packages."""
    return PEERS_PYTHON if peer.installed else Path(sys.executable)


def last_line(text: str) -> str:
    """Of an error message."""
    return (text.strip().splitlines() or ["no message"])[-1][:200]


def one_run(peer: Peer, model: Path, cap_bytes: int, disk: str) -> dict:
    """A cold process in a cgroup of `cap_bytes`."""
    evict(model.parent)
    script_name, *arguments = peer.command(model, cap_bytes)
    try:
        done = run_capped(
            [python_of(peer), HERE / script_name, *arguments],
            limit_bytes=cap_bytes,
            read_bytes_per_second=None if disk == "free" else int(disk) * 10**6,
            disk_of=model,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            timeout_seconds=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIMEOUT_SECONDS} s"}
    if done.oom_kills or done.returncode == 137:
        return {"error": "killed: out of memory"}
    if done.returncode:
        return {"error": last_line(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1]) | {
        "seconds": done.seconds,
        "charged_peak_bytes": done.peak_bytes,
        "disk_bytes": done.read_bytes,
        "major_faults": done.major_faults,
    }


def floor_bytes(model: Path) -> int:
    """Hermes's own before any weight, asked of a plan."""
    done = subprocess.run(
        [sys.executable, "-m", "hermes", "plan", str(model), "--budget", "64GiB", "--json", "-"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    return int(json.loads(done.stdout)["plan"]["floor_bytes"])


def weight_bytes(model: Path) -> int:
    """Of every file of weights."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def caps_of(model: Path, wanted: list[str], floor: int) -> dict[str, int]:
    """Caps in bytes by what they were called."""
    weights = weight_bytes(model)
    return {
        cap: floor + weights * (150 if cap == "100" else int(cap)) // 100 if cap.isdecimal() else parse_bytes(cap)
        for cap in wanted
    }


def disk_rate(model: Path) -> float:
    """Best of 2 and 4 agents, 1 GiB each, past the page cache."""
    checkpoint = open_checkpoint(model)
    with open_reader(checkpoint) as reader:
        records = measure_bandwidth(checkpoint, reader, sample_bytes=1024 * MIB, agent_counts=(2, 4))
    return max(record.bytes_per_second for record in records)


def measure(
    names: list[str], caps: list[str], disks: list[str], peers: list[str], samples: int, rows: list[dict]
) -> None:
    """Run everything that was asked; samples of different peers in turns. Replaces rows of the same kind."""
    for name in names:
        model = synth(name, ROOT / "models" / name)
        workload = ["--seq", "128"] if name in ("bert-large", "vit-large") else ["--seq", "16", "--new-tokens", "8"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        profile = [sys.executable, "-m", "hermes", "profile", str(model), *workload]
        subprocess.run(profile, check=True, capture_output=True, env=environment)
        floor = floor_bytes(model)
        for disk in disks:
            for cap, cap_bytes in caps_of(model, caps, floor).items():
                found: dict[str, list[dict]] = {}
                rates = []
                for _ in range(samples):
                    rates.append(disk_rate(model))
                    for peer in peers:
                        if name not in PEERS[peer].only or any("error" in run for run in found.get(peer, [])):
                            continue
                        why = prepare(peer, PEERS[peer], model)
                        run = {"error": why} if why else one_run(PEERS[peer], model, cap_bytes, disk)
                        found.setdefault(peer, []).append(run)
                        print(name, cap, disk, peer, summary(run), flush=True)
                for peer, runs in found.items():
                    key = {"model": name, "cap": cap, "disk": disk, "peer": peer}
                    rows[:] = [row for row in rows if any(row[k] != v for k, v in key.items())]
                    rows.append(
                        key | {
                            "cap_bytes": cap_bytes, "floor_bytes": floor, "weight_bytes": weight_bytes(model),
                            "disk_rates": rates, "runs": runs,
                        }
                    )  # fmt: skip
                write(rows)


def summary(run: dict) -> str:
    """For whoever watches."""
    if "error" in run:
        return run["error"]
    return (
        f"first {run['first_seconds']:.2f} s, steady {run['steady_seconds']:.3f} s, peak "
        f"{format_bytes(run['peak_bytes'])}, process {run['seconds']:.1f} s"
    )


def median(row: dict, field: str) -> float:
    """Over the samples."""
    return statistics.median(run[field] for run in row["runs"])


def failed(row: dict) -> str | None:
    """Why there are no figures."""
    return next((run["error"] for run in row["runs"] if "error" in run), None)


HEADER = """\
| cap | disk | who | peak | first output, s | Hermes is faster by | steady pass, s | Hermes is faster by | same bits |
|---|---|---|---|---|---|---|---|---|"""


def table(rows: list[dict]) -> list[str]:
    """One model's."""
    lines = [HEADER]
    order = list(PEERS)
    for row in sorted(rows, key=lambda row: (row["disk"], row["cap_bytes"], order.index(row["peer"]))):
        where = (
            f"| {format_bytes(row['cap_bytes'])} | {'as it is' if row['disk'] == 'free' else row['disk'] + ' MB/s'} "
        )
        who = PEERS[row["peer"]].what
        if (why := failed(row)) is not None:
            lines.append(f"{where}| {who} | {why} | | | | | |")
            continue
        ours = next(
            (r for r in rows if r["peer"] == "hermes" and (r["cap"], r["disk"]) == (row["cap"], row["disk"])), None
        )
        first = steady = bits = ""
        if ours is not None and failed(ours) is None and ours is not row:
            first = f"{median(row, 'first_seconds') / median(ours, 'first_seconds'):.2f}x"
            steady = f"{median(row, 'steady_seconds') / median(ours, 'steady_seconds'):.2f}x"
            theirs, digest = row["runs"][0].get("digest"), ours["runs"][0].get("digest")
            bits = "" if theirs is None else "yes" if theirs == digest else "no"
        lines.append(
            f"{where}| {who} | {format_bytes(int(median(row, 'peak_bytes')))} | {median(row, 'first_seconds'):.2f} | "
            f"{first} | {median(row, 'steady_seconds'):.3f} | {steady} | {bits} |"
        )
    return lines


PAPER = {
    "bert-large": ("1627 MB", "931 MB", "15.9 s", "3.51 s"),
    "vit-large": ("600 MB", "159 MB", "345 ms", "43 ms"),
    "gpt2-medium": ("1400 MB", "563 MB", "1.66 s", "1.12 s"),
    "gpt-j-6b": ("12.35 GB", "3.24 GB", "31.33 s", "29.64 s"),
}
"""Baseline's and Hermes's memory, their latency: Han et al. 2024, eight cores of a Xeon Gold 6248R, six agents."""


def paper_table(rows: list[dict]) -> list[str]:
    """The paper's rows, ours beside them: transformers loaded first where it has room, Hermes at its smallest cap."""
    lines = [
        "## The paper's table, and ours",
        "",
        "*Ours*: memory and first output of the baseline with room for everything, and of Hermes at the smallest cap "
        "measured, disk as it is. *Above the floor* takes off what the process holds before any weight.",
        "",
        "| model | paper: memory | paper: latency | ours: memory | ours: first output | above the floor |",
        "|---|---|---|---|---|---|",
    ]
    for model, (their_memory, our_memory, their_seconds, our_seconds) in PAPER.items():
        good = [row for row in rows if row["model"] == model and row["disk"] == "free" and failed(row) is None]
        base = [row for row in good if row["peer"] == "baseline"]
        ours = sorted((row for row in good if row["peer"] == "hermes"), key=lambda row: row["cap_bytes"])
        if not base or not ours:
            continue
        before, after = int(median(base[0], "peak_bytes")), int(median(ours[0], "peak_bytes"))
        floor = ours[0]["floor_bytes"]
        lines.append(
            f"| {model} | {their_memory} -> {our_memory} | {their_seconds} -> {our_seconds} "
            f"| {format_bytes(before)} -> {format_bytes(after)} | {median(base[0], 'first_seconds'):.2f} s -> "
            f"{median(ours[0], 'first_seconds'):.2f} s | {(after - floor) / (before - floor) - 1:+.1%} |"
        )
    return [*lines, ""]


def write(rows: list[dict]) -> None:
    """docs/results.json and docs/results.md."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "cpu": next(x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").open() if x.startswith("model name")),
        "cores": os.cpu_count(),
    }
    docs = ROOT / "docs"
    (docs / "results.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    text = [
        "# Hermes beside its peers",
        "",
        f"Made by `python benchmarks/suite.py`, last on {about['date']} at {about['commit']}: {about['cpu']}, "
        f"{about['cores']} cores. Every run is a process of its own in a memory cgroup of the cap, swap off, all files "
        "evicted. Encoders: 128 tokens or one 224x224 image, five passes; decoders: 16 tokens of prompt, 8 more.",
        "",
        "*First output*: from the start of loading (packages imported) to the first output. *Steady pass*: the median "
        "of later passes (for decoders, seconds a token). Medians over samples, taken in turns. The raw ones, with "
        "bytes read, are in results.json.",
        "",
    ]
    for model in MODELS:
        if chosen := [row for row in rows if row["model"] == model]:
            text += [f"## {model}, {format_bytes(chosen[0]['weight_bytes'])} of weights", "", *table(chosen), ""]
    text += paper_table(rows)
    (docs / "results.md").write_text("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--cap", action="append")
    parser.add_argument("--disk", action="append", choices=("free", "90", "250", "500"))
    parser.add_argument("--peer", action="append", choices=PEERS)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="only write the tables again")
    parser.add_argument("--clean", action="store_true", help="remove what peers have split or converted")
    options = parser.parse_args()
    stored = ROOT / "docs" / "results.json"
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    if options.clean:
        for path in (ROOT / "models").glob("*.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if options.report:
        write(rows)
        return
    measure(
        options.model or list(MODELS),
        options.cap or ["25", "50", "75"],
        options.disk or ["free"],
        options.peer or list(PEERS),
        options.samples,
        rows,
    )


if __name__ == "__main__":
    main()
