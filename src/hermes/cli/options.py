"""Options that several subcommands have: one spelling, one help text, one check."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from hermes.errors import InputError
from hermes.units import parse_bytes

__all__ = [
    "SEQUENCE_LENGTH",
    "Agents",
    "Batch",
    "Budget",
    "DeviceBudget",
    "DeviceName",
    "Dtype",
    "Granularity",
    "Model",
    "ProfileFile",
    "ResidentBytes",
    "Revision",
    "SequenceLength",
    "Sequential",
    "Task",
    "TrustRemoteCode",
    "plan_choices",
]

SEQUENCE_LENGTH = 128
"""Tokens that are planned and profiled for where --seq does not say."""

MAX_AGENTS = 256
"""Threads; more reads in flight than any disk's queue makes faster."""

Model = Annotated[str, typer.Argument(help="Directory in Hugging Face layout, or Hub id.")]
Budget = Annotated[str | None, typer.Option(help="Memory of the whole process, as 700MiB or 1.5GiB.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences or images at a time.")]
SequenceLength = Annotated[
    int | None, typer.Option("--seq", min=1, help=f"Tokens of each text or prompt; else {SEQUENCE_LENGTH}.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else as stored.")]
ProfileFile = Annotated[Path | None, typer.Option(help="Profile to plan with; else the stored one.")]
Agents = Annotated[int | None, typer.Option(min=1, max=MAX_AGENTS, help="Loading Agents; else the planner's choice.")]
Granularity = Annotated[str | None, typer.Option(help="leaf, joined, half or layer; else the planner's choice.")]
ResidentBytes = Annotated[
    str | None, typer.Option(help="Weights kept between passes; 0 streams every block; else all that fit.")
]
Sequential = Annotated[bool, typer.Option("--sequential", help="Load and compute in turns.")]
Task = Annotated[str | None, typer.Option(help="As transformers names it; else from the configuration.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow model code that comes with the checkpoint.")
]
DeviceName = Annotated[
    str, typer.Option("--device", help="To compute on: cpu, or cuda, whose weights come through --budget.")
]
DeviceBudget = Annotated[
    str | None, typer.Option(help="Of the device's memory, as 6GiB; else nine tenths of what is free there.")
]
Revision = Annotated[str | None, typer.Option(help="Of a Hub id.")]


def plan_choices(
    *, agents: int | None, granularity: str | None, resident_bytes: str | None, sequential: bool
) -> dict[str, Any]:
    """What the user has settled instead of the planner, as `make_plan` takes it. Raises InputError, BudgetError."""
    if granularity not in (None, "leaf", "joined", "half", "layer"):
        raise InputError(f"unknown granularity {granularity!r}; choose leaf, joined, half or layer")
    kept: int | None = None
    if resident_bytes is not None:  # 0 is a size here
        kept = 0 if re.fullmatch(r"\s*0+\s*[A-Za-z]*", resident_bytes) else parse_bytes(resident_bytes)
    return {"num_agents": agents, "granularity": granularity, "resident_bytes": kept, "sequential": sequential}
