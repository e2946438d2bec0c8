"""What stays is spread evenly, and never more than was given."""

from hypothesis import given
from hypothesis import strategies as st

from hermes.plan import spread

BLOCKS = st.lists(st.lists(st.integers(0, 1000), max_size=5), max_size=12)


def kept_bytes(blocks, kept):
    return sum(blocks[block][load] for block, loads in enumerate(kept) for load in loads)


@given(blocks=BLOCKS, share=st.floats(0, 1.2))
def test_never_more_than_given_and_nothing_that_fits_left_out(blocks, share):
    total = sum(map(sum, blocks))
    budget = int(total * share)
    kept = spread(blocks, budget)
    assert len(kept) == len(blocks)
    assert all(loads <= set(range(len(block))) for loads, block in zip(kept, blocks, strict=True))
    left = budget - kept_bytes(blocks, kept)
    assert left >= 0
    streamed = [n for block, loads in zip(blocks, kept, strict=True) for i, n in enumerate(block) if i not in loads]
    assert all(nbytes > left for nbytes in streamed)
    if budget >= total:
        assert not streamed


@given(blocks=BLOCKS, share=st.floats(0, 1))
def test_every_stretch_of_the_pass_keeps_its_share(blocks, share):
    sizes = [(block, load, nbytes) for block, loads in enumerate(blocks) for load, nbytes in enumerate(loads)]
    total = sum(nbytes for *_, nbytes in sizes)
    largest = max((nbytes for *_, nbytes in sizes), default=0)
    budget = int(total * share)
    kept = spread(blocks, budget)
    owed, bounds = 0.0, [0.0]
    for block, load, nbytes in sizes:
        owed += nbytes * (budget / total if total else 0) - nbytes * (load in kept[block])
        bounds.append(owed)
    # Less than one load of error diffused, and less than one load of what was left over at the end.
    assert max(bounds) - min(bounds) <= 2 * largest + 1e-6


@given(num_blocks=st.integers(1, 40), loads=st.integers(1, 6), share=st.floats(0, 1))
def test_equal_blocks_keep_the_same_to_within_one_load(num_blocks, loads, share):
    blocks = [[100] * loads] * num_blocks
    counts = [len(kept) for kept in spread(blocks, int(100 * loads * num_blocks * share))]
    assert max(counts) - min(counts) <= 2
    assert sum(counts) == int(100 * loads * num_blocks * share) // 100


def test_half_of_every_layer_stays():
    assert spread([[10, 10]] * 4, 40) == [frozenset({1})] * 4
