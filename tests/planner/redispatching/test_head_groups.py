"""Names of head groups, which the solver only counts."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.convert.stages import card_of, leaving, stage_from_proto
from hetis.solver.dispatch.dispatch_problem import Stage
from tests.planner.redispatching.messages import owners_of
from tests.planner.redispatching.stages import stage_model


def stage(tp: int, num_devices: int = 3) -> Stage:
    return stage_from_proto(stage_model(num_devices, head_groups=8, tp=tp)).stage


def on_cards(one: Stage, owners: list[int]) -> list[int]:
    """Head groups of each card of the primary."""
    cards = card_of(one)
    return [sum(cards[g] == c and owner == 0 for g, owner in enumerate(owners)) for c in range(one.primary_groups)]


@given(data=st.data(), tp=st.sampled_from([1, 2, 4, 8]))
def test_head_groups_to_and_from_the_primary_keep_its_cards_even(data: st.DataObject, tp: int) -> None:
    one = stage(tp, 2)
    num = 8 // one.primary_groups
    kept = data.draw(st.integers(0, num))
    owners = owners_of(one, np.array([kept * tp, 8 - kept * tp]))
    source = data.draw(st.sampled_from([0, 1]))
    most = kept if source == 0 else num - kept
    moving = tp * data.draw(st.integers(0, most))
    found = leaving(one, owners, owners, source, 1 - source, moving)
    assert len(found) == moving
    assert all(owners[g] == source for g in found)
    after = [1 - source if g in found else owner for g, owner in enumerate(owners)]
    assert len(set(on_cards(one, after))) == 1


def test_head_groups_that_are_taken_do_not_leave_twice() -> None:
    assert leaving(stage(1), [1] * 8, [2, 2, 2, 1, 1, 1, 1, 1], 1, 2, 8) == [3, 4, 5, 6, 7]
