"""Objectives that no search can be given are refused when they are made."""

from __future__ import annotations

import math

import pytest

from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Objective, ObjectiveKind


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0])
@pytest.mark.parametrize(
    ("field", "name"),
    [("demand_rps", "demanded rate"), ("ttft_limit_s", "TTFT limit"), ("tpot_limit_s", "TPOT limit")],
)
def test_an_objective_has_finite_numbers_above_zero(field: str, name: str, value: float) -> None:
    given = {"demand_rps": 1.0, field: value}
    with pytest.raises(InvalidProblemError) as caught:
        Objective(kind=ObjectiveKind.COST, **given)
    assert str(caught.value) == f"the {name} is {value:g}, must be above 0 and finite"
