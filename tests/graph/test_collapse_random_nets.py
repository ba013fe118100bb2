"""Networks drawn at random survive the collapse, whatever they mix."""

import pytest
from graph.checks import collapse_unbroken, cost
from graph.random_nets import SIZES, random_net
from hypothesis import given
from hypothesis import strategies as st
from strategies import randn


@pytest.mark.slow
@given(st.integers(0, 2**20))
def test_a_random_network_survives(seed):
    model = random_net(seed)
    x, other = (randn(seed + at, *shape) for at, shape in enumerate(SIZES))
    result, report = collapse_unbroken(model, x, others=[(other,)])
    before, after = cost(model, x)[0], cost(result, x)[0]
    assert after <= before
    assert sum(row.macs_before - row.macs_after for row in report.regions) <= before - after
