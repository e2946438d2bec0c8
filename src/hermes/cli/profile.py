"""`hermes profile`: measure a model on this machine, keep the record for the planner, and show it.

The Layer Profiler itself is `hermes.session.measure`; where records are kept is `hermes.profile.store`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from hermes.cli.options import Batch, Dtype, Model, Revision, SequenceLength, Task, TrustRemoteCode
from hermes.cli.plan import settle_workload
from hermes.units import format_bytes

__all__ = ["profile"]


def profile(
    model: Model,
    batch: Batch = 1,
    seq: SequenceLength = None,
    new_tokens: Annotated[int | None, typer.Option(min=0, help="0 leaves passes over single tokens out.")] = None,
    dtype: Dtype = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write the profile to a file too; - for standard output."),
    ] = None,
    units: Annotated[bool, typer.Option("--units", help="A row for each unit, not for each layer.")] = False,
    task: Task = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
) -> None:
    """Measure what each layer of a model costs on this machine; `hermes plan` and `hermes run` then use it."""
    from hermes import api
    from hermes.checkpoint import resolve_model
    from hermes.errors import InputError
    from hermes.profile import profile_path, save_profile

    source = resolve_model(model, revision=revision)
    task, workload = settle_workload(source, task=task, batch=batch, seq=seq, new_tokens=new_tokens)
    few = dataclasses.replace(workload, max_new_tokens=min(2, workload.max_new_tokens))
    measured = api.profile(
        source,
        workload=few,
        dtype=dtype,
        task=task,
        trust_remote_code=trust_remote_code,
    )
    path = profile_path(source, measured.model_class, measured.dtype)
    try:
        save_profile(measured, path)
        if json_file not in (None, "-"):
            save_profile(measured, Path(json_file).absolute())
    except OSError as error:
        raise InputError(f"cannot write {error.filename or path}: {error.strerror or error}") from error
    if json_file == "-":
        print(path.read_text(encoding="utf-8"))
        return
    from rich.console import Console

    from hermes.report.tables import bandwidth_table, delay_facts, facts_table, profile_table, touch_fact

    machine = measured.machine
    console = Console()
    console.print(profile_table(measured, by_unit=units), "")
    console.print(bandwidth_table(measured))
    console.print(
        facts_table(
            "Machine",
            [
                ("processor", f"{machine.cpu}, {machine.num_cores} cores, {machine.num_threads} threads computing"),
                ("floor", f"{format_bytes(measured.floor_bytes)} before any weight"),
                touch_fact(measured.touch_seconds_per_byte),
                *delay_facts(measured),
                ("pages read back", f"{measured.refaults_per_second:.0f} a second (refaults: the cap is too tight)"),
                ("stored", str(path)),
            ],
        )
    )
