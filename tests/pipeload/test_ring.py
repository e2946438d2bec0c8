"""The window's arithmetic: spans never overlap, never cross the end, and room that is there is given."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes.errors import EngineError
from hermes.pipeload import Ring

SIZES = st.integers(0, 40)


@given(capacity=st.integers(0, 100), steps=st.lists(st.one_of(st.none(), SIZES), max_size=60))
def test_spans_out_at_once_are_disjoint_and_inside(capacity, steps):
    ring = Ring(capacity)
    out = deque()
    for nbytes in steps:
        if nbytes is None:
            if out:
                ring.free(out.popleft()[0])
        else:
            offset = ring.allocate(nbytes)
            largest = max([nbytes, *(n for _, n in out)])
            if offset is None:
                # What is skipped at the end is smaller than the span that did not fit there, which is out still.
                assert sum(n for _, n in out) + nbytes + largest - 1 >= capacity
                continue
            assert 0 <= offset
            assert offset + nbytes <= capacity
            assert all(offset + nbytes <= start or start + n <= offset for start, n in out if n and nbytes)
            out.append((offset, nbytes))
        assert ring.used_bytes == sum(n for _, n in out) <= capacity


@given(capacity=st.integers(1, 100), nbytes=st.integers(1, 100), rounds=st.integers(1, 20))
def test_an_empty_ring_gives_all_it_has(capacity, nbytes, rounds):
    ring = Ring(capacity)
    for _ in range(rounds):
        offset = ring.allocate(min(nbytes, capacity))
        assert offset == 0
        assert ring.allocate(capacity) is None or nbytes == 0
        ring.free(offset)
        assert ring.allocate(capacity + 1) is None


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=30), slack=st.integers(0, 50))
def test_alone_in_the_ring_a_block_of_loads_finds_its_room(sizes, slack):
    """The bound behind `smallest_ring`: wherever its first load was put, while blocks before it were there."""
    ring = Ring(sum(sizes) + max(sizes[1:], default=0) + slack)
    out = deque()
    for _ in range(5):
        for nbytes in sizes:
            while (offset := ring.allocate(nbytes)) is None:
                ring.free(out.popleft())
            out.append(offset)
        assert len(out) >= len(sizes)


def test_the_skipped_end_is_used_again_after_the_next_round():
    ring = Ring(10)
    assert [ring.allocate(4), ring.allocate(4)] == [0, 4]
    assert ring.allocate(4) is None
    ring.free(0)
    assert ring.allocate(4) == 0  # 8 to 10 are skipped
    assert ring.allocate(1) is None
    ring.free(4)
    assert ring.allocate(6) == 4
    assert ring.used_bytes == 10
    ring.free(0)
    ring.free(4)
    assert ring.used_bytes == 0


def test_freeing_out_of_order_is_an_error_that_names_the_spans():
    ring = Ring(10)
    ring.allocate(3)
    ring.allocate(3)
    with pytest.raises(EngineError, match=r"span at 3 freed out of order.*\(0, 3\)"):
        ring.free(3)
    with pytest.raises(EngineError, match="freed out of order"):
        Ring(10).free(0)


def test_an_empty_span_takes_no_room():
    ring = Ring(10)
    assert ring.allocate(0) == 0
    assert ring.allocate(10) == 0
    assert ring.allocate(0) == 10
    assert ring.allocate(1) is None
