"""Which rows of an embedding are read, and which come in one read."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional

import hermes
from hermes.memory.probe import resident_bytes
from hermes.model.rows import RowTable, runs_of

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


class Table:
    """An embedding on disk, streamed; and how many rows each lookup has read."""

    def __init__(self, path: Path, *, num_rows: int, kept_rows: int, patch: pytest.MonkeyPatch) -> None:
        self.weight = torch.randn(num_rows, 24)
        save_file({"weight": self.weight}, path)
        self.read: list[int] = []
        inner = RowTable._read
        patch.setattr("hermes.model.rows.KEPT_BYTES", kept_rows * 24 * 4)
        patch.setattr(RowTable, "_read", lambda own, rows, to: self.read.append(len(rows)) or inner(own, rows, to))
        with torch.device("meta"):
            module = torch.nn.Embedding(num_rows, 24)
        budget = resident_bytes() + 400 * 2**20
        self.module = hermes.stream(module, path, budget, example_args=(torch.zeros(1, dtype=torch.long),))

    def check(self, *rows: int) -> None:
        ids = torch.tensor([rows])
        assert torch.equal(self.module(ids), functional.embedding(ids, self.weight))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    made = Table(tmp_path / "table.safetensors", num_rows=1000, kept_rows=5, patch=monkeypatch)
    with made.module:
        yield made


def test_rows_that_were_looked_up_are_not_read_again(table: Table) -> None:
    table.check(3, 99, 3)
    table.check(99, 3)
    table.check(3, 7, 99, 8)
    assert table.read == [2, 2]


def test_rows_of_long_ago_make_room_for_new_ones(table: Table) -> None:
    table.check(1, 2, 3)
    table.check(3, 4, 5, 6)  # six are too many
    table.check(5, 3)
    table.check(1)
    table.check(4, 1)
    table.check(2)  # and so are these
    table.check(4)
    assert table.read == [3, 4, 1, 1, 1]


def test_more_rows_than_are_kept(table: Table) -> None:
    table.check(1, 2)
    table.check(*range(20, 40))
    table.check(1, 2)
    assert table.read == [2, 20, 2]


def test_a_table_that_may_be_kept_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(tmp_path / "table.safetensors", num_rows=50, kept_rows=50, patch=monkeypatch)
    with table.module:
        for rows in ((7,), (8, 3), (49, 0, 49)):
            table.check(*rows)
    assert table.read == [50]


def test_rows_that_are_none(table: Table) -> None:
    assert table.module(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 24)
    for rows in ((0, 1000), (-1, 5)):
        with pytest.raises(IndexError, match=r"weight: .* outside its 1000 rows"):
            table.module(torch.tensor(rows))
    assert not table.read


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=12), max_size=12), st.integers(0, 31))
def test_any_lookups(lookups: list[list[int]], kept_rows: int) -> None:
    with tempfile.TemporaryDirectory() as room, pytest.MonkeyPatch.context() as patch:
        table = Table(Path(room) / "table.safetensors", num_rows=1000, kept_rows=kept_rows, patch=patch)
        with table.module:
            for rows in lookups:
                table.check(*rows)
