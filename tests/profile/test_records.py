"""What a profile says of another minute than its own."""

from dataclasses import replace

import pytest

from hermes.profile import BandwidthRecord, ComputeRecord, MachineRecord, Profile, UnitRecord

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


@pytest.mark.parametrize(
    ("ratio", "rate", "streaming"),
    [(1.2, 1.1e9, 0.88e9), (0.8, 0.9e9, 0.72e9), (0.1, 0.1e9, 0.8e9), (10, 10e9, 0.0)],
    ids=["faster", "slower", "limited", "limit lifted"],
)
def test_rates_go_half_way_with_the_disk_unless_it_has_become_another(
    ratio: float, rate: float, streaming: float
) -> None:
    then = replace(
        profile(0.0, (1, 1.0)),
        bandwidths=tuple(BandwidthRecord(num_agents=n, piece_bytes=1, bytes_per_second=n * 1e9) for n in (1, 2)),
        streaming_bytes_per_second=0.8e9,
    )
    now = then.at_rate(ratio)
    assert [record.bytes_per_second for record in now.bandwidths] == pytest.approx([rate, 2 * rate])
    assert now.streaming_bytes_per_second == pytest.approx(streaming)


def test_seconds_between_and_beyond_what_was_measured() -> None:
    record = ComputeRecord(samples=((1, 1.0), (101, 2.0)))
    assert [record.seconds(tokens) for tokens in (1, 51, 101, 201)] == pytest.approx([1.0, 1.5, 2.0, 3.0])
