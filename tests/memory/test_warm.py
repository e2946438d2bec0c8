"""Memory is found beside other work, counted, taken or given back whole."""

import threading
import time

import pytest

from hermes.memory.arena import Arena
from hermes.memory.probe import resident_bytes
from hermes.memory.warm import CHUNK_BYTES, WarmUp

MIB = 2**20


def found(nbytes, range_bytes):
    warm_up = WarmUp(nbytes, range_bytes)
    while warm_up.nbytes < nbytes // CHUNK_BYTES * CHUNK_BYTES:
        time.sleep(0.005)
    return warm_up


def test_what_was_found_is_told_and_given_back():
    before = resident_bytes()
    warm_up = found(4 * CHUNK_BYTES + 1, 2**33)
    assert resident_bytes() >= before + 4 * CHUNK_BYTES - MIB
    warmed = warm_up.stop()
    assert warmed.nbytes == 4 * CHUNK_BYTES
    assert 0 < warmed.seconds_per_byte < 1e-6
    assert resident_bytes() >= before + 4 * CHUNK_BYTES - MIB
    warmed.close()
    assert resident_bytes() <= before + 2 * MIB
    warmed.close()


def test_what_is_taken_is_there_and_stays():
    before = resident_bytes()
    warmed = found(4 * CHUNK_BYTES, 8 * CHUNK_BYTES).stop()
    first, second = warmed.take(CHUNK_BYTES - 1), warmed.take(2 * CHUNK_BYTES)
    warmed.close()
    assert before + 3 * CHUNK_BYTES - MIB <= resident_bytes() <= before + 3 * CHUNK_BYTES + 2 * MIB
    first.view[-1], second.view[0], second.view[-1] = 1, 2, 3
    assert (first.view[-1], second.view[0], second.view[-1]) == (1, 2, 3)
    assert second.nbytes == len(second.view) == 2 * CHUNK_BYTES
    second.discard(0, CHUNK_BYTES)
    assert resident_bytes() <= before + 2 * CHUNK_BYTES + 2 * MIB
    first.close()
    second.close()
    assert resident_bytes() <= before + 2 * MIB


def test_what_is_lent_is_taken_all_the_same():
    warmed = found(2 * CHUNK_BYTES, 2 * CHUNK_BYTES).stop()
    lent = warmed.lend(CHUNK_BYTES)
    lent.view[0] = 7
    assert warmed.take(CHUNK_BYTES).view[0] == 7
    more = warmed.lend(2 * CHUNK_BYTES)
    assert more.nbytes == 2 * CHUNK_BYTES
    assert more.view[0] == 0


@pytest.mark.parametrize("nbytes", [0, 1, 5 * CHUNK_BYTES])
def test_what_the_range_has_not_comes_from_elsewhere(nbytes):
    warmed = WarmUp(0, 4 * CHUNK_BYTES).stop()
    arenas = [warmed.take(nbytes), warmed.take(4 * CHUNK_BYTES)]
    assert [arena.nbytes for arena in arenas] == [nbytes, 4 * CHUNK_BYTES]
    assert all(isinstance(arena, Arena) for arena in arenas)


def test_it_stops_when_told():
    warm_up = WarmUp(2**33, 2**33)
    while not warm_up.nbytes:
        time.sleep(0.001)
    assert warm_up.stop().nbytes < 2**33
    assert not [thread for thread in threading.enumerate() if thread.name == "hermes-warm-up"]


def test_it_shrinks_for_good():
    before = resident_bytes()
    warm_up = found(4 * CHUNK_BYTES, 4 * CHUNK_BYTES)
    warm_up.shrink(2 * CHUNK_BYTES)
    warm_up.shrink(3 * CHUNK_BYTES)
    assert resident_bytes() <= before + 2 * CHUNK_BYTES + 2 * MIB
    assert warm_up.stop().nbytes == 2 * CHUNK_BYTES


def test_addresses_that_the_system_refuses_are_done_without():
    warmed = WarmUp(2**30, 2**62).stop()
    assert warmed.nbytes == 0
    assert warmed.take(4096).nbytes == 4096


def test_nothing_is_wanted():
    assert WarmUp(0, 0).stop().nbytes == 0
