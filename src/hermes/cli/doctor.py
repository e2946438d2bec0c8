"""`hermes doctor`: what this machine can do, and the smallest budget that makes sense on it.

Without a model it writes a sample file of 256 MiB into --path, reads it past the page cache, and removes it. No other
command writes in order to measure, and running a model writes nothing.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hermes.cli.plan import settle_workload
from hermes.errors import HermesError, InputError
from hermes.units import format_bytes, format_rate

if TYPE_CHECKING:
    from hermes.checkpoint import Checkpoint
    from hermes.profile import BandwidthRecord

__all__ = ["Diagnosis", "doctor", "instruction_sets"]

SAMPLE_BYTES = 256 * 2**20
#: Flags of /proc/cpuinfo that matrix kernels care about, x86 and ARM.
_SIMD = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512*",
    "amx_*",
    "asimd",
    "asimdhp",
    "asimddp",
    "sve",
    "sve2",
    "i8mm",
    "bf16",
)
#: What a run has before its first weight: the interface, one family's modelling code, kernels and their threads.
_FLOOR_SCRIPT = """
import dataclasses, json
from hermes.memory.allocator import keep_heap_tight
keep_heap_tight()
import torch
import hermes.api
from hermes.memory.pages import drop_idle_pages
from hermes.memory.probe import memory_split
from hermes.model.lean import lean_imports
from hermes.profile import calibrate_compute
with lean_imports():
    from transformers.models.bert import modeling_bert
drop_idle_pages()
calibrate_compute(torch.float32, 128)
split = dataclasses.asdict(memory_split())
from hermes.device import find_devices
devices = [str(device) for device in find_devices()]
print(json.dumps({**split, "torch": torch.__version__, "threads": torch.get_num_threads(), "devices": devices}))
"""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found; None where this system does not say.

    Attributes:
        cores: that this process may use.
        instruction_sets: those that matter to matrix kernels, as the kernel spells them.
        torch: version.
        threads: that torch computes with.
        devices: that models could compute on instead, and their free memory.
        memory_bytes: of the machine.
        available_bytes: of it, without swapping.
        swap_bytes: of the machine.
        cgroup_version: of the memory cgroup this process is in.
        cgroup_limit_bytes: the tightest that binds it.
        cgroup_charged_bytes: against that limit.
        path: where the disk was tried.
        direct_io: whether reads go past the page cache there.
        bytes_per_second: of direct reads, by number of agents.
        floor_bytes: resident set of a process before any weight; the three that follow add up to it.
        floor_anon_bytes: heap and other anonymous memory.
        floor_file_bytes: code and data pages of files.
        floor_shmem_bytes: shared memory.
        smallest_budget_bytes: of the model, or of the smallest model there could be.
        model: the directory that was asked about.
    """

    cores: int
    instruction_sets: tuple[str, ...]
    torch: str
    threads: int
    devices: tuple[str, ...]
    memory_bytes: int
    available_bytes: int
    swap_bytes: int
    cgroup_version: int | None
    cgroup_limit_bytes: int | None
    cgroup_charged_bytes: int | None
    path: str
    direct_io: bool
    bytes_per_second: Mapping[int, float]
    floor_bytes: int
    floor_anon_bytes: int
    floor_file_bytes: int
    floor_shmem_bytes: int
    smallest_budget_bytes: int
    model: str | None


def doctor(
    model: Annotated[str | None, typer.Argument(help="A model to look at: its disk, and its smallest budget.")] = None,
    path: Annotated[
        Path, typer.Option(help="Directory whose disk is tried, with a file of 256 MiB; not needed with MODEL.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say what this machine can do: processor, memory, disk, and the smallest budget that makes sense."""
    found = _diagnose(model, path)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
        return
    from rich.console import Console

    from hermes.report.tables import facts_table

    Console().print(facts_table("This machine", _rows(found)))


def instruction_sets(cpuinfo: str) -> tuple[str, ...]:
    """Of the text of /proc/cpuinfo, the vector and matrix instruction sets of its first processor."""
    from fnmatch import fnmatchcase

    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = next((rest.split() for name, _, rest in lines if name.strip() in ("flags", "Features")), [])
    return tuple(flag for flag in sorted(set(flags)) if any(fnmatchcase(flag, pattern) for pattern in _SIMD))


def _diagnose(model: str | None, path: Path) -> Diagnosis:
    import psutil

    from hermes.checkpoint import open_checkpoint, resolve_model
    from hermes.memory.probe import available_bytes, find_cgroup, num_cores

    floor = _floor()
    if model is None:
        tried = path
        with _sample_file(path) as checkpoint:
            direct, bandwidths = _try_disk(checkpoint)
    else:
        tried = resolve_model(model)
        direct, bandwidths = _try_disk(open_checkpoint(tried))
    floor_bytes = sum(floor[name] for name in ("anon_bytes", "file_bytes", "shmem_bytes"))
    cgroup = find_cgroup()
    return Diagnosis(
        cores=num_cores(),
        instruction_sets=instruction_sets(_cpuinfo()),
        torch=floor["torch"],
        threads=floor["threads"],
        devices=tuple(floor["devices"]),
        memory_bytes=psutil.virtual_memory().total,
        available_bytes=available_bytes(),
        swap_bytes=psutil.swap_memory().total,
        cgroup_version=cgroup.version if cgroup is not None else None,
        cgroup_limit_bytes=cgroup.limit_bytes if cgroup is not None else None,
        cgroup_charged_bytes=cgroup.charged_bytes() if cgroup is not None else None,
        path=str(tried.absolute()),
        direct_io=direct,
        bytes_per_second={record.num_agents: record.bytes_per_second for record in bandwidths},
        floor_bytes=floor_bytes,
        floor_anon_bytes=floor["anon_bytes"],
        floor_file_bytes=floor["file_bytes"],
        floor_shmem_bytes=floor["shmem_bytes"],
        smallest_budget_bytes=_smallest_budget(None if model is None else tried, floor_bytes),
        model=model,
    )


def _floor() -> dict[str, Any]:
    """And what torch says. Measured in a process of its own: this one holds tables, samples and plans as well."""
    done = subprocess.run([sys.executable, "-c", _FLOOR_SCRIPT], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise HermesError(f"cannot measure the floor of a process: {reason}")
    floor: dict[str, Any] = json.loads(done.stdout)
    return floor


def _smallest_budget(model: Path | None, floor_bytes: int) -> int:
    """The floor and the margin; with a model, the smallest that `hermes plan` accepts."""
    from hermes import api
    from hermes.plan import smallest_budget
    from hermes.session import MARGIN_BYTES, prepare_model

    if model is None:
        return floor_bytes + MARGIN_BYTES
    task, workload = settle_workload(model, task=None, batch=1, seq=None, new_tokens=None)
    prepared = prepare_model(model, workload=workload, task=task)
    with prepared.reader() as reader:
        problem, _ = api.pose_problem(prepared, reader)
    return smallest_budget(dataclasses.replace(problem, floor_bytes=floor_bytes), MARGIN_BYTES)


def _try_disk(checkpoint: "Checkpoint") -> tuple[bool, list["BandwidthRecord"]]:
    from hermes.checkpoint import open_reader
    from hermes.profile import measure_bandwidth

    with open_reader(checkpoint) as reader:
        return reader.direct, measure_bandwidth(checkpoint, reader, sample_bytes=SAMPLE_BYTES // 4)


@contextlib.contextmanager
def _sample_file(directory: Path) -> Iterator["Checkpoint"]:
    """A file of SAMPLE_BYTES, on disk and out of the page cache; removed in the end."""
    from hermes.checkpoint import Checkpoint, FileStamp
    from hermes.checkpoint.readers import forget

    chunk = os.urandom(2**20)  # a compressing file system must not find anything to leave out
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".hermes-doctor-") as file:
            for _ in range(SAMPLE_BYTES // len(chunk)):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            forget(file.fileno(), 0, SAMPLE_BYTES)
            status = os.fstat(file.fileno())
            stamp = FileStamp(
                path=Path(file.name).absolute(),
                nbytes=status.st_size,
                mtime_ns=status.st_mtime_ns,
                inode=status.st_ino,
            )
            yield Checkpoint(files=(stamp,), tensors={})
    except OSError as error:
        raise InputError(
            f"cannot write {format_bytes(SAMPLE_BYTES)} to try the disk in {directory.absolute()}: "
            f"{error.strerror or error}; give another directory with --path, or a model"
        ) from error


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _rows(found: Diagnosis) -> list[tuple[str, str]]:
    if found.cgroup_version is None:
        cgroup = "none"
    else:
        limit = "no limit" if found.cgroup_limit_bytes is None else f"limit {format_bytes(found.cgroup_limit_bytes)}"
        cgroup = f"v{found.cgroup_version}, {limit}, {format_bytes(found.cgroup_charged_bytes or 0)} charged"
    rates = ", ".join(f"{agents}: {format_rate(rate)}" for agents, rate in found.bytes_per_second.items())
    kinds = f"{format_bytes(found.floor_anon_bytes)} anonymous, {format_bytes(found.floor_file_bytes)} of files"
    return [
        ("cores", str(found.cores)),
        ("instruction sets", " ".join(found.instruction_sets) or "unknown"),
        ("torch", f"{found.torch}, {found.threads} threads"),
        ("devices", "\n".join(found.devices) or "the CPU alone"),
        ("memory", f"{format_bytes(found.memory_bytes)}, {format_bytes(found.available_bytes)} available"),
        ("swap", format_bytes(found.swap_bytes) if found.swap_bytes else "none"),
        ("cgroup", cgroup),
        ("disk", found.path),
        ("direct I/O", "yes" if found.direct_io else "no: reads are buffered and dropped behind themselves"),
        ("reading, by agents", rates),
        ("floor of a process", f"{format_bytes(found.floor_bytes)} ({kinds})"),
        (
            "smallest budget",
            f"{format_bytes(found.smallest_budget_bytes)} for {found.model}"
            if found.model
            else f"{format_bytes(found.smallest_budget_bytes)}, and a window and activations; name a model for its own",
        ),
    ]
