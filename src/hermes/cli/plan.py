"""`hermes plan`: what a run inside a budget is predicted to cost, or latency against budget; no weight is kept.

The Pipeline Planner itself is `hermes.plan`; how its records look is `hermes.report`.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hermes.cli.options import (
    SEQUENCE_LENGTH,
    Agents,
    Batch,
    Budget,
    Dtype,
    Granularity,
    Model,
    ProfileFile,
    ResidentBytes,
    Revision,
    SequenceLength,
    Sequential,
    Task,
    TrustRemoteCode,
    plan_choices,
)
from hermes.errors import InputError
from hermes.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from hermes.plan import Plan
    from hermes.session import Prepared, Workload

__all__ = ["plan", "plan_document", "settle_workload", "write_json"]

MAX_NEW_TOKENS = 128
"""Asked of a model that generates, unless --new-tokens says otherwise; fewer if it has no positions for them."""


def plan(
    model: Model,
    budget: Budget = None,
    batch: Batch = 1,
    seq: SequenceLength = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=0, help=f"Tokens to generate; {MAX_NEW_TOKENS} for models that generate.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Budgets from the smallest that works to resident.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the sweep to a .png or .html file.")] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON to a file; - for standard output alone.")
    ] = None,
    dtype: Dtype = None,
    profile: ProfileFile = None,
    agents: Agents = None,
    granularity: Granularity = None,
    resident_bytes: ResidentBytes = None,
    sequential: Sequential = False,
    task: Task = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
) -> None:
    """Predict what a run inside a memory budget costs; with --sweep, latency against budget."""
    if budget is None and not (sweep or plot):
        raise InputError("plan needs --budget (as 700MiB), or --sweep for all budgets that work")
    choices = plan_choices(agents=agents, granularity=granularity, resident_bytes=resident_bytes, sequential=sequential)
    budget_bytes = None if budget is None else parse_bytes(budget)
    if plot is not None:
        from hermes.report.plot import check_plot_path

        check_plot_path(plot)
    from hermes import api
    from hermes.checkpoint import resolve_model
    from hermes.memory.allocator import keep_heap_tight
    from hermes.plan import make_plan, smallest_budget
    from hermes.session import MARGIN_BYTES, memory_limit, prepare_model

    keep_heap_tight()
    source = resolve_model(model, revision=revision)
    task, workload = settle_workload(source, task=task, batch=batch, seq=seq, new_tokens=new_tokens)
    prepared = prepare_model(
        source,
        workload=workload,
        task=task,
        dtype=api.torch_dtype(dtype),
        trust_remote_code=trust_remote_code,
        profile=profile,
        room_bytes=memory_limit(budget_bytes or 0),
    )
    with prepared.reader() as reader:
        problem, known = api.pose_problem(prepared, reader)
    smallest_bytes = smallest_budget(problem, MARGIN_BYTES, **choices)
    settled = None
    if budget_bytes is not None:
        settled = make_plan(
            problem,
            budget_bytes=budget_bytes,
            limit_bytes=memory_limit(budget_bytes),
            margin_bytes=MARGIN_BYTES,
            **choices,
        )
    plans = api.sweep_plans(problem, **choices) if sweep or plot is not None else []
    if plot is not None:
        from hermes.report.plot import latency_against_budget

        latency_against_budget(plans, plot, title=f"{prepared.source.name}, {prepared.dtype}: latency against budget")
    if json_file is not None:
        document = _document(prepared, smallest_bytes, measured=known.measured)
        document |= {"plan": plan_document(settled, prepared)} if settled is not None else {}
        document |= {"sweep": [plan_document(one, prepared) for one in plans]} if plans else {}
        write_json(document, json_file)
    if json_file != "-":
        _print(prepared, settled, plans, smallest_bytes, measured=known.measured)
        if plot is not None:
            print(f"plot: {plot}")


def plan_document(plan: "Plan", prepared: "Prepared") -> dict[str, Any]:
    """A plan for JSON: its fields, but how many blocks there are instead of which loads of each stay.

    Some of them are ranges of a matrix's rows, which stand alone at every granularity.
    """
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in ("resident", "packed")}
    return {**fields, "num_blocks": len(plan.resident), "num_row_ranges": _num_row_ranges(prepared)}


def _num_row_ranges(prepared: "Prepared") -> int:
    return sum(unit.rows is not None for unit in prepared.partition.units)


def write_json(document: dict[str, Any], target: str) -> None:
    """To a file, or to standard output for "-". Raises InputError where it cannot be written."""
    if target == "-":
        print(json.dumps(document, indent=1))
        return
    try:
        Path(target).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error


def _document(prepared: "Prepared", smallest_bytes: int, *, measured: bool) -> dict[str, Any]:
    workload = prepared.workload
    return {
        "model": str(prepared.source),
        "dtype": prepared.dtype,
        "weight_bytes": prepared.weight_bytes,
        "batch_size": workload.batch_size,
        "sequence_length": workload.sequence_length,
        "max_new_tokens": workload.max_new_tokens,
        "smallest_budget_bytes": smallest_bytes,
        "measured": measured,
    }


def _print(
    prepared: "Prepared", settled: "Plan | None", plans: list["Plan"], smallest_bytes: int, *, measured: bool
) -> None:
    from rich.console import Console

    from hermes.report.tables import budget_table, plan_table, sweep_table

    console = Console()
    weights = format_bytes(prepared.weight_bytes)
    console.print(f"{prepared.source.name}: {weights} of weights in {prepared.dtype}", highlight=False)
    if settled is not None:
        passes = prepared.workload.num_passes
        console.print(
            plan_table(
                settled,
                num_passes=passes,
                num_row_ranges=_num_row_ranges(prepared),
                smallest_bytes=smallest_bytes,
                measured=measured,
            )
        )
        console.print(budget_table(settled))
    if plans:
        console.print(sweep_table(plans))


def settle_workload(
    directory: Path, *, task: str | None, batch: int, seq: int | None, new_tokens: int | None
) -> tuple[str, "Workload"]:
    """The task that `hermes run` would choose, and shapes that the model has positions for.

    Raises InputError if the numbers that were given do not fit its context; those that were not give way.
    """
    from hermes.session import Workload
    from hermes.tasks.detect import context_tokens, read_config, task_of

    task = task or task_of(directory)
    context = context_tokens(read_config(directory))
    if task == "text-generation" or new_tokens:
        wanted = MAX_NEW_TOKENS if new_tokens is None else new_tokens
        if new_tokens is None and context is not None:
            wanted = max(1, min(wanted, context - seq if seq is not None else context // 2))
    else:
        wanted = MAX_NEW_TOKENS if new_tokens is None and "generation" in task else new_tokens or 0
    after = wanted if task == "text-generation" else 0  # an encoder-decoder's new tokens have positions of their own
    length = SEQUENCE_LENGTH if seq is None else seq
    if seq is None and context is not None:
        length = max(1, min(length, context - after))
    if context is not None and length + after > context:
        raise InputError(
            f"{length} tokens and {after} new ones do not fit the model's context of {context}; "
            f"try --seq {max(1, context - after)}" + f" --new-tokens {context - 1}" * (after >= context)
        )
    return task, Workload(batch_size=batch, sequence_length=length, max_new_tokens=wanted)
