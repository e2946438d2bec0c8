"""What is found out about a disk, whatever the disk is."""

import time

import pytest
import torch
from safetensors.torch import save_file

from hermes.checkpoint import open_checkpoint, open_reader
from hermes.profile import BandwidthRecord, measure_bandwidth, measure_drift

MIB = 2**20
PIECE_SECONDS = 0.02


class SlowReader:
    """A disk that takes its time for each piece but the first `at_once`, and remembers which were asked for."""

    def __init__(self, reader):
        self._reader = reader
        self.places = []
        self.at_once = 0

    def read_into(self, file, offset, target, required):
        if len(self.places) >= self.at_once:
            time.sleep(PIECE_SECONDS)
        self.places.append((file, offset))
        return self._reader.read_into(file, offset, target, required)


@pytest.fixture
def disk(tmp_path):
    save_file({"w": torch.zeros(16 * MIB, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with open_reader(checkpoint, direct=False) as reader:
        yield checkpoint, SlowReader(reader)


@pytest.mark.parametrize("num_agents", [1, 3])
def test_a_sample_reads_each_place_once_or_stops_in_time(disk, num_agents):
    checkpoint, reader = disk
    sample = {"sample_bytes": 12 * MIB, "agent_counts": [num_agents], "piece_sizes": [MIB]}
    (record,) = measure_bandwidth(checkpoint, reader, **sample)
    assert len(reader.places) == len(set(reader.places)) == 12 + num_agents
    assert record.bytes_per_second <= num_agents * MIB / PIECE_SECONDS
    reader.places.clear()
    (record,) = measure_bandwidth(checkpoint, reader, **sample, seconds=PIECE_SECONDS / 2)
    assert len(reader.places) == 2 * num_agents
    assert record.bytes_per_second <= num_agents * MIB / PIECE_SECONDS


def test_what_a_pause_has_saved_up_is_no_rate(disk):
    checkpoint, reader = disk
    reader.at_once = 2
    (record,) = measure_bandwidth(checkpoint, reader, sample_bytes=4 * MIB, agent_counts=[2], piece_sizes=[MIB])
    assert record.bytes_per_second <= 2 * MIB / PIECE_SECONDS


def test_a_disk_that_has_become_another_is_found_out_with_a_good_setting(disk):
    checkpoint, reader = disk
    known = [BandwidthRecord(num_agents=n, piece_bytes=MIB, bytes_per_second=n * 1e12) for n in (1, 2)]
    drift = measure_drift(known, checkpoint, reader, sample_bytes=4 * MIB, seconds=10)
    assert 0 < drift <= 2 * MIB / PIECE_SECONDS / 2e12
    assert len(reader.places) == 4 + 2
