"""What a profile says of another minute than its own."""

from dataclasses import replace

import pytest

from hermes.profile import ComputeRecord, MachineRecord, Profile, UnitRecord

MACHINE = MachineRecord(
    cpu="c", num_cores=2, num_threads=2, memory_bytes=1, torch="2", transformers="5", file_system="ext4"
)
UNIT = UnitRecord(
    name="u", block="b", nbytes=8, flops=8, activation_bytes=0, load_seconds={}, compute=ComputeRecord(samples=())
)


def profile(speed: float, *samples: tuple[int, float]) -> Profile:
    unit = replace(UNIT, compute=ComputeRecord(samples=samples))
    return Profile(
        checkpoint="", machine=MACHINE, model_class="M", dtype="float32", batch_size=1, sequence_length=128,
        floor_bytes=0, bandwidths=(), units=(unit,), speed=speed,
    )  # fmt: skip


def test_arithmetic_goes_half_way_with_the_machine() -> None:
    slower = profile(200e9, (1, 0.25), (16, 0.5), (128, 1.0)).at_speed(100e9)
    assert slower.compute_of("u").samples == ((1, 0.25), (16, 0.5), (128, 1.5))
    assert slower.speed == 100e9
    assert profile(100e9, (128, 1.0)).at_speed(200e9).compute_of("u").samples == ((128, 0.75),)


def test_an_unknown_speed_changes_nothing() -> None:
    estimate = profile(0.0, (128, 1.0))
    assert estimate.at_speed(100e9) is estimate


def test_seconds_between_and_beyond_what_was_measured() -> None:
    record = ComputeRecord(samples=((1, 1.0), (101, 2.0)))
    assert [record.seconds(tokens) for tokens in (1, 51, 101, 201)] == pytest.approx([1.0, 1.5, 2.0, 3.0])
