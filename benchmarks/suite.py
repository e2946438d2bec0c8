"""Hermes beside what a user would pick instead: one machine, one kernel-enforced cap, one precision, files evicted.

    python benchmarks/suite.py [--model NAME]... [--cap 25|50|75|100|SIZE]... [--disk free|90|250|500]...
                               [--peer NAME]... [--samples N] [--timeout SECONDS]
                               [--timeline | --report | --clean]

A cap in per cent is of the model's weights, with Hermes's floor added; 100 leaves room for the whole model and half as
much again, and is no cap that binds. Disks are throttled by the kernel, in MB/s. Rows that were measured before stay
in docs/results.json unless measured again; docs/results.md and its plots are made from it. `make peers` installs the
peers.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import figures
import results
from comparators import HERE, PEERS, YARDSTICK, Peer, packed, prepare, python_of
from conditions import (
    DISKS,
    DOCS,
    MODELS,
    ROOT,
    cold_run,
    disk_rate,
    environment,
    evict,
    last_line,
    profile,
    taken,
    weight_bytes,
)
from rows import keep

from hermes.checkpoint.synth import synth
from hermes.units import format_bytes, parse_bytes

TIMEOUT_SECONDS = 300
"""Of one run; one that the kernel keeps busy with reading its own code back would go on for hours."""
STREAMED = ("hermes", "hermes-nothing-resident")
"""Whose passes have a bound."""
TIMELINE = ("gpt2-medium", "600MiB", 4)
"""The run whose agents are drawn: model, budget, new tokens."""


def one_run(
    peer: Peer, model: Path, cap_bytes: int, disk: str, *more: str, timeout_seconds: float = TIMEOUT_SECONDS
) -> dict:
    """A cold process in a cgroup of `cap_bytes`."""
    script_name, *arguments = peer.command(model, cap_bytes)
    try:
        done = cold_run(
            [python_of(peer), HERE / script_name, *arguments, *more],
            model,
            limit_bytes=cap_bytes,
            disk=disk,
            timeout_seconds=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout_seconds:.0f} s"}
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


def yardstick(model: Path, floor: int, disk: str, nbytes: int, window_bytes: int) -> dict:
    """What the bound of a run is made of that has just ended: the disk's rate, resident passes, those beside reads.

    A throttled disk gives its rate beside anything, so nothing is read there.
    """
    (room,) = caps_of(model, ["100"], floor).values()
    run = one_run(YARDSTICK, model, room, "free", str(nbytes if disk == "free" else 0), str(window_bytes))
    beside = ("beside_seconds",) if disk == "free" else ()
    return {"disk_rate": disk_rate(model, disk)} | {
        field: run[field] for field in ("resident_seconds", *beside) if field in run
    }


def floor_bytes(model: Path) -> int:
    """Hermes's own before any weight, asked of a plan."""
    done = subprocess.run(
        [sys.executable, "-m", "hermes", "plan", str(model), "--budget", "64GiB", "--json", "-"],
        capture_output=True, text=True, check=True, env=environment("free"),
    )  # fmt: skip
    return int(json.loads(done.stdout)["plan"]["floor_bytes"])


def caps_of(model: Path, wanted: list[str], floor: int) -> dict[str, int]:
    """Caps in bytes by what they were called."""
    weights = weight_bytes(model)
    return {
        cap: floor + weights * (150 if cap == "100" else int(cap)) // 100 if cap.isdecimal() else parse_bytes(cap)
        for cap in wanted
    }


def measure(
    names: list[str],
    caps: list[str],
    disks: list[str],
    peers: list[str],
    samples: int,
    timeout_seconds: float,
) -> None:
    """Run everything that was asked, caps and peers of a sample one after the other, so that a machine's better and
    worse minutes are everybody's. Replaces rows of the same kind.
    """
    for name in names:
        model = synth(name, ROOT / "models" / name)
        floor = 0
        for disk in disks:
            if any(peer.startswith("hermes") for peer in peers):
                profile(name, model, disk)
            if "hermes-packed" in peers and name in PEERS["hermes-packed"].only:
                prepare(PEERS["hermes-packed"], model)
                profile(f"{name}.packed", packed(model), disk)
            floor = floor or floor_bytes(model)
            sizes = caps_of(model, caps, floor)
            found: dict[tuple[str, str], list[dict]] = {}
            rates: list[float] = []
            for _ in range(samples):
                rates.append(disk_rate(model, disk))
                for cap, peer in itertools.product(sizes, peers):
                    kind = PEERS[peer]
                    if name not in kind.only or (kind.whole and cap != "100" in sizes):
                        continue
                    runs = found.setdefault((cap, peer), [])
                    if any("error" in run for run in runs):
                        continue
                    why = prepare(kind, model)
                    run = (
                        {"error": why}
                        if why
                        else one_run(kind, model, sizes[cap], disk, timeout_seconds=timeout_seconds)
                    )
                    if peer in STREAMED and cap != "100" and "error" not in run:
                        run |= yardstick(model, floor, disk, run["steady_bytes"], run["ring_bytes"])
                    runs.append(run)
                    print(name, cap, disk, peer, summary(runs[-1]), flush=True)
            new = [
                {
                    "model": name, "cap": cap, "disk": disk, "peer": peer, "cap_bytes": sizes[cap],
                    "weight_bytes": weight_bytes(model), "disk_rates": rates, "taken": taken(), "runs": runs,
                }
                for (cap, peer), runs in found.items()
            ]  # fmt: skip
            keep("results", new, keys=("model", "cap", "disk", "peer"))


def summary(run: dict) -> str:
    """For whoever watches."""
    if "error" in run:
        return run["error"]
    return (
        f"first {run['first_seconds']:.2f} s, steady {run['steady_seconds']:.3f} s, peak "
        f"{format_bytes(run['peak_bytes'])}, process {run['seconds']:.1f} s"
    )


def record_timeline() -> None:
    """docs/timeline.svg, from a run's Chrome trace."""
    name, budget, tokens = TIMELINE
    model = synth(name, ROOT / "models" / name)
    trace = model.with_name(f"{name}.trace.json")
    profile(name, model, "free")
    evict(model)
    command = ["run", str(model), "--budget", budget, "--prompt", "The memory of a machine is", "--json"]
    subprocess.run(
        [sys.executable, "-m", "hermes", *command, "--max-new-tokens", str(tokens), "--trace", trace],
        check=True, capture_output=True, env=environment("free"),
    )  # fmt: skip
    figures.timeline(json.loads(trace.read_text())["traceEvents"], DOCS / "timeline.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--cap", action="append")
    parser.add_argument("--disk", action="append", choices=DISKS)
    parser.add_argument("--peer", action="append", choices=PEERS)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds of one run")
    parser.add_argument("--timeline", action="store_true", help="record the run whose agents are drawn")
    parser.add_argument("--report", action="store_true", help="only write the tables and plots again")
    parser.add_argument("--clean", action="store_true", help="remove what peers have split or converted")
    options = parser.parse_args()
    if options.clean:
        for path in (ROOT / "models").glob("*.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if options.timeline:
        record_timeline()
    elif not options.report:
        measure(
            options.model or list(MODELS),
            options.cap or ["25", "50", "75"],
            options.disk or ["free"],
            options.peer or list(PEERS),
            options.samples,
            options.timeout,
        )
    results.write()


if __name__ == "__main__":
    main()
