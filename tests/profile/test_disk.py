"""What is found out about a disk, whatever the disk is."""

import time

import pytest
import torch
from safetensors.torch import save_file

from hermes.checkpoint import open_checkpoint, open_reader
from hermes.profile import BandwidthRecord, measure_bandwidth, measure_drift, measure_windows

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


class Cached(SlowReader):
    """A disk that takes its time for buffers that it has not filled lately, of those that caches hold."""

    def __init__(self, reader, cached_bytes):
        super().__init__(reader)
        self._last = []
        self._cached_bytes = cached_bytes

    def read_into(self, file, offset, target, required):
        address = torch.frombuffer(target, dtype=torch.uint8).data_ptr()
        is_cached = address in self._last
        self._last = [*(a for a in self._last if a != address), address][-self._cached_bytes // target.nbytes :]
        time.sleep(PIECE_SECONDS / (20 if is_cached else 1))
        return self._reader.read_into(file, offset, target, required)


def test_a_window_that_caches_hold_is_filled_faster(disk):
    checkpoint, reader = disk
    few = {"piece_bytes": MIB, "num_agents": 1, "sample_bytes": 40 * MIB, "seconds": 9.0, "rounds": 1}
    windows = measure_windows(checkpoint, Cached(reader, 12 * MIB), window_bytes=10 * MIB, most_bytes=16 * MIB, **few)
    assert [size for size, _ in windows] == [8 * MIB, 10 * MIB, 16 * MIB]
    shares = dict(windows)
    assert shares[10 * MIB] == 1.0
    assert shares[8 * MIB] >= 1.0
    assert shares[16 * MIB] < 0.7
    assert measure_windows(checkpoint, reader, window_bytes=4 * MIB, most_bytes=16 * MIB) == ()


def test_a_disk_that_has_become_another_is_found_out_with_a_good_setting(disk):
    checkpoint, reader = disk
    known = [BandwidthRecord(num_agents=n, piece_bytes=MIB, bytes_per_second=n * 1e12) for n in (1, 2)]
    drift = measure_drift(known, checkpoint, reader, sample_bytes=4 * MIB, seconds=10)
    assert 0 < drift <= 2 * MIB / PIECE_SECONDS / 2e12
    assert len(reader.places) == 4 + 2
