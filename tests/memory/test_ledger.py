"""Law 1: reserved bytes never exceed the budget; what does not fit is refused and changes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes.errors import BudgetError
from hermes.memory.ledger import Ledger
from hermes.units import parse_bytes

MIB = 2**20


@given(
    budget=st.integers(0, 1000),
    steps=st.lists(st.tuples(st.sampled_from(["floor", "heap", "window", "resident"]), st.integers(0, 1000))),
)
def test_the_budget_is_never_overshot(budget, steps):
    ledger = Ledger(budget)
    expected = {}
    for account, nbytes in steps:
        others = sum(n for name, n in expected.items() if name != account)
        if others + nbytes <= budget:
            ledger.reserve(account, nbytes)
            expected[account] = nbytes
        else:
            with pytest.raises(BudgetError) as refusal:
                ledger.reserve(account, nbytes)
            assert refusal.value.minimum_bytes == others + nbytes
        assert dict(ledger.accounts) == expected
        assert ledger.reserved_bytes == sum(expected.values()) <= budget
        assert ledger.free_bytes == budget - ledger.reserved_bytes


def test_the_refusal_gives_the_number_the_limit_and_the_next_step():
    ledger = Ledger(700 * MIB)
    ledger.reserve("floor", 400 * MIB)
    ledger.reserve("window", 100 * MIB)
    with pytest.raises(BudgetError) as refusal:
        ledger.reserve("window", 412 * MIB)
    message = str(refusal.value)
    assert message == "window needs 412 MiB, the budget of 700 MiB leaves 300 MiB; try --budget 812MiB"
    retried = Ledger(parse_bytes(message.rsplit(" ", 1)[1]))
    retried.reserve("floor", 400 * MIB)
    retried.reserve("window", 412 * MIB)
    assert retried.free_bytes == 0


def test_an_account_is_set_not_added_to():
    ledger = Ledger(10)
    for nbytes in (10, 4, 10, 0):
        ledger.reserve("heap", nbytes)
        assert ledger.accounts["heap"] == nbytes


def test_accounts_cannot_be_changed_from_outside():
    with pytest.raises(TypeError):
        Ledger(10).accounts["heap"] = 3
