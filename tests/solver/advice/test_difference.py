"""Two proofs bound a difference: the interval holds every true difference, and nothing is invented."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.advice.difference import Change, Proven, Verdict, difference

numbers = st.floats(0.1, 100.0)
gaps = st.floats(0.0, 0.2)


@given(numbers, numbers, gaps, gaps, gaps, gaps, st.booleans(), st.sampled_from(Change))
def test_the_true_difference_lies_in_the_interval(
    one: float, two: float, a: float, b: float, c: float, d: float, maximises: bool, change: Change
) -> None:
    best0, best1 = one, two
    if change is not Change.OTHER:  # growing never makes the best plan worse, whichever way that is counted
        best0, best1 = sorted((one, two), reverse=(change is Change.GROWN) is not maximises)
    sides = []
    for best, short, long in ((best0, a, b), (best1, c, d)):
        low, high = best * (1 - short), best * (1 + long)
        sides.append(Proven(value=low if maximises else high, bound=high if maximises else low))
    found = difference(*sides, maximises=maximises, change=change)
    true, slack = best1 - best0, 1e-9 * (best0 + best1)
    assert found.low - slack <= true <= found.high + slack
    if found.verdict is Verdict.BETTER:
        assert true > 0 if maximises else true < 0
    if found.verdict is Verdict.WORSE:
        assert true < 0 if maximises else true > 0


def test_a_difference_smaller_than_the_gaps_is_undecided() -> None:
    before, after = Proven(value=10.0, bound=10.3), Proven(value=10.1, bound=10.4)
    assert difference(before, after, maximises=True, change=Change.OTHER).verdict is Verdict.UNDECIDED
    grown = difference(before, after, maximises=True, change=Change.GROWN)
    assert grown.verdict is Verdict.UNDECIDED
    assert grown.low == 0.0  # more GPUs take nothing away


def test_a_side_without_a_bound_leaves_its_end_open() -> None:
    found = difference(
        Proven(value=1.0, bound=1.0), Proven(value=0.0, bound=float("inf")), maximises=True, change=Change.OTHER
    )
    assert (found.low, found.high, found.verdict) == (-1.0, float("inf"), Verdict.UNDECIDED)


def test_two_fleets_without_a_plan_are_the_same() -> None:
    nothing = Proven(value=float("inf"), bound=float("inf"))
    assert difference(nothing, nothing, maximises=False, change=Change.OTHER).found == 0.0
