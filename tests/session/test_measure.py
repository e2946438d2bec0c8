"""What a unit takes, from several passes."""

import pytest

from hermes.session.measure import typical_seconds


def test_one_interruption_is_nobodys_and_one_in_every_pass_is_everybodys():
    once = [[1.0, 3.0], [1.0, 3.0], [1.0, 9.0], [1.0, 3.0]]
    assert typical_seconds(once) == pytest.approx([1.0, 3.0])
    each = [[2.0, 3.0, 1.0], [1.0, 4.0, 1.0], [1.0, 3.0, 2.0], [1.0, 4.0, 1.0]]
    assert sum(typical_seconds(each)) == pytest.approx(6.0)
