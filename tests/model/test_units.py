"""Blocks of units: every unit once and in order, and what each granularity promises."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hermes.model.units import GRANULARITIES, Partition, Unit, group_units
from hermes.pipeload import smallest_ring


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Partition, list[int]]:
    nbytes = draw(st.lists(st.integers(1, 100), min_size=1, max_size=20))
    units = tuple(
        Unit(
            module=f"layers.{number // 4}.{('attention', 'mlp')[number % 4 // 2]}.{number}",
            parameters=(f"{number}.weight",),
            rows=draw(st.sampled_from([None, None, None, (0, 4096)])),
        )
        for number in range(len(nbytes))
    )
    num_in_pass = draw(st.integers(0, len(units)))
    return Partition(units=units, num_in_pass=num_in_pass, pinned=(), rowwise=(), heads={}), nbytes


@given(partitions(), st.sampled_from(GRANULARITIES))
def test_every_unit_is_in_one_block_and_ranges_of_rows_stand_alone(made, granularity):
    parts, nbytes = made
    blocks = group_units(parts, granularity, nbytes)
    assert [unit for block in blocks for unit in block] == list(range(len(nbytes)))
    assert all(len(block) == 1 for block in blocks if any(parts.units[unit].rows for unit in block))


@given(partitions())
def test_joined_units_need_no_larger_window_than_the_largest_alone(made):
    parts, nbytes = made
    blocks = [[nbytes[unit] for unit in block] for block in group_units(parts, "joined", nbytes)]
    assert smallest_ring(blocks) == max(nbytes)


@given(partitions())
def test_units_that_could_be_joined_are(made):
    parts, nbytes = made
    blocks = group_units(parts, "joined", nbytes)
    assert parts.num_in_pass in [0, len(nbytes), *(block[0] for block in blocks)]
    for block, following in itertools.pairwise(blocks):
        both = [*block, following[0]]
        assert (
            any(parts.units[unit].rows for unit in both)
            or following[0] == parts.num_in_pass
            or smallest_ring([[nbytes[unit] for unit in both]]) > max(nbytes)
        )
