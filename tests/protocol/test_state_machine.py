"""The five invariants of DESIGN section 7 hold whatever is lost, repeated, reordered or late, and whatever dies when.

1, 2 and 3 are checked by `Ledger` after every delivery, call and engine step; 4 and 5 by the outcome in the end, when
faults stop. ``HETIS_EXAMPLES`` and ``HETIS_STEPS`` make runs longer; see docs/reliability.md.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.protocol.planner_host import NODES, WORKERS
from tests.protocol.transport import Fate, Seen, Way
from tests.protocol.world import ARRIVING, BUSY, STILL, World

nodes = st.sampled_from(NODES)
ways = st.sampled_from(Way)
positions = st.integers(0, 7)
BAD = (Fate.DROP, Fate.DUPLICATE, Fate.DELAY, Fate.HOLD)


class Protocol(RuleBasedStateMachine):
    """Real planner, agents and engines; rules are the events around them."""

    world: World

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        self.world = World(seed)
        self.world.serve()

    # The regular course.

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.6, 3.0, 11.0, 26.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(num_moves=st.sampled_from([1, 3]), prepare_s=st.sampled_from([1.0, 10.0]), copy_s=st.sampled_from([0.0, 2.0]))
    def a_re_dispatch_begins(self, num_moves: int, prepare_s: float, copy_s: float) -> None:
        if self.world.planner is not None:
            self.world.propose(num_moves=num_moves, prepare_s=prepare_s, copy_s=copy_s)

    @rule(load=st.sampled_from([STILL, BUSY, ARRIVING]))
    def requests_come_grow_and_end(self, load: object) -> None:
        for engine in self.world.engines.values():
            engine.control = load  # type: ignore[assignment]

    @rule(node=st.sampled_from(WORKERS), is_draining=st.booleans())
    def a_node_is_drained(self, node: str, is_draining: bool) -> None:
        self.world.drain(node, is_draining)

    # The network.

    @rule()
    def the_network_works(self) -> None:
        self.world.network.fate = lambda _: Fate.PASS
        self.world.loop.run(self._release())

    @rule()
    def the_network_holds_everything(self) -> None:
        self.world.network.fate = lambda _: Fate.HOLD

    @rule(odds=st.sampled_from([0.1, 0.4]), fates=st.sets(st.sampled_from(BAD), min_size=1))
    def the_network_is_bad(self, odds: float, fates: set[Fate]) -> None:
        dice, chosen = self.world.random, sorted(fates, key=str)

        def decide(_: Seen) -> Fate:
            return dice.choice(chosen) if dice.random() < odds else Fate.PASS

        self.world.network.fate = decide

    @rule(node=nodes, way=ways, position=positions, again=st.booleans(), lost=st.booleans())
    def a_held_message_goes_on(self, node: str, way: Way, position: int, again: bool, lost: bool) -> None:
        self.world.deliver(node, way, position, again=again, lost=lost)

    @rule(node=nodes, position=st.integers(0, 200))
    def an_old_message_comes_again(self, node: str, position: int) -> None:
        self.world.repeat_old(node, position)

    @rule(node=nodes, who=st.sampled_from(["both", "agent", "planner"]))
    def a_stream_breaks(self, node: str, who: str) -> None:
        self.world.cut(node, agent_notices=who != "planner", planner_notices=who != "agent")

    @rule(node=nodes, is_away=st.booleans())
    def a_node_reaches_nobody(self, node: str, is_away: bool) -> None:
        (self.world.network.unreachable.add if is_away else self.world.network.unreachable.discard)(node)
        if is_away:
            self.world.cut(node)

    @rule(node=nodes, works=st.booleans())
    def engines_lose_each_other(self, node: str, works: bool) -> None:
        self.world.engines[node].hears_peers = works

    # Deaths.

    @rule()
    def the_planner_dies(self) -> None:
        self.world.kill_planner()
        self.world.settle()

    @precondition(lambda self: self.world.planner is None)
    @rule()
    def a_planner_comes(self) -> None:
        self.world.start_planner()

    @rule(after=st.booleans(), writes=st.integers(0, 3))
    def the_planner_will_die_at_a_write(self, after: bool, writes: int) -> None:
        if self.world.planner is not None:
            store = self.world.planner.store
            store.dies_at, store.dies_after = store.num_writes + writes, after

    @rule()
    def another_planner_takes_over(self) -> None:
        self.world.take_over()

    @rule(node=nodes, is_lost=st.booleans())
    def a_node_reaches_the_old_planner(self, node: str, is_lost: bool) -> None:
        if self.world.zombie is not None:
            (self.world.to_zombie.add if is_lost else self.world.to_zombie.discard)(node)
            self.world.cut(node)

    @rule(arrives=st.booleans())
    def words_of_the_dead_arrive(self, arrives: bool) -> None:
        """Let messages sent before a death arrive after it, or not."""
        self.world.planners_words_arrive = arrives
        for agent in self.world.agents.values():
            agent.its_words_arrive = arrives

    @rule(node=nodes)
    def an_agent_dies(self, node: str) -> None:
        self.world.kill_agent(node)

    @rule(node=nodes)
    def an_agent_comes_back(self, node: str) -> None:
        if self.world.agents[node].is_dead:
            self.world.restart_agent(node)

    @rule(node=nodes, after=st.booleans(), writes=st.integers(0, 4))
    def an_agent_will_die_at_a_write(self, node: str, after: bool, writes: int) -> None:
        state = self.world.agents[node].state
        state.dies_at, state.dies_after = state.num_writes + writes, after

    @rule(node=nodes)
    def an_engine_restarts(self, node: str) -> None:
        self.world.restart_engine(node)

    @rule(node=nodes, answers=st.integers(1, 3))
    def answers_of_an_engine_are_lost(self, node: str, answers: int) -> None:
        self.world.engines[node].answers_lost = answers

    async def _release(self) -> None:
        self.world.network.release()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.world.heal()
            self.world.check_another_works()
        finally:
            self.world.close()


class Pressed(Protocol):
    """The same machine with a change always in progress, so that faults meet its phases."""

    @initialize(seed=st.integers(0, 1000), seconds=st.sampled_from([0.0, 0.01, 0.3, 0.55, 0.6, 0.7]))
    def begin(self, seed: int, seconds: float = 0.0) -> None:
        super().begin(seed)
        self.world.between_workers()
        self.world.advance(seconds)


def run(machine: type[RuleBasedStateMachine], *, examples: int, at_random: bool = False) -> None:
    chosen = settings(
        derandomize=not at_random,
        phases=(Phase.generate, Phase.shrink) if at_random else (Phase.generate,),
        max_examples=int(os.environ.get("HETIS_EXAMPLES", str(examples))),
        stateful_step_count=int(os.environ.get("HETIS_STEPS", "20")),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(machine, settings=chosen)


@pytest.mark.parametrize("machine", [Protocol, Pressed])
def test_the_invariants_hold(machine: type[RuleBasedStateMachine]) -> None:
    run(machine, examples=10)


@pytest.mark.soak
@pytest.mark.parametrize("machine", [Protocol, Pressed])
def test_the_invariants_hold_for_long(machine: type[RuleBasedStateMachine]) -> None:
    run(machine, examples=2000, at_random=True)
