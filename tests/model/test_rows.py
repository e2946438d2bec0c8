"""Which rows of an embedding come in one read."""

from hypothesis import given
from hypothesis import strategies as st

from hermes.model.binding import runs_of

row_sets = st.sets(st.integers(0, 500), min_size=1, max_size=80).map(sorted)


@given(row_sets, st.integers(0, 20), st.integers(1, 40))
def test_every_row_is_in_one_run_and_no_two_runs_could_be_one(rows, apart, most):
    runs = runs_of(rows, apart=apart, most=most)
    assert [index for run in runs for index in run] == list(range(len(rows)))
    for run in runs:
        assert rows[run[-1]] - rows[run[0]] < most
        assert all(rows[index + 1] - rows[index] - 1 <= apart for index in run[:-1])
    for before, after in zip(runs, list(runs)[1:], strict=False):
        next_row = rows[after[0]]
        assert next_row - rows[before[-1]] - 1 > apart or next_row - rows[before[0]] >= most


def test_neighbours_come_together():
    assert list(runs_of([3, 4, 6, 40], apart=0, most=9)) == [range(2), range(2, 3), range(3, 4)]
    assert list(runs_of([3, 4, 6, 40], apart=1, most=9)) == [range(3), range(3, 4)]
    assert list(runs_of([3, 4, 6, 40], apart=99, most=2)) == [range(2), range(2, 3), range(3, 4)]
