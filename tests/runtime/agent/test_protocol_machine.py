"""The five invariants under anything that a network, a planner and kills can do, in virtual time."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from hetis.v1.change_pb2 import ChangePhase
from tests.runtime.agent.builders import REPLICA
from tests.runtime.agent.world import CALM, NODES, World

nodes = st.sampled_from(NODES)


class ProtocolMachine(RuleBasedStateMachine):
    """Rules are the possible events; `World.check` runs after each."""

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        self.start(World(seed))

    def start(self, world: World) -> None:
        self.world = world
        self.world.assign()
        for node in NODES:
            self.world.deliver(node)
            self.world.call(node)
        self.world.pass_time(4.0)

    @rule(timeout_s=st.sampled_from([0.5, 5.0, 60.0]))
    def prepare(self, timeout_s: float) -> None:
        self.world.prepare(timeout_s)

    @rule()
    def run_smoothly(self) -> None:
        """Run without faults for a while, so that changes often get far enough."""
        for _ in range(3):
            for node in NODES:
                self.world.deliver(node)
                self.world.call(node)
            self.world.pass_time(0.1)
        self.world.decide()

    @rule()
    def decide(self) -> None:
        self.world.decide()

    @rule()
    def abort(self) -> None:
        self.world.abort()

    @rule()
    def assign(self) -> None:
        self.world.assign()

    @rule()
    def new_planner(self) -> None:
        self.world.new_planner()

    @rule(node=nodes, dies_after=st.sampled_from([None, None, None, 0, 1, 2, 3]))
    def deliver(self, node: str, dies_after: int | None) -> None:
        self.world.deliver(node, dies_after=dies_after)

    @rule(node=nodes, old_epoch=st.booleans())
    def repeat(self, node: str, old_epoch: bool) -> None:
        self.world.repeat(node, old_epoch=old_epoch)

    @rule(node=nodes)
    def lose_the_stream(self, node: str) -> None:
        self.world.benches[node].core.stream_ended()
        self.world.connect(node)

    @rule(node=nodes, answer_lost=st.sampled_from([False, False, True]), reached=st.booleans())
    def call(self, node: str, answer_lost: bool, reached: bool) -> None:
        self.world.call(node, answer_lost=answer_lost, authority_reached=reached)

    @rule(node=nodes, peers=st.booleans())
    def report(self, node: str, peers: bool) -> None:
        self.world.report(node, peers=peers)

    @rule(node=nodes)
    def restart_agent(self, node: str) -> None:
        self.world.restart_agent(node)

    @rule(node=nodes)
    def restart_engine(self, node: str) -> None:
        self.world.restart_engine(node)

    @rule(seconds=st.sampled_from([0.05, 0.5, 3.0, 12.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    def teardown(self) -> None:
        world = self.world
        world.settle()
        for node, engine in world.engines.items():
            for status in engine.report(world.now_s).changes:
                open_phases = (ChangePhase.CHANGE_PHASE_PREPARING, ChangePhase.CHANGE_PHASE_READY)
                assert status.phase not in open_phases, f"{node}: {status} stays open"
        for held in world.engines["p"]._held.values():
            assert held.primary is not None
            assert not any(stage.reserved for stage in held.primary.stages.values())


TestProtocol = ProtocolMachine.TestCase
TestProtocol.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)


def test_a_change_goes_through_when_nothing_goes_wrong() -> None:
    machine = ProtocolMachine()
    machine.start(World(3, blocks=4000, control=CALM))  # enough room for every move
    assert machine.world.prepare(60.0)
    assert machine.world.change is not None
    for _ in range(40):
        machine.run_smoothly()
    (held,) = machine.world.engines["p"]._held.values()
    assert machine.world.flipped == {machine.world.change.change_id}
    assert held.changes.generation == machine.world.change.generation
    for node, bench in machine.world.benches.items():
        (entry,) = bench.core.held()
        if node in machine.world.parts:
            assert entry.changes[machine.world.change.change_id].phase == ChangePhase.CHANGE_PHASE_RELEASED
    assert REPLICA in machine.world.benches["p"].disk


def test_nodes_whose_time_has_passed_do_not_guess() -> None:
    """The authority got its prepare later than the others, and may still flip after their deadlines."""
    machine = ProtocolMachine()
    machine.start(World(3, blocks=4000, control=CALM))  # enough room for every move
    world = machine.world
    assert world.prepare(5.0)
    assert world.change is not None
    others = [node for node in world.parts if node != "p"]
    assert others
    for node in others:
        world.deliver(node)
    for _ in range(5):
        world.pass_time(0.8)
        for node in others:
            world.call(node)
    world.deliver("p")
    for _ in range(22):
        world.call("p")
        world.pass_time(0.1)
    world.decide()  # all are ready: commit
    world.pass_time(0.5)
    for node in others:
        world.call(node)  # AbortMoves: the authority has not decided
        (entry,) = world.benches[node].core.held()
        assert entry.changes[world.change.change_id].phase == ChangePhase.CHANGE_PHASE_READY
    world.deliver("p")
    world.call("p")
    world.pass_time(0.3)
    world.call("p")
    assert world.flipped == {world.change.change_id}
    world.settle()
    for node in world.parts:
        (entry,) = world.benches[node].core.held()
        assert entry.changes[world.change.change_id].phase == ChangePhase.CHANGE_PHASE_RELEASED
