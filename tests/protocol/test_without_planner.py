"""The planner is off the data path (invariant 4), and a replaced one changes nothing (invariant 3)."""

from __future__ import annotations

import pytest

from hetis.v1.change_pb2 import ChangePhase
from tests.planner.fleet.samples import REPLICA
from tests.protocol.healed import OPEN
from tests.protocol.planner_host import NODES, PRIMARY, WORKERS
from tests.protocol.test_every_message import numbers, recorded
from tests.protocol.transport import Fate
from tests.protocol.world import PREPARE_S, STILL, State, World

SLACK_S = 3.0  # time for engines to reach each other after the deadline
FEW = (0, 3, 8, 12, 17, 19, 22)  # messages of a re-dispatch, one in each phase


def steps(world: World) -> int:
    (held,) = world.engines[PRIMARY].engine._held.values()
    assert held.primary is not None
    return held.primary.num_steps


def die_at(number: int, limit_s: float = PREPARE_S) -> str:
    """Return the violation if the planner dies at this message and has no successor; empty: none."""
    with World() as world:
        world.serve()
        first = len(world.network.log)

        def decide(seen: object) -> Fate:
            if seen.number == first + number:  # type: ignore[attr-defined]
                world.loop.call_soon(world.kill_planner)
            return Fate.PASS

        world.network.fate = decide
        world.between_workers(prepare_s=limit_s)
        before = steps(world)
        try:
            world.advance(limit_s + SLACK_S)
            assert world.planner is None, "it did not die"
            assert steps(world) - before > 40, "decoding stopped"
            for node, host in world.engines.items():
                for status in host.engine.report(world.loop.time()).changes:
                    assert status.phase not in OPEN, f"engine of {node}: {ChangePhase.Name(status.phase)}"
                for entry in world.agents[node].core.held():
                    assert not any(change.is_open for change in entry.changes.values()), f"agent of {node}"
            world.heal()
        except AssertionError as error:
            return f"planner gone at {recorded()[number]}: {error}"
    return ""


def test_without_a_planner_nodes_serve_on_and_prepared_moves_resolve_by_their_deadline() -> None:
    chosen = [number for i, number in enumerate(numbers(noise=False)) if i in FEW]
    wrong = [found for number in chosen if (found := die_at(number))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("seconds", [0.02, 0.3, 0.58])
def test_engines_alone_resolve_prepared_moves_by_their_deadline(seconds: float) -> None:
    with World() as world:
        world.serve()
        world.between_workers(prepare_s=3.0)
        world.advance(seconds)
        world.kill_planner()
        for node in NODES:
            world.kill_agent(node)
        world.advance(3.0 + SLACK_S)
        for node in NODES:
            phases = [status.phase for status in world.engines[node].engine.report(world.loop.time()).changes]
            assert not set(phases) & set(OPEN), f"engine of {node}: {phases}"
        world.heal()


def test_nodes_that_cannot_ask_how_a_change_ended_do_not_guess() -> None:
    """The authority has flipped, and before any other process knows, planner and engine connections are lost."""
    with World() as world:
        world.serve()
        change_id = world.between_workers(prepare_s=3.0)
        assert change_id is not None
        for node in WORKERS:
            world.engines[node].hears_peers = False
        while change_id not in world.ledger.flipped:
            world.advance(0.01)
        world.kill_planner()
        world.advance(30.0)
        for node in WORKERS:
            (status,) = world.engines[node].engine.report(world.loop.time()).changes
            assert status.phase == ChangePhase.CHANGE_PHASE_READY
        world.heal()
        assert world.redispatches()[change_id] == State.REDISPATCH_STATE_DONE


@pytest.mark.parametrize("seconds", [0.02, 0.3, 0.55, 0.62])
def test_a_planner_that_was_replaced_changes_nothing(seconds: float) -> None:
    """The old planner continues with its streams and its change while another leads, to which nodes move one by one."""
    with World() as world:
        world.serve()
        change_id = world.between_workers()
        world.advance(seconds)
        old = world.planner
        world.take_over()
        assert old is not None
        assert world.planner is not None
        before = {node: world.agents[node].core.newest_epoch for node in NODES}
        world.cut(WORKERS[0])
        world.advance(2.0)
        world.to_zombie.update(NODES)  # even if they reach only the old planner
        for node in NODES:
            world.cut(node)
        world.advance(20.0)
        assert world.agents[WORKERS[0]].core.newest_epoch == world.planner.epoch
        assert all(world.agents[node].core.newest_epoch >= before[node] for node in NODES)
        assert change_id in world.redispatches()
        world.heal()
        world.check_another_works()


def test_engines_hear_of_an_engine_that_moved_while_the_planner_was_away() -> None:
    with World() as world:
        world.serve()
        world.kill_planner()
        world.engines["moved"] = world.engines[PRIMARY]
        world.agents[PRIMARY].engine_address = "moved"
        world.restart_agent(PRIMARY)
        world.start_planner()
        world.advance(40.0)
        assignment = world.engines[WORKERS[0]].engine._held[REPLICA].assignment
        assert {peer.node: peer.address for peer in assignment.peers}[PRIMARY] == "moved"


def test_a_worker_that_restarts_faster_than_it_reports_is_noticed() -> None:
    with World() as world:
        world.serve()
        for host in world.engines.values():
            host.control = STILL.model_copy(update={"load_s": 0.0})
        world.advance(0.5)
        for node in WORKERS:
            world.restart_engine(node)
        world.advance(30.0)
        assert not world.ledger.holes(world.engines, of_wounded=True)
