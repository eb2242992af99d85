"""A primary's ranks seen as one device: counts and costs there, and heads here again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hetis.runtime.engine.group import PrimaryGroup
from hetis.runtime.engine.placement import even_costs
from hetis.solver.dispatch.problem import HeadShape
from hetis.solver.dispatch.state import DispatchState

HEADS = HeadShape(
    head_groups=8, queries_per_group=2, kv_bytes_per_token=64, exchange_bytes_per_head=96, block_tokens=16
)
NAMES = ("r0", "r1", "r2", "r3", "w0", "w1")
HOMES = (0, 0, 1, 1, 2, 2, 3, 3)
GROUP = PrimaryGroup(HOMES, len(NAMES))


def test_the_group_has_the_costs_of_its_slowest_rank_and_the_room_of_its_fullest() -> None:
    costs = even_costs(HEADS, NAMES, primaries=4)
    slow = replace(costs, head_s=costs.head_s * np.array([[1], [1], [3], [1], [1], [5]]))
    seen = GROUP.costs(slow)
    assert seen.devices == ("r0", "w0", "w1")
    assert seen.primary is not None
    assert (seen.primary.device, seen.primary.tp, seen.primary_groups) == (0, 4, 4)
    assert seen.head_s.ravel().tolist() == (1e-7 * np.array([3, 1, 5])).tolist()
    state = DispatchState(costs, [40, 30, 20, 10, 50, 5])
    state.admit_one("a", context_tokens=32, remaining_tokens=0, groups=np.array([2, 1, 1, 1, 3, 0]))
    load = GROUP.load(state.load())
    assert load.free_blocks.tolist() == [4 * 8, 44, 5]
    assert load.heads.tolist() == [4 * 2 * 2, 6, 0]
    state.drain_device(1)
    assert GROUP.load(state.load()).free_blocks.tolist() == [0, 44, 5]
    assert GROUP.snapshot(state.snapshot()).devices[0].status == "draining"


def test_requests_that_are_uneven_are_no_part_of_what_the_solver_sees_and_their_blocks_no_room() -> None:
    state = DispatchState(even_costs(HEADS, NAMES, primaries=4), [40] * 6)
    state.admit_one("even", context_tokens=16, remaining_tokens=0, groups=np.array([1, 1, 1, 1, 4, 0]))
    state.admit_one("uneven", context_tokens=32, remaining_tokens=0, groups=np.array([2, 2, 1, 1, 1, 1]))
    moves = [
        state.prepare_move("uneven", groups=1, source=source, target=target) for source, target in ((4, 5), (0, 3))
    ]
    assert None not in moves
    seen = GROUP.snapshot(state.snapshot())
    assert seen.ids == ("even",)
    assert seen.groups.tolist() == [[4, 4, 0]]
    assert [device.total_blocks for device in seen.devices] == [4 * (40 - 4), 40 - 2, 40 - 4]
    assert seen.moves == ()
    assert isinstance(DispatchState.of(seen), DispatchState)


@given(st.data())
def test_heads_on_ranks_are_at_home_and_whole_units_whatever_moves(data: st.DataObject) -> None:
    """Some go out, to any devices, and some come back."""
    owners, places = list(HOMES), range(GROUP.num_places)
    for _ in range(data.draw(st.integers(1, 6))):
        source, target = data.draw(st.permutations(places))[:2]
        held = sum(GROUP.place(owner) == source for owner in owners)
        num = held // 4 * 4 if 0 in (source, target) else data.draw(st.integers(0, held))
        heads = GROUP.leaving(owners, owners, source, target, data.draw(st.sampled_from([num, min(num, 4)])))
        splits = GROUP.split(owners, heads, target)
        assert sorted(head for split in splits for head in split.heads) == list(heads)
        for split in splits:
            assert {owners[head] for head in split.heads} == {split.source}
            for head in split.heads:
                owners[head] = split.target
        counts = np.bincount(owners, minlength=6)
        assert len(set(counts[:4])) == 1
        assert all(owner in (4, 5) or owner == home for owner, home in zip(owners, HOMES, strict=True))
    assert sum(GROUP.counts([4, 3, 1])) == 8


def test_one_rank_is_itself() -> None:
    group, costs = PrimaryGroup((0,) * 8, 3), even_costs(HEADS, ("a", "b", "c"))
    state = DispatchState(costs, [9, 9, 9])
    snapshot, load = state.snapshot(), state.load()
    assert group.costs(costs) is costs
    assert group.snapshot(snapshot) is snapshot
    assert group.load(load) is load
    assert group.counts([5, 2, 1]) == [5, 2, 1]
