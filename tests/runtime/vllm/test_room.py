"""Requests grow where the pool, the workers, or both are short: one of them waits, and the engine goes on."""

from __future__ import annotations

import pytest

from tests.runtime.vllm.scheduling import BLOCK, GROUPS, World


@pytest.mark.parametrize(("pool", "worker"), [(12, 8), (12, 16), (16, 12), (20, 14), (20, 20)])
def test_moves_that_relieve_the_pool_leave_room_for_the_request_that_grows(pool: int, worker: int) -> None:
    world = World(pool=pool, blocks=(worker,))
    for i, tokens in enumerate((20, 30, 14, 40)):
        world.arrive(f"r{i}", tokens)
    world.step(80)  # groups of all that run are then here and there; `World.step` checks that each block has an owner
    assert world.side.allocator.stats.relieved_blocks > 0
    assert world.running
    assert min(world.side.allocator.state.free_blocks()) >= 0


def test_a_request_grows_while_its_groups_move_to_a_worker_that_they_fill() -> None:
    world = World(blocks=(GROUPS,), copy_steps=50)
    world.add("one", BLOCK)
    assert world.side.begin_move("one", range(GROUPS), 1) is not None
    assert not world.side.allocator.has_room("one", BLOCK + 1)  # each group would need a second block there
    world.step()  # so it is preempted, its move ends, and it begins again here
    assert not world.side.allocator.moves
    assert world.running["one"].num_tokens == BLOCK
    assert not any(world.devices("one"))
