"""Which machine this is, as far as a profile depends on it."""

import os
from importlib.metadata import version
from pathlib import Path

import psutil

from hermes.memory.probe import num_cores
from hermes.profile.records import MachineRecord

__all__ = ["machine_record"]


def machine_record(checkpoint: Path, num_threads: int) -> MachineRecord:
    """This machine, and the file system that `checkpoint` is on."""
    return MachineRecord(
        cpu=_cpu_model(),
        num_cores=num_cores(),
        num_threads=num_threads,
        memory_bytes=psutil.virtual_memory().total,
        torch=version("torch"),
        transformers=version("transformers"),
        file_system=f"{os.stat(checkpoint).st_dev:x}",
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else os.uname().machine
