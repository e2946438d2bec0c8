"""Under what every benchmark here measures: files evicted, the disk's rate of the minute, the profile of the disk."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from capped import CappedRun, run_capped  # noqa: E402
from hermes.checkpoint import open_checkpoint, open_reader  # noqa: E402
from hermes.profile.disk import measure_bandwidth  # noqa: E402

DOCS = ROOT / "docs"
MODELS = ("bert-large", "vit-large", "gpt2-medium", "gpt-j-6b", "llama-3b")
ENCODERS = ("bert-large", "vit-large")
DISKS = ("free", "500", "250", "90")
"""As it is, or limited by the kernel to so many MB/s: a SATA disk, an eMMC, an SD card."""
MIB = 2**20
FIO = ("--readonly", "--rw=read", "--direct=1", "--bs=4M", "--thread", "--group_reporting", "--output-format=json")
FIO_WAYS = (
    ("--ioengine=psync", "--numjobs=4", "--size=256M", "--offset_increment=256M"),
    ("--ioengine=libaio", "--iodepth=8", "--size=1G"),
)


def evict(model: Path) -> None:
    """The model's files, and what peers have made of them beside it, out of the page cache."""
    for place in [model, *model.parent.glob(f"{model.name}.*")]:
        for path in [place] if place.is_file() else place.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def environment(disk: str) -> dict[str, str]:
    """For a process that shall run this source, with the profile that was taken of this disk."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "XDG_CACHE_HOME": str(ROOT / "models" / f".profiles-{disk}"),
        "HF_HUB_OFFLINE": "1",
    }


def cold_run(
    command: Sequence[str | Path], model: Path, *, limit_bytes: int, disk: str = "free", timeout_seconds: float
) -> CappedRun:
    """A process in a cgroup of `limit_bytes` and on a throttled disk, nothing of the model in the page cache.

    Raises subprocess.TimeoutExpired.
    """
    evict(model)
    return run_capped(
        command,
        limit_bytes=limit_bytes,
        read_bytes_per_second=None if disk == "free" else int(disk) * 10**6,
        disk_of=model,
        cwd=ROOT,
        env=environment(disk),
        timeout_seconds=timeout_seconds,
    )


def profile(name: str, model: Path, disk: str) -> None:
    """`hermes profile`, once for each source; for a throttled disk, its rates clipped to the throttle.

    That is what profiling under the throttle would find, without reading the weights ten times at its speed.
    """
    workload = ["--seq", "128"] if name in ENCODERS else ["--seq", "16", "--new-tokens", "8"]
    stamp = ROOT / "models" / ".profiles-free" / name
    source = str(taken()["commit"])
    if not stamp.exists() or stamp.read_text() != source:
        subprocess.run(
            [sys.executable, "-m", "hermes", "profile", str(model), *workload],
            check=True, capture_output=True, env=environment("free"),
        )  # fmt: skip
        stamp.write_text(source)
    if disk == "free":
        return
    free, throttled = (Path(environment(which)["XDG_CACHE_HOME"]) for which in ("free", disk))
    shutil.copytree(free, throttled, dirs_exist_ok=True)
    for path in (throttled / "hermes" / "profiles").glob("*.json"):
        record = json.loads(path.read_text())
        for bandwidth in record["bandwidths"]:
            bandwidth["bytes_per_second"] = min(bandwidth["bytes_per_second"], int(disk) * 1e6)
        path.write_text(json.dumps(record))


def disk_rate(model: Path, disk: str) -> float:
    """Bytes a second: the best direct read that fio (where it is installed) or Hermes's own reader reaches now.

    The reader is asked too, because fio's buffers are not in huge pages, and on a virtual machine that costs it a lot.
    """
    checkpoint = open_checkpoint(model)
    with open_reader(checkpoint) as reader:
        records = measure_bandwidth(checkpoint, reader, sample_bytes=1024 * MIB, agent_counts=(2, 4))
    rates = [record.bytes_per_second for record in records]
    if shutil.which("fio") is not None:
        file = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        rates += [fio(file, way) for way in FIO_WAYS]
    return max(rates) if disk == "free" else min(max(rates), int(disk) * 1e6)


def fio(file: Path, way: tuple[str, ...]) -> float:
    """Bytes a second over 1 GiB of the file."""
    done = subprocess.run(
        ["fio", "--name=read", f"--filename={file.resolve()}", *FIO, *way], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"])


def weight_bytes(model: Path) -> int:
    """Of every file of weights."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def last_line(text: str) -> str:
    """Of an error message."""
    return (text.strip().splitlines() or ["no message"])[-1][:200]


def processor() -> str:
    """Its name and, as virtual machines' processors of several generations share one, its model number."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    return ", ".join(filter(None, (fields.get("model name"), f"model {fields.get('model', '?')}")))


def taken() -> dict[str, object]:
    """When, on what, and with which source (the last commit that changed src/) something was measured."""
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", "src"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit.stdout.strip(),
        "cpu": processor(),
        "cores": os.cpu_count(),
    }


def median(runs: list[dict], field: str) -> float:
    """Over the samples of a row."""
    return statistics.median(run[field] for run in runs)
