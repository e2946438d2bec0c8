"""The Layer Profiler's passes: the model itself, streamed unit by unit with nothing else going on."""

import contextlib
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from hermes.errors import BudgetError, ModelError
from hermes.memory.allocator import trim_heap
from hermes.memory.pages import code_in_use
from hermes.memory.probe import available_bytes, find_cgroup, resident_bytes
from hermes.model.inputs import example_inputs
from hermes.pipeload import smallest_ring
from hermes.plan import TOUCH_STEP_BYTES, Bandwidth, Plan, choose_bandwidth
from hermes.profile import (
    ComputeRecord,
    Profile,
    block_samples,
    calibrate_compute,
    fit_delays,
    machine_record,
    measure_bandwidth,
    measure_touch,
    measure_unpacking,
    measure_windows,
)
from hermes.session.estimate import estimate_profile, measure_floor, unit_record
from hermes.session.prepared import Prepared
from hermes.session.session import MARGIN_BYTES, Session, memory_limit, start_session
from hermes.units import format_budget, format_bytes

__all__ = ["measure_calls", "measure_profile"]

MIB = 2**20
SAMPLE_BYTES = 512 * MIB
TOUCHED_BYTES = 2048 * MIB
PIECE_SIZES = (2 * MIB, 8 * MIB)
MEASURED_AGENTS = (1, 2, 4)
SHORTER = 8
"""A text encoder is also measured on sequences shorter by this factor."""
ROUNDS = 5
"""The first is cold. Of four, one that something interrupted does not count; of two it was half of a unit's time."""
QUIET_ROUNDS = 2
WINDOW_UNITS = 4
UNBOUNDED = 2**62


def measure_profile(prepared: Prepared) -> Profile:
    """Run the model in the sequential engine for each number of agents, and then overlapped.

    Seconds of loading come from the former, where nothing else goes on; seconds of computing from the latter, because
    agents that read take processor time and memory bandwidth from the computation they are meant to hide behind. What
    it takes without them is kept beside it, for plans that read little.

    Blocking, for about ten times as long as reading the weights takes. Raises ReadError, ModelError, and BudgetError
    where a cgroup leaves no room for it.
    """
    workload = prepared.workload
    whole_tokens = workload.batch_size * workload.sequence_length
    preparing_code = code_in_use()  # since `prepare_model` gave back what importing torch had needed
    floor_bytes, calibration = measure_floor(prepared)
    cgroup = find_cgroup()
    refaults = cgroup.refaults() if cgroup is not None else 0
    began = time.perf_counter()
    dtype = getattr(torch, prepared.dtype)
    speeds = [calibration.speed]
    touch = measure_touch(min(TOUCHED_BYTES, memory_limit(available_bytes()) // 4), step_bytes=TOUCH_STEP_BYTES)
    with prepared.reader() as reader:
        bandwidths = measure_bandwidth(prepared.checkpoint, reader, sample_bytes=SAMPLE_BYTES, piece_sizes=PIECE_SIZES)
    chosen = choose_bandwidth(
        [
            Bandwidth(num_agents=b.num_agents, piece_bytes=b.piece_bytes, bytes_per_second=b.bytes_per_second)
            for b in bandwidths
        ]
    )
    loads: dict[int, list[float]] = {}
    computes: dict[int, list[list[float]]] = {}
    computed_first: list[float] = []  # with each number of agents; the first of all is cold
    for num_agents in MEASURED_AGENTS:
        with _start(prepared, num_agents, sequential=True) as session:
            _, loads[num_agents], seconds = next(_measured_passes(prepared, session))
            computed_first.append(sum(seconds))
            if num_agents == MEASURED_AGENTS[-1]:
                alone = {tokens: sum(seconds) for tokens, _, seconds in _measured_passes(prepared, session)}
    with _start(prepared, chosen.num_agents, chosen.piece_bytes, sequential=False) as session:
        for _ in range(ROUNDS):
            for tokens, _, seconds in _measured_passes(prepared, session):
                computes.setdefault(tokens, []).append(seconds)
            speeds.append(calibrate_compute(dtype, whole_tokens).speed)
        code = code_in_use()
        stats = session.stats
        window_bytes = session.plan.ring_bytes
        beside = [
            nbytes / seconds
            for nbytes, seconds, stall in zip(
                stats.pass_bytes, stats.pass_seconds, stats.pass_stall_seconds, strict=True
            )
            if stall > seconds / 2  # the disk alone decided
        ]
    computed = {tokens: typical_seconds(samples[1:]) for tokens, samples in computes.items()}  # the first is cold
    quiet = tuple(
        (tokens, min(1.0, max(alone[tokens], 1e-9) / max(sum(seconds), 1e-9)))
        for tokens, seconds in sorted(computed.items())
    )
    units = []
    with prepared.reader() as reader:
        most_bytes = memory_limit(available_bytes()) // 4
        windows = measure_windows(
            prepared.checkpoint,
            reader,
            window_bytes=window_bytes,
            most_bytes=most_bytes,
            num_agents=chosen.num_agents,
        )
        factory = prepared.factory(reader.alignment, PIECE_SIZES[-1])
        for number, unit in enumerate(prepared.partition.units):
            units.append(
                unit_record(
                    prepared,
                    unit,
                    nbytes=sum(load.nbytes for load in factory.block([unit]).loads),
                    load_seconds={agents: waits[number] for agents, waits in loads.items()},
                    compute=ComputeRecord(
                        samples=tuple(sorted((tokens, seconds[number]) for tokens, seconds in computed.items()))
                    ),
                )
            )
    again = cgroup.refaults() - refaults if cgroup is not None else 0
    return Profile(
        checkpoint=prepared.checkpoint.fingerprint(),
        machine=machine_record(prepared.checkpoint.files[0].path, torch.get_num_threads()),
        model_class=prepared.model_class,
        dtype=prepared.dtype,
        batch_size=workload.batch_size,
        sequence_length=workload.sequence_length,
        floor_bytes=floor_bytes,
        refaults_per_second=again / (time.perf_counter() - began),
        touch_seconds_per_byte=touch,
        unpack_bytes_per_second=measure_unpacking(prepared.checkpoint),
        bandwidths=tuple(bandwidths),
        # Of the faster half: what others do to the disk meanwhile, a sample at each load tells.
        streaming_bytes_per_second=statistics.median(sorted(beside)[len(beside) // 2 :]) if beside else 0.0,
        windows=windows,
        units=tuple(units),
        quiet=quiet,
        speed=statistics.median(speeds),
        cold_seconds=max(0.0, computed_first[0] - alone[whole_tokens]),
        code=code,
        preparing_code=preparing_code,
        trace=prepared.trace,
        delays=fit_delays(block_samples(units, whole_tokens)),
    )


def measure_calls(
    prepared: Prepared, call: Callable[[Any], object], *, rounds: int = 3, limit_bytes: int = UNBOUNDED
) -> Profile:
    """An estimate whose seconds of computing are measured, by so many calls of `call(module)` after a cold one.

    And, by a few more in the sequential engine, what they are while nobody reads. The disk is sampled as for an
    estimate, while nothing else uses it. Blocking, for about as long as reading the
    weights takes in each round. Raises ReadError, BudgetError where this process would outgrow `limit_bytes`, and
    whatever `call` raises.
    """
    floor_bytes, calibration = measure_floor(prepared)
    with prepared.reader() as reader:
        factory = prepared.factory(reader.alignment, PIECE_SIZES[-1])
        profile = estimate_profile(prepared, reader, factory, floor_bytes=floor_bytes, calibration=calibration)
    num_units = len(prepared.partition.units)
    rows, between, alone = [], [], []
    with _start(prepared, 2, sequential=False, limit_bytes=limit_bytes) as session, torch.no_grad():
        for _ in range(1 + rounds):
            call(prepared.module)
            rows.append(_by_unit(session, num_units)[1])
            stats = session.stats
            between.append(stats.pass_seconds[-1] - stats.pass_stall_seconds[-1] - sum(rows[-1]))
    with contextlib.suppress(BudgetError):  # the heap has grown: without room, reading is taken to cost nothing
        with _start(prepared, 2, sequential=True, limit_bytes=limit_bytes) as session, torch.no_grad():
            for _ in range(QUIET_ROUNDS):
                call(prepared.module)
                alone.append(sum(_by_unit(session, num_units)[1]))
    tokens = prepared.workload.batch_size * prepared.workload.sequence_length
    seconds = typical_seconds(rows[1:])
    quiet = min(1.0, max(min(alone), 1e-9) / max(sum(seconds), 1e-9)) if alone else 1.0
    units = tuple(
        replace(unit, compute=ComputeRecord(samples=((tokens, cost),)))
        for unit, cost in zip(profile.units, seconds, strict=True)
    )
    return replace(
        profile,
        units=units,
        quiet=((tokens, quiet),),
        boundary_seconds=max(0.0, statistics.median(between[1:])) / max(1, prepared.partition.num_in_pass),
        measured=True,
        delays=fit_delays(block_samples(units, tokens)),
    )


def typical_seconds(passes: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each unit: their medians, scaled to the median of whole passes.

    Something is interrupted in every pass, though not the same unit each time: medians alone would add up to less.
    """
    medians = [statistics.median(column) for column in zip(*passes, strict=True)]
    whole = statistics.median(sum(seconds) for seconds in passes)
    return [seconds * whole / max(sum(medians), 1e-9) for seconds in medians]


def _measured_passes(prepared: Prepared, session: Session) -> Iterator[tuple[int, list[float], list[float]]]:
    """For each pass: tokens in it, seconds each unit was waited for, seconds each unit computed.

    The first pass is over the whole sequence. A model that generates makes a second one over one token per sequence,
    after its own cache, and its head computes the last position alone; another text model, over a short sequence.
    """
    workload = prepared.workload
    inputs = example_inputs(prepared.module, batch_size=workload.batch_size, sequence_length=workload.sequence_length)
    if inputs is None:
        raise ModelError("inputs of this model cannot be guessed; use hermes.stream with example inputs")
    with torch.no_grad():
        generates = "input_ids" in inputs and workload.max_new_tokens > 0
        if generates and "logits_to_keep" in inspect.signature(prepared.module.forward).parameters:
            inputs["logits_to_keep"] = 1
        output = prepared.module(**inputs)
        yield workload.batch_size * workload.sequence_length, *_by_unit(session, len(prepared.partition.units))
        if "input_ids" in inputs and not generates and (short := workload.sequence_length // SHORTER):
            prepared.module(**{name: value[:, :short] if value.ndim == 2 else value for name, value in inputs.items()})
            yield workload.batch_size * short, *_by_unit(session, len(prepared.partition.units))
        cache = output.get("past_key_values") if generates else None
        if cache is not None:
            token = torch.ones(workload.batch_size, 1, dtype=torch.long)
            name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
            rest = {"encoder_outputs": (output.encoder_last_hidden_state,)} if name == "decoder_input_ids" else {}
            prepared.module(**{name: token}, past_key_values=cache, use_cache=True, **rest)
            yield workload.batch_size, *_by_unit(session, len(prepared.partition.units))


def _by_unit(session: Session, num_units: int) -> tuple[list[float], list[float]]:
    """Sum up the spans of the pass that has just ended, and forget them."""
    waits, seconds = [0.0] * num_units, [0.0] * num_units
    wait = 0.0
    for span in session.stats.spans:
        if span.agent != "inference":
            continue
        if span.block is None:
            wait = span.end_seconds - span.start_seconds
        else:
            waits[span.block] += wait
            seconds[span.block] += span.end_seconds - span.start_seconds
            wait = 0.0
    session.stats.spans.clear()
    return waits, seconds


def _start(
    prepared: Prepared,
    num_agents: int,
    piece_bytes: int = PIECE_SIZES[-1],
    *,
    sequential: bool,
    limit_bytes: int = UNBOUNDED,
) -> Session:
    """Unit by unit, nothing resident, in a window of four of the largest, or less where there is no room for them.

    Raises BudgetError where there is none for that: the system would evict this process's code, and read it back, for
    hours.
    """
    reader = prepared.reader()
    factory = prepared.factory(reader.alignment, piece_bytes)
    blocks, _ = prepared.blocks(factory, "leaf")
    slots = [[load.slot_bytes for load in block.loads] for block in blocks]
    smallest_bytes = smallest_ring(slots)
    roomy_bytes = WINDOW_UNITS * max(map(sum, slots), default=0)
    limit_bytes = memory_limit(limit_bytes)
    trim_heap()
    least_bytes = resident_bytes() + prepared.heap_bytes + MARGIN_BYTES + smallest_bytes
    if least_bytes > limit_bytes:
        reader.close()
        least_bytes = max(least_bytes, prepared.preparing_bytes)
        raise BudgetError(
            f"measuring {prepared.source.name} takes {format_bytes(least_bytes)}; the limit is "
            f"{format_bytes(limit_bytes)}; try --budget {format_budget(least_bytes)}",
            minimum_bytes=least_bytes,
        )
    plan = Plan(
        budget_bytes=limit_bytes,
        limit_bytes=limit_bytes,
        granularity="leaf",
        num_agents=num_agents,
        piece_bytes=piece_bytes,
        ring_bytes=min(roomy_bytes, smallest_bytes + limit_bytes - least_bytes),
        resident=tuple(frozenset() for _ in blocks),
        resident_bytes=0,
        pass_bytes=0,
        first_pass_seconds=0.0,
        steady_pass_seconds=0.0,
        total_seconds=0.0,
        peak_bytes=0,
        floor_bytes=0,
        heap_bytes=0,
        pinned_bytes=0,
        bound="disk",
        bound_seconds=0.0,
        sequential=sequential,
    )
    return start_session(prepared, plan, reader, record=True)
