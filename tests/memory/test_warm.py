"""Memory is found beside other work, counted, and given back whole."""

import threading
import time

from hermes.memory.probe import resident_bytes
from hermes.memory.warm import CHUNK_BYTES, WarmUp

MIB = 2**20


def test_what_was_taken_is_told_and_given_back():
    before = resident_bytes()
    warm_up = WarmUp(4 * CHUNK_BYTES + 1)
    while len(warm_up._seconds) < 4:
        time.sleep(0.005)
    assert resident_bytes() >= before + 4 * CHUNK_BYTES - MIB
    warmed = warm_up.stop()
    assert warmed.nbytes == 4 * CHUNK_BYTES
    assert 0 < warmed.seconds_per_byte < 1e-6
    assert resident_bytes() <= before + 2 * MIB
    assert warm_up.stop() == warmed


def test_it_stops_when_told():
    warm_up = WarmUp(2**40)
    while not warm_up._seconds:
        time.sleep(0.001)
    assert warm_up.stop().nbytes < 2**34
    assert not [thread for thread in threading.enumerate() if thread.name == "hermes-warm-up"]


def test_nothing_is_wanted():
    assert WarmUp(0).stop().nbytes == 0
