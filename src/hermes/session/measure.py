"""The Layer Profiler's passes: the model itself, streamed, block by block and with nothing else going on (paper, stage 0)."""

import statistics
from collections.abc import Sequence

import torch

from hermes.engine import Span
from hermes.errors import ModelError
from hermes.memory.probe import find_cgroup, resident_bytes
from hermes.model.inputs import example_inputs
from hermes.pipeload import smallest_ring
from hermes.plan import Plan
from hermes.profile import (
    BandwidthRecord,
    ComputeRecord,
    Profile,
    calibrate_compute,
    machine_record,
    measure_bandwidth,
)
from hermes.session.estimate import unit_record
from hermes.session.prepare import Prepared
from hermes.session.session import Session, start_session

__all__ = ["measure_profile"]

MIB = 2**20
SAMPLE_BYTES = 512 * MIB
PIECE_SIZES = (2 * MIB, 8 * MIB)
MEASURED_AGENTS = (1, 2, 4)


def measure_profile(prepared: Prepared) -> Profile:
    """Run the model a few times in the sequential engine, once for each number of agents, and once overlapped.

    Blocking, for about ten times as long as reading the weights takes. Raises ReadError, ModelError.
    """
    workload = prepared.workload
    calibrate_compute(getattr(torch, prepared.dtype), workload.batch_size * workload.sequence_length)
    floor_bytes = resident_bytes()
    cgroup = find_cgroup()
    refaults = cgroup.refaults() if cgroup is not None else 0
    with prepared.reader() as reader:
        bandwidths = measure_bandwidth(
            prepared.checkpoint, reader, sample_bytes=SAMPLE_BYTES, piece_sizes=PIECE_SIZES
        )
    loads: dict[int, list[float]] = {}
    computes: dict[int, list[list[float]]] = {}
    total_seconds = 0.0
    for num_agents in MEASURED_AGENTS:
        with _session(prepared, bandwidths, num_agents, sequential=True) as session:
            for number, tokens in enumerate(_run(prepared, warm=num_agents == MEASURED_AGENTS[0])):
                waits, seconds = _by_unit(session.stats.spans, len(prepared.partition.units), number)
                loads.setdefault(num_agents, waits)
                computes.setdefault(tokens, []).append(seconds)
            total_seconds += sum(session.stats.pass_seconds)
    best = {tokens: [min(column) for column in zip(*samples, strict=True)] for tokens, samples in computes.items()}
    slowdown = _slowdown(prepared, bandwidths, best)
    units = []
    with prepared.reader() as reader:
        factory = prepared.factory(reader.alignment, PIECE_SIZES[-1])
        for number, unit in enumerate(prepared.partition.units):
            units.append(
                unit_record(
                    prepared,
                    unit,
                    nbytes=sum(load.nbytes for load in factory.block([unit]).loads),
                    load_seconds={agents: waits[number] for agents, waits in loads.items()},
                    compute=ComputeRecord(
                        samples=tuple(sorted((tokens, seconds[number]) for tokens, seconds in best.items()))
                    ),
                )
            )
    again = cgroup.refaults() - refaults if cgroup is not None else 0
    return Profile(
        checkpoint=prepared.checkpoint.fingerprint(),
        machine=machine_record(prepared.checkpoint.files[0].path, torch.get_num_threads()),
        dtype=prepared.dtype,
        batch_size=workload.batch_size,
        sequence_length=workload.sequence_length,
        floor_bytes=floor_bytes,
        slowdown=slowdown,
        refaults_per_second=again / max(total_seconds, 1e-9),
        bandwidths=tuple(bandwidths),
        units=tuple(units),
    )


def _session(
    prepared: Prepared, bandwidths: Sequence[BandwidthRecord], num_agents: int, *, sequential: bool
) -> Session:
    """Unit by unit, nothing resident, in a small window; memory is not planned, only bounded by the window."""
    reader = prepared.reader()
    factory = prepared.factory(reader.alignment, PIECE_SIZES[-1])
    blocks, _ = prepared.blocks(factory, "leaf")
    slots = [[load.slot_bytes for load in block.loads] for block in blocks]
    ring_bytes = 2 * smallest_ring(slots)
    floor_bytes = resident_bytes()
    unbounded = 2**62
    plan = Plan(
        budget_bytes=unbounded,
        limit_bytes=unbounded,
        granularity="leaf",
        num_agents=num_agents,
        piece_bytes=PIECE_SIZES[-1],
        ring_bytes=ring_bytes,
        resident=tuple(frozenset() for _ in blocks),
        resident_bytes=0,
        pass_bytes=0,
        first_pass_seconds=0.0,
        steady_pass_seconds=0.0,
        total_seconds=0.0,
        peak_bytes=0,
        floor_bytes=floor_bytes,
        heap_bytes=0,
        pinned_bytes=0,
        bound="disk",
        bound_seconds=0.0,
        sequential=sequential,
    )
    return start_session(prepared, plan, reader, record=True)


def _run(prepared: Prepared, *, warm: bool) -> Sequence[int]:
    """One pass over the whole sequence, and (for a model that generates) one over a single token; tokens of each."""
    workload = prepared.workload
    inputs = example_inputs(
        prepared.module, batch_size=workload.batch_size, sequence_length=workload.sequence_length
    )
    if inputs is None:
        raise ModelError("inputs of this model cannot be guessed; profile it through hermes.stream's example inputs")
    passes = []
    with torch.no_grad():
        if warm:
            prepared.module(**inputs)
        ...
    return passes


def _by_unit(spans: Sequence[Span], num_units: int, number: int) -> tuple[list[float], list[float]]:
    raise NotImplementedError


def _slowdown(prepared: Prepared, bandwidths: Sequence[BandwidthRecord], best: dict[int, list[float]]) -> float:
    return statistics.median([1.0])
