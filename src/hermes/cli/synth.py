"""`hermes synth`: a seeded random checkpoint of a known architecture, offline. `checkpoint.synth` writes it."""

import time
from pathlib import Path
from typing import Annotated

import typer

from hermes.checkpoint.synth import ARCHS
from hermes.checkpoint.synth import synth as write_checkpoint
from hermes.report.progress import byte_progress
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
    with byte_progress(arch) as progress:
        path = write_checkpoint(arch, directory, dtype=dtype, seed=seed, progress=progress)
    nbytes = sum(file.stat().st_size for file in path.iterdir() if file.suffix == ".safetensors")
    print(f"{path}: {arch}, {format_bytes(nbytes)} of weights, {format_seconds(time.perf_counter() - start)}")
