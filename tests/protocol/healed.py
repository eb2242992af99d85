"""What holds in a world once nothing has gone wrong for long enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetis.planner.failures import ServiceError
from hetis.planner.fleet.agents.head_maps import HeadMaps
from hetis.v1 import redispatch_pb2
from hetis.v1.change_pb2 import ChangePhase
from tests.planner.fleet.samples import CLUSTER, REPLICA
from tests.protocol.ledger import BrokenError
from tests.protocol.planner_host import NODES, PRIMARY, WORKERS

if TYPE_CHECKING:
    from tests.protocol.world import World

State = redispatch_pb2.RedispatchState
OPEN = (ChangePhase.CHANGE_PHASE_PREPARING, ChangePhase.CHANGE_PHASE_READY)


def is_healed(world: World) -> bool:
    try:
        check_healed(world)
    except BrokenError:
        raise
    except (AssertionError, ServiceError, KeyError, IndexError):
        return False
    return True


def check_healed(world: World) -> None:
    """Check that nothing is stuck, all sides agree, and the next re-dispatch works."""
    assert world.planner is not None
    ends = world.redispatches()
    lost = set(world.acknowledged) - ends.keys()
    assert not lost, f"acknowledged and not in the store: {lost}"
    for change_id, state in ends.items():
        expected = State.REDISPATCH_STATE_DONE if change_id in world.ledger.flipped else State.REDISPATCH_STATE_ABORTED
        said = State.Name(state)
        assert state in (State.REDISPATCH_STATE_DONE, State.REDISPATCH_STATE_ABORTED), f"{change_id} is {said}"
        if change_id not in world.ledger.void:
            assert state == expected, f"{change_id} is {said}, the engines say {State.Name(expected)}"
    for node in NODES:
        host = world.engines[node]
        for status in host.engine.report(world.loop.time()).changes:
            assert status.phase not in OPEN, f"engine of {node}: {status}"
        for entry in world.agents[node].core.held():
            left = [(c.id, ChangePhase.Name(c.phase)) for c in entry.changes.values() if c.is_open]
            assert not left, f"agent of {node}: {left}"
    assert world.is_serving(), f"the replica is {world.state()}"
    check_views(world)
    holes = world.ledger.holes(world.engines)
    assert not holes, holes
    assert _is_quiet(world), "deltas go on and on"


def _is_quiet(world: World) -> bool:
    first = len(world.network.log)
    world.advance(3.0)
    return not any("delta" in seen.kind for seen in world.network.log[first:])


def check_views(world: World) -> None:
    """Check that the generations and head maps of planner, agents and engines are equal."""
    assert world.planner is not None
    cluster = world.planner.fleet._clusters[CLUSTER]
    generations = {
        f"{where} {node}": value
        for node in NODES
        for where, value in (
            ("planner of", cluster.links[node].slots[REPLICA].held),
            ("agent of", world.agents[node].core.held()[0].held_generation),
            ("engine of", world.engines[node].engine._held[REPLICA].changes.generation),
        )
    }
    authority = world.engines[PRIMARY].engine._held[REPLICA]
    assert generations[f"planner of {PRIMARY}"] == generations[f"agent of {PRIMARY}"], generations
    assert generations[f"engine of {PRIMARY}"] == generations[f"agent of {PRIMARY}"], generations
    for node in WORKERS:
        assert generations[f"planner of {node}"] == generations[f"agent of {node}"], generations
    assert authority.primary is not None
    for stage in authority.primary.stages.values():
        assert not stage.reserved, f"still reserved: {stage.reserved}"
    read: HeadMaps = world.loop.run(world.planner.fleet.read_head_maps(REPLICA, 10.0))
    now = authority.primary.head_maps()
    owners = [{r.id: list(r.owners) for r in one.requests} for one in (*read.maps, *now)]
    assert owners[: len(now)] == owners[len(now) :] or not world.is_still()
