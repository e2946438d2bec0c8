"""`hermes synth`: a seeded random checkpoint of a known architecture, offline. `checkpoint.synth` writes it."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from hermes.checkpoint.synth import ARCHS
from hermes.checkpoint.synth import synth as write_checkpoint
from hermes.units import format_bytes, format_seconds

__all__ = ["synth"]


def synth(
    arch: Annotated[str, typer.Argument(help=f"One of {', '.join(ARCHS)}.")],
    directory: Annotated[Path, typer.Argument(help="Made; must not exist, be empty, or hold this same request.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else as published.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
) -> None:
    """Write a model directory of seeded random weights, shard by shard in little memory."""
    start = time.perf_counter()
    if sys.stderr.isatty():
        path = _write_with_progress(arch, directory, dtype, seed)
    else:
        path = write_checkpoint(arch, directory, dtype=dtype, seed=seed)
    nbytes = sum(file.stat().st_size for file in path.iterdir() if file.suffix == ".safetensors")
    print(f"{path}: {arch}, {format_bytes(nbytes)} of weights, {format_seconds(time.perf_counter() - start)}")


def _write_with_progress(arch: str, directory: Path, dtype: str | None, seed: int) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task(arch, total=None)
        return write_checkpoint(
            arch,
            directory,
            dtype=dtype,
            seed=seed,
            progress=lambda done, total: bar.update(line, completed=done, total=total),
        )
