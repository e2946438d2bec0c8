"""The Python interface: `load`, `stream`, `plan` and `profile`. The command line calls the same functions."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hermes.checkpoint.readers import Reader
from hermes.device import Device, find_device
from hermes.errors import InputError
from hermes.memory.allocator import keep_heap_tight, put_off_collections
from hermes.model.binding import HOST
from hermes.model.units import Granularity
from hermes.plan import Plan, Problem, make_plan, smallest_budget
from hermes.profile import Calibration, Profile, measure_drift
from hermes.session import (
    FORWARDS,
    MARGIN_BYTES,
    Prepared,
    Session,
    Target,
    Workload,
    aim_at,
    attach,
    estimate_profile,
    measure_floor,
    measure_profile,
    memory_limit,
    prepare_model,
    prepare_module,
    start_session,
    touch_when_warm,
)
from hermes.units import parse_bytes

__all__ = [
    "load",
    "open_session",
    "plan",
    "pose_problem",
    "profile",
    "settle_plan",
    "stream",
    "sweep_plans",
    "torch_dtype",
]

logger = logging.getLogger("hermes")

KNOWN_CODE_BYTES = 16 * 2**20
"""Of the heap's slack, for code that was not run before: what the profile knows is in the floor already."""
SAMPLE_BYTES = 128 * 2**20
SAMPLE_SECONDS = 0.5
"""Read to find out how fast the disk is now: so much, for so long at most."""
PLANNING_PIECE_BYTES = 8 * 2**20
"""Piece size while costs are counted; the plan's own is used once it is there."""


def load(
    model: str | Path,
    *,
    budget: str | int,
    task: str | None = None,
    auto_class: str | type | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 1,
    sequence_length: int = 128,
    max_new_tokens: int = 128,
    num_agents: int | None = None,
    granularity: str | None = None,
    resident_bytes: int | None = None,
    sequential: bool = False,
    profile: str | Path | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    device_budget: str | int | None = None,
    record: bool = False,
) -> Any:
    """A transformers model whose weights stay on disk and pass through a window of memory as it runs.

    What comes back is the model itself: `forward` and `generate` as always, output bit for bit as if it were fully
    resident. It is a context manager too; `model.hermes` has the plan and what was measured, `model.hermes.close()`
    ends it. Passes run without gradients, one at a time: a call from another thread waits.

    Args:
        model: a directory in Hugging Face layout, or a Hub id.
        budget: bound on the resident set of this whole process at its peak, "700MiB" or bytes; what the caller's own
            code holds already counts. A tighter limit of the cgroup holds instead.
        task: "text-generation", "feature-extraction", "image-classification", ...; else from the configuration.
        auto_class: "AutoModelForCausalLM", or a model class.
        dtype: to compute in, "float32", "bfloat16", ...; else as stored.
        batch_size: sequences at a time that the budget shall hold.
        sequence_length: tokens of each, likewise.
        max_new_tokens: tokens to be generated, likewise; ignored for models that do not generate.
        num_agents: Loading Agents; else the planner's choice.
        granularity: "leaf", "joined", "half" or "layer"; else the planner's choice.
        resident_bytes: weights kept in memory between passes; 0 streams every block; else all that fits.
        sequential: load and compute in turns, for comparison.
        profile: a profile file; else the one `hermes profile` has stored, else an estimate.
        trust_remote_code: allow model code that comes with the checkpoint.
        attn_implementation: as in transformers.
        revision: of a Hub id.
        device: to compute on, "cuda" or "cuda:1"; weights go there through this process's memory, which `budget`
            bounds.
        device_budget: bound on what tensors take of the device's memory, weights and activations; else nine tenths of
            what is free there. Where it shares the host's memory, `budget` is the one for weights.
        record: keep a span for each read and each block in `model.hermes.stats`.

    Raises:
        BudgetError: the budget is below the smallest that works; no block has been loaded.
        CheckpointError, ModelError, InputError: as they say.

    Blocking: until the small pinned weights are read; the first pass is loading by then.
    """
    prepared, _ = open_session(
        model,
        budget_bytes=parse_bytes(budget),
        workload=Workload(
            batch_size=batch_size,
            sequence_length=sequence_length,
            max_new_tokens=max_new_tokens,
            num_forwards=FORWARDS,
        ),
        task=task,
        auto_class=auto_class,
        dtype=dtype,
        num_agents=num_agents,
        granularity=granularity,
        resident_bytes=resident_bytes,
        sequential=sequential,
        profile=profile,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
        revision=revision,
        device=device,
        device_budget=device_budget,
        record=record,
    )
    return prepared.module


@torch.inference_mode(False)  # of whoever calls: what is kept must serve in any mode
def stream(
    module: nn.Module,
    checkpoint: str | Path,
    budget: str | int,
    *,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    num_agents: int | None = None,
    granularity: str | None = None,
    resident_bytes: int | None = None,
    sequential: bool = False,
    matrix_bytes: str | int | None = None,
    device: str = "cpu",
    device_budget: str | int | None = None,
    record: bool = False,
) -> Any:
    """Any module of yours, its weights streamed from a state-dict file (safetensors, .bin, .pt) inside a budget.

    The module may have been built on the meta device (`with torch.device("meta")`) or as usual; weights that are in the
    checkpoint are dropped from it. With example inputs, order, activations and operations are found by a run over fake
    tensors; without, in the first real pass. Matrices of linear layers above `matrix_bytes` are computed by ranges of
    rows (on the CPU), so that none of them must fit into memory whole; some kernels round by the number of rows
    (README.md, Limits). Other arguments, errors and what comes back as in `load`.
    """
    budget_bytes = parse_bytes(budget)
    if not isinstance(example_args, tuple):
        raise InputError(f"example_args is a {type(example_args).__name__}, not a tuple; give (input,)")
    keep_heap_tight()
    module.eval()
    prepared = prepare_module(
        module,
        checkpoint,
        args=example_args,
        kwargs=example_kwargs,
        matrix_bytes=None if matrix_bytes is None else parse_bytes(matrix_bytes),
        device=_device(device, device_budget),
    )
    session = _start(
        prepared,
        budget_bytes,
        device_budget=device_budget,
        num_agents=num_agents,
        granularity=granularity,
        resident_bytes=resident_bytes,
        sequential=sequential,
        record=record,
    )
    return attach(module, session)


def plan(
    model: str | Path,
    *,
    budget: str | int,
    workload: Workload | None = None,
    profile: str | Path | None = None,
    num_agents: int | None = None,
    granularity: str | None = None,
    resident_bytes: int | None = None,
    sequential: bool = False,
    **options: Any,
) -> Plan:
    """What `load` with the same arguments would settle; no weights are kept. Raises as `load` does."""
    keep_heap_tight()
    budget_bytes = parse_bytes(budget)
    options |= {"profile": profile, "room_bytes": memory_limit(budget_bytes)}
    prepared = _prepare(model, workload or Workload(max_new_tokens=128), options)
    with prepared.reader() as reader:
        settled, _ = settle_plan(
            prepared,
            reader,
            budget_bytes,
            num_agents=num_agents,
            granularity=granularity,
            resident_bytes=resident_bytes,
            sequential=sequential,
        )
    return settled


def profile(model: str | Path, *, workload: Workload | None = None, **options: Any) -> Profile:
    """Measure a model on this machine: the paper's Layer Profiler. Blocking: reads the weights a few times.

    The record is returned, not stored; `hermes profile` stores it.
    """
    keep_heap_tight()
    return measure_profile(_prepare(model, workload or Workload(max_new_tokens=2), {**options, "fresh": True}))


@torch.inference_mode(False)
def open_session(
    model: str | Path,
    *,
    budget_bytes: int,
    workload: Workload,
    profile: str | Path | None = None,
    num_agents: int | None = None,
    granularity: str | None = None,
    resident_bytes: int | None = None,
    sequential: bool = False,
    device: str = "cpu",
    device_budget: str | int | None = None,
    record: bool = False,
    **options: Any,
) -> tuple[Prepared, Session]:
    """Prepare, plan and start; `load` without the dressing."""
    keep_heap_tight()
    options["device"] = _device(device, device_budget)
    with put_off_collections():
        limit_bytes = memory_limit(budget_bytes)
        if options["device"] != HOST:
            limit_bytes = 0  # memory that is found beside the preparations is not the kind that a device knows
        prepared = _prepare(model, workload, {**options, "profile": profile, "limit_bytes": limit_bytes})
        session = _start(
            prepared,
            budget_bytes,
            device_budget=device_budget,
            num_agents=num_agents,
            granularity=granularity,
            resident_bytes=resident_bytes,
            sequential=sequential,
            record=record,
        )
    attach(session.prepared.module, session)
    return session.prepared, session


def settle_plan(prepared: Prepared, reader: Reader, budget_bytes: int, **choices: Any) -> tuple[Plan, Profile]:
    """The plan for a prepared model, and the profile it rests on: the one it was prepared with, or an estimate."""
    problem, known = pose_problem(prepared, reader)
    return _plan_within(problem, budget_bytes, **choices), known


def settle_on_device(
    prepared: Prepared,
    reader: Reader,
    budget_bytes: int,
    *,
    device_budget: str | int | None,
    granularity: Granularity | None,
    **choices: Any,
) -> tuple[Plan, Target]:
    """The same for the device that the model was prepared for: how its memory is used, and the plan for the rest."""
    target, compute = aim_at(
        Device(str(prepared.device)),
        prepared,
        prepared.factory(reader.alignment, PLANNING_PIECE_BYTES),
        budget_bytes=None if device_budget is None else parse_bytes(device_budget),
        granularity=granularity,
    )
    problem, _ = pose_problem(prepared, reader, compute)
    return _plan_within(target.rest_of(problem), budget_bytes, granularity=granularity, **choices), target


def pose_problem(prepared: Prepared, reader: Reader, compute: Calibration | None = None) -> tuple[Problem, Profile]:
    """What the planner is asked about a prepared model in this process, and the profile its costs come from.

    An estimate rests on how fast this machine computes, or on `compute`.
    """
    floor_bytes, calibration = measure_floor(prepared)
    calibration = compute or calibration
    factory = prepared.factory(reader.alignment, PLANNING_PIECE_BYTES)
    known, warmed = prepared.known, prepared.warmed
    if known is None:
        known = estimate_profile(prepared, reader, factory, floor_bytes=floor_bytes, calibration=calibration)
    else:
        drift = measure_drift(
            known.bandwidths,
            prepared.checkpoint,
            reader,
            sample_bytes=SAMPLE_BYTES,
            seconds=SAMPLE_SECONDS,
            lend=prepared.lend,
        )
        known = known.at_rate(drift).at_speed(calibration.speed)
    if warmed is not None:
        known = replace(known, touch_seconds_per_byte=touch_when_warm(known.touch_seconds_per_byte, warmed))
    problem = prepared.problem(known, factory, floor_bytes=floor_bytes)
    if known.code:
        problem = replace(problem, heap_bytes=problem.heap_bytes - KNOWN_CODE_BYTES)
    return problem, known


def sweep_plans(problem: Problem, *, num_budgets: int = 12, **choices: Any) -> list[Plan]:
    """Plans for budgets from the smallest that works to fully resident, evenly spaced; limits of the system aside.

    `choices` as in `make_plan`. With `resident_bytes` given, the last budget is the one that more would not speed up.
    """

    def settle(budget_bytes: int) -> Plan:
        return make_plan(
            problem, budget_bytes=budget_bytes, limit_bytes=budget_bytes, margin_bytes=MARGIN_BYTES, **choices
        )

    smallest = smallest_budget(problem, MARGIN_BYTES, **choices)
    weights = sum(sum(unit.slot_bytes) for unit in problem.units)
    largest = max(smallest, settle(smallest + weights).peak_bytes + MARGIN_BYTES)
    steps = max(1, num_budgets - 1)
    budgets = [smallest + (largest - smallest) * step // steps for step in range(num_budgets)]
    return [settle(budget_bytes) for budget_bytes in dict.fromkeys(budgets)]


def torch_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by torch's name ("bfloat16") or a common short one ("bf16"). Raises InputError for one nobody knows."""
    if name is None or isinstance(name, torch.dtype):
        return name
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
    found = None if name == "auto" else getattr(torch, short.get(name, name), None)
    if name != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(f"unknown dtype {name!r}; try float32, bfloat16 or float16")
    return found


def _prepare(model: str | Path, workload: Workload, options: dict[str, Any]) -> Prepared:
    options["dtype"] = torch_dtype(options.get("dtype"))
    return prepare_model(model, workload=workload, **options)


def _start(
    prepared: Prepared,
    budget_bytes: int,
    *,
    record: bool,
    device_budget: str | int | None = None,
    **choices: Any,
) -> Session:
    reader = prepared.reader()
    target = None
    try:
        if prepared.device == HOST:
            settled, _ = settle_plan(prepared, reader, budget_bytes, **choices)
        else:
            settled, target = settle_on_device(prepared, reader, budget_bytes, device_budget=device_budget, **choices)
    except BaseException:
        reader.close()
        raise
    return start_session(prepared, settled, reader, record=record, target=target)


def _plan_within(problem: Problem, budget_bytes: int, **choices: Any) -> Plan:
    """`make_plan` with what the system allows this process."""
    return make_plan(
        problem,
        budget_bytes=budget_bytes,
        limit_bytes=memory_limit(budget_bytes),
        margin_bytes=MARGIN_BYTES,
        **choices,
    )


def _device(name: str, device_budget: str | int | None) -> torch.device:
    """Raises InputError where there is none of this name."""
    device = find_device(name)
    if device == HOST and device_budget is not None:
        raise InputError(f"a device budget of {device_budget} is for a device other than the CPU; give --device, too")
    return device
