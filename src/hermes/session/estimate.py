"""A profile for a model that was never profiled: operations from the trace, rates from a moment of trying."""

import re

import torch

from hermes.checkpoint.decoder import native
from hermes.checkpoint.readers import Reader
from hermes.memory.pages import drop_idle_pages, fetch_code
from hermes.memory.probe import resident_bytes
from hermes.model.blocks import LoadFactory
from hermes.model.units import Unit
from hermes.plan import TOUCH_STEP_BYTES
from hermes.profile import (
    Calibration,
    ComputeRecord,
    Profile,
    UnitRecord,
    calibrate_compute,
    machine_record,
    measure_bandwidth,
    measure_touch,
    measure_unpacking,
)
from hermes.session.prepared import Prepared
from hermes.session.workload import Workload

__all__ = ["estimate_profile", "measure_floor", "unit_record"]

SAMPLE_BYTES = 64 * 2**20
_LAYER = re.compile(r"^.*?\.\d+(?=\.|$)")


def measure_floor(prepared: Prepared) -> tuple[int, Calibration]:
    """Resident set of this process before any weight, in bytes: kernels in memory, what importing needed given back.

    And how fast those kernels are, with the tokens of the profile that is known, else of the workload.
    """
    native()  # loaded now, so that its code is fetched with the rest
    drop_idle_pages()
    shape: Profile | Workload = prepared.known or prepared.workload
    if prepared.known is not None:
        fetch_code(prepared.known.code)
    tokens = shape.batch_size * shape.sequence_length
    calibration = calibrate_compute(getattr(torch, prepared.dtype), tokens, prepared.lend)
    held_bytes = 0 if prepared.warmed is None else prepared.warmed.nbytes
    return resident_bytes() - held_bytes, calibration


def estimate_profile(
    prepared: Prepared, reader: Reader, factory: LoadFactory, *, floor_bytes: int, calibration: Calibration
) -> Profile:
    """Costs by calculation; `measured` is False. Reads up to 128 MiB of the checkpoint."""
    workload = prepared.workload
    tokens = workload.batch_size * workload.sequence_length
    touch = measure_touch(SAMPLE_BYTES // 4, step_bytes=TOUCH_STEP_BYTES)
    bandwidths = measure_bandwidth(prepared.checkpoint, reader, sample_bytes=SAMPLE_BYTES, agent_counts=(2, 4))
    units = []
    for unit in prepared.partition.units:
        nbytes = sum(load.nbytes for load in factory.block([unit]).loads)
        sample = prepared.sample(unit)
        single = calibration.seconds(sample.nbytes, sample.flops / max(1, workload.sequence_length))
        compute = {workload.batch_size: single, tokens: max(single, calibration.seconds(sample.nbytes, sample.flops))}
        units.append(
            unit_record(
                prepared,
                unit,
                nbytes=nbytes,
                load_seconds={record.num_agents: nbytes / record.bytes_per_second for record in bandwidths},
                compute=ComputeRecord(samples=tuple(sorted(compute.items()))),
            )
        )
    return Profile(
        checkpoint=prepared.checkpoint.fingerprint(),
        machine=machine_record(prepared.checkpoint.files[0].path, torch.get_num_threads()),
        model_class=prepared.model_class,
        dtype=prepared.dtype,
        batch_size=workload.batch_size,
        sequence_length=workload.sequence_length,
        floor_bytes=floor_bytes,
        touch_seconds_per_byte=touch,
        unpack_bytes_per_second=measure_unpacking(prepared.checkpoint),
        bandwidths=tuple(bandwidths),
        units=tuple(units),
        measured=False,
    )


def unit_record(
    prepared: Prepared, unit: Unit, *, nbytes: int, load_seconds: dict[int, float], compute: ComputeRecord
) -> UnitRecord:
    """The record of one unit."""
    match = _LAYER.match(unit.module)
    live = prepared.trace.live_bytes.get(unit.module, 0) if prepared.trace is not None else 0
    return UnitRecord(
        name=unit.name,
        block=match[0] if match else unit.module,
        nbytes=nbytes,
        flops=prepared.sample(unit).flops,
        activation_bytes=live,
        load_seconds=load_seconds,
        compute=compute,
    )
