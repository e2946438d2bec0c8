"""Plans of fleets with odd members."""

import pytest

MIB = 2**20


@pytest.mark.parametrize("sizes", [(), (0,)])
def test_a_model_without_weights_beside_one_that_streams(plan_of, sizes):
    plan = plan_of({"activation": sizes, "net": [32 * MIB] * 10})
    assert plan.quotas["activation"] == 0
    assert plan.plans["net"].pass_bytes > 0
