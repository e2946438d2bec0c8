"""What stays on a device: never more than its budget, never less than would fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes.device import plan_device
from hermes.errors import BudgetError

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


def plan(blocks, budget_bytes, num_in_pass=None, pinned_bytes=7, heap_bytes=50):
    return plan_device(
        blocks,
        num_in_pass=len(blocks) if num_in_pass is None else num_in_pass,
        pinned_bytes=pinned_bytes,
        heap_bytes=heap_bytes,
        budget_bytes=budget_bytes,
    )


@given(blocks=SIZES, budget_bytes=st.integers(0, 20_000), unused=st.integers(0, 3))
def test_never_more_than_the_budget(blocks, budget_bytes, unused):
    num_in_pass = max(1, len(blocks) - unused)
    with pytest.raises(BudgetError) as refused:
        plan(blocks, 1, num_in_pass)
    least = refused.value.minimum_bytes
    with pytest.raises(BudgetError):
        plan(blocks, least - 1, num_in_pass)
    budget_bytes += least
    found = plan(blocks, budget_bytes, num_in_pass)
    assert found.peak_bytes <= budget_bytes
    assert found.staying_bytes == sum(blocks[block] for block in found.stays)
    streaming = [nbytes for block, nbytes in enumerate(blocks) if block not in found.stays]
    assert found.ring_bytes >= max(streaming, default=0)
    assert found.pass_bytes == sum(n for block, n in enumerate(blocks[:num_in_pass]) if block not in found.stays)


@given(blocks=SIZES, budget_bytes=st.integers(1, 20_000))
def test_nothing_streams_where_all_fits(blocks, budget_bytes):
    total = sum(blocks) + 57
    assert plan(blocks, max(total, budget_bytes)).pass_bytes == 0


def test_a_head_that_is_larger_than_the_rest_stays_where_that_makes_the_window_smaller():
    layers, head = [100] * 20, 800
    found = plan([*layers, head], 57 + 1200)
    assert 20 in found.stays
    assert found.ring_bytes == 200
    assert len(found.stays) == 3  # the head, and two layers in what is left


def test_what_stays_is_spread_over_the_pass():
    found = plan([100] * 10, 57 + 200 + 500)
    assert found.stays == {1, 3, 5, 7, 9}


def test_one_block_at_a_time_where_two_do_not_fit():
    assert plan([100] * 4, 57 + 150).ring_bytes == 100
