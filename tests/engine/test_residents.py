"""Loads that come to stay, one by one: what they take, and where."""

import sys

import pytest

from hermes.engine.residents import Residents
from hermes.memory.ledger import Ledger
from hermes.memory.probe import memory_split
from hermes.pipeload import Load, Pipeline

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("sizes", [[9 * MIB, MIB, 65536, 65536], [3 * MIB, 262144, 12288], [2 * MIB, 2 * MIB]])
@pytest.mark.parametrize("room", [8 * MIB, 26 * MIB])
def test_what_comes_to_stay_takes_what_its_account_says(sizes, room):
    """However far apart: no huge page around a small slot is filled with nothing."""
    blocks = [
        [Load(name="load", slot_bytes=nbytes, data_offset=0, nbytes=nbytes, pieces=()) for nbytes in sizes]
        for _ in range(40)
    ]
    nothing = [frozenset()] * len(blocks)
    ledger, kept = Ledger(1 << 40), []
    residents = Residents(blocks, nothing, (), ledger, elastic=True)
    before = memory_split().anon_bytes
    taken = residents.keep(room, Pipeline([sizes] * 40, nothing, 20 * MIB), lambda *key: kept.append(key))
    for block, number in kept:
        residents.store.touch(residents.slot(block, number), sizes[number])
    assert taken == ledger.accounts["resident"] > room // 2
    assert memory_split().anon_bytes - before < taken + MIB
