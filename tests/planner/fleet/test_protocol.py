"""The invariants of docs/api.md hold whatever is lost, repeated, reordered or late, and whichever process dies when."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.planner.fleet.world import World

NODES = st.sampled_from(["a", "b", "c"])
SOME = st.integers(min_value=0, max_value=5)


class Protocol(RuleBasedStateMachine):
    """Single steps are checked in `World` and its agents; the final outcome is checked in `teardown`."""

    world: World

    @initialize(serves=st.booleans())
    def begin(self, serves: bool) -> None:
        self.world = World()
        if serves:
            self.world.serve()

    @rule(node=NODES)
    def connect(self, node: str) -> None:
        self.world.connect(node)

    @rule(node=NODES)
    def disconnect(self, node: str) -> None:
        self.world.disconnect(node)

    @rule(node=NODES, position=SOME, again=st.booleans())
    def planner_hears(self, node: str, position: int, again: bool) -> None:
        self.world.hear(node, position, again=again)

    @rule(node=NODES, again=st.booleans())
    def agent_is_delivered(self, node: str, again: bool) -> None:
        self.world.tell(node, again=again)

    @rule()
    def everything_is_delivered(self) -> None:
        self.world.flow()

    @rule()
    def propose(self) -> None:
        self.world.propose()

    @rule(node=NODES)
    def engine_loads(self, node: str) -> None:
        self.world.agents[node].load()

    @rule(node=NODES)
    def engine_gets_ready(self, node: str) -> None:
        self.world.agents[node].get_ready()

    @rule()
    def all_engines_get_ready(self) -> None:
        for agent in self.world.agents.values():
            agent.get_ready()

    @rule()
    def engine_fails_to_copy(self) -> None:
        for agent in self.world.agents.values():
            agent.fail_copy()

    @rule(node=NODES)
    def engine_hears_from_the_primary(self, node: str) -> None:
        self.world.agents[node].hear_from_primary()

    @rule()
    def the_prepare_deadline_passes(self) -> None:
        self.world.agents["a"].miss_deadline()

    @rule(seconds=st.sampled_from([0.5, 3.0, 11.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(crash=st.sampled_from(["before", "after"]))
    def the_planner_dies_at_its_next_write(self, crash: str) -> None:
        self.world.planner.crash = crash

    @rule()
    def the_planner_dies(self) -> None:
        self.world.restart_planner()

    @invariant()
    def every_head_group_has_one_owner_that_holds_it(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.planner.crash = ""
        self.world.heal()
        self.world.check_healed()


class Pressed(Protocol):
    """The same machine with a change always in progress, so that faults meet its phases."""

    @initialize(serves=st.just(True))
    def begin(self, serves: bool) -> None:
        super().begin(serves)
        self.world.propose()

    @rule(node=NODES)
    def step(self, node: str) -> None:
        """Advance a change as if nothing went wrong."""
        self.world.tell(node)
        self.world.agents[node].get_ready()
        self.world.hear(node)


_EXAMPLES = int(os.environ.get("HETIS_EXAMPLES", "60"))
_SETTINGS = settings(
    max_examples=_EXAMPLES, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestProtocol = Protocol.TestCase
TestProtocol.settings = _SETTINGS
TestPressed = Pressed.TestCase
TestPressed.settings = _SETTINGS
