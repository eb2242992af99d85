"""A planner, three agents and their messages, all under a test's control."""

from __future__ import annotations

from collections.abc import Iterable

from hetis.planner.failures import ServiceError
from hetis.planner.fleet.agents.link import Response
from hetis.v1 import plan_pb2, redispatch_pb2, replica_pb2
from tests.planner.fleet.driven import DrivenPlanner
from tests.planner.fleet.memory_store import MemoryStore
from tests.planner.fleet.model_agents import BrokenInvariantError, Engines, ModelAgent
from tests.planner.fleet.samples import MOVED, PLAN, REPLICA, SETTINGS, change, store_with_plan

RedispatchState = redispatch_pb2.RedispatchState
PERMITTED = {
    RedispatchState.REDISPATCH_STATE_COMMITTING,
    RedispatchState.REDISPATCH_STATE_RELEASING,
    RedispatchState.REDISPATCH_STATE_DONE,
}


class World:
    """``to_agent``: messages in flight to each node; those that agents sent are in ``agents[...].sent``."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.store: MemoryStore = store_with_plan()
        self.engines = Engines()
        self.engines.start(["b/0", "c/0"], [("r0", 0), MOVED, ("r1", 0)])
        self.engines.owner[MOVED] = "b/0"
        self.engines.blocks = {"b/0": {("r0", 0), MOVED, ("r1", 0)}, "c/0": set()}
        self.engines.owner = dict.fromkeys(self.engines.owner, "b/0")
        self.agents = {node: ModelAgent(node, self.engines) for node in ("a", "b", "c")}
        self.to_agent: dict[str, list[Response]] = {node: [] for node in self.agents}
        self.sessions: dict[str, str] = {}
        self.planner = self._new_planner()

    # Steps.

    def connect(self, node: str) -> None:
        """Open a new stream, which ends an older one."""
        self.to_agent[node].clear()
        hello = self.agents[node].hello()
        self.sessions[node] = self.planner.cluster.open(node, hello, now_s=self.now_s, time_s=self.now_s)
        self.settle()

    def disconnect(self, node: str) -> None:
        """Drop the stream with all messages in flight in both directions."""
        session = self.sessions.pop(node, None)
        self.agents[node].sent.clear()
        self.to_agent[node].clear()
        if session is not None:
            self.planner.cluster.close(node, session)
            self.settle()

    def restart_planner(self) -> None:
        """Replace the dead planner by another one, which leads with the contents of the store."""
        self.store.epoch += 1
        for node in self.agents:
            self.sessions.pop(node, None)
            self.agents[node].sent.clear()
            self.to_agent[node].clear()
        self.planner = self._new_planner()
        self.settle()

    def hear(self, node: str) -> None:
        """Deliver an agent's next message to the planner."""
        sent = self.agents[node].sent
        if node not in self.sessions or not sent:
            return
        request = sent.pop(0)
        try:
            self.planner.cluster.handle(node, self.sessions[node], request, now_s=self.now_s, time_s=self.now_s)
        except ServiceError:
            self.disconnect(node)
        self.settle()

    def tell(self, node: str) -> None:
        """Deliver the planner's next message to the agent."""
        queue = self.to_agent[node]
        if not queue:
            return
        try:
            self.agents[node].take(queue.pop(0))
        except ServiceError:
            self.disconnect(node)
        self.check()

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.planner.cluster.pass_time(self.now_s)
        self.settle()

    def propose(self) -> str:
        """Move the head group away from its owner; return the change's id, or an empty text if it could not begin."""
        held = self.agents["a"].held.get(REPLICA)
        source = self.engines.owner[MOVED]
        target = "c/0" if source == "b/0" else "b/0"
        body = change(held[0] if held else 0, source=source, target=target)
        try:
            self.planner.cluster.changes.propose(body, now_s=self.now_s)
        except ServiceError:
            return ""
        self.settle()
        return body.change.change_id

    def settle(self) -> None:
        """Send what is due before anything else, as the fleet does; nothing that waits for the store may be sent."""
        self.planner.send(self.now_s)
        self.planner.settle(self.now_s)
        self.check()

    # Longer courses.

    def flow(self, rounds: int = 30) -> None:
        """Deliver everything in order and let engines work, until nothing is in progress."""
        for _ in range(rounds):
            busy = False
            for node, agent in self.agents.items():
                while self.to_agent[node] or (node in self.sessions and agent.sent):
                    busy = True
                    self.tell(node)
                    self.hear(node)
            if not busy:
                return
        raise AssertionError("messages never end")

    def live(self, seconds: int, nodes: Iterable[str] = ("a", "b", "c")) -> None:
        """Let time pass with heartbeats of these nodes."""
        for _ in range(seconds):
            for node in nodes:
                self.agents[node].heartbeat()
            self.flow()
            self.pass_time(1.0)

    def heal(self) -> None:
        """Let time pass in which nothing goes wrong any more."""
        for node in self.agents:
            if node not in self.sessions:
                self.connect(node)
        for _ in range(12):
            self.flow()
            for agent in self.agents.values():
                agent.load()
                agent.hear_from_primary()
            self.flow()
            for agent in self.agents.values():
                agent.get_ready()
            self.flow()
            self.live(12)  # past every timeout

    def serve(self) -> None:
        """Go from an activated plan to a serving replica."""
        for node in self.agents:
            self.connect(node)
        for _ in range(3):
            self.flow()
            for agent in self.agents.values():
                agent.load()
        self.flow()

    # Invariants.

    def check(self) -> None:
        self.engines.check()
        kept = self.store.tables.redispatches.rows.values()
        states = {record.body.change.change_id: record.state for record in kept}
        for change_id in self.engines.flipped:
            if states.get(change_id) not in PERMITTED:
                raise BrokenInvariantError(f"{change_id} was flipped, and the store knows of no permission")

    def check_healed(self) -> None:
        """Check that every change has ended on both sides, as the authority decided."""
        for record in self.store.tables.redispatches.rows.values():
            was_flipped = record.body.change.change_id in self.engines.flipped
            ended = RedispatchState.REDISPATCH_STATE_DONE if was_flipped else RedispatchState.REDISPATCH_STATE_ABORTED
            assert record.state == ended, RedispatchState.Name(record.state)
        replica = self.store.tables.replicas.rows[REPLICA]
        plan = self.store.tables.plans.rows[PLAN]
        if replica.state == replica_pb2.REPLICA_STATE_FAILED:  # a node was lost before it ever served
            assert plan.activation == plan_pb2.ACTIVATION_STATE_FAILED
        else:
            assert replica.state == replica_pb2.REPLICA_STATE_SERVING
            assert all(agent.held[REPLICA][0] >= replica.body.assigned_generation for agent in self.agents.values())
            assert all(not agent.held[REPLICA][2].conditions for agent in self.agents.values())
        for node, agent in self.agents.items():
            assert not agent.changes, node
        # Engines reserve nothing of ended changes, and have freed what has moved.
        for group, device in self.engines.owner.items():
            holders = [name for name, groups in self.engines.blocks.items() if group in groups]
            assert holders == [device]

    def state(self, change_id: str) -> str:
        """Return the change's state in the store, without its prefix."""
        for record in self.store.tables.redispatches.rows.values():
            if record.body.change.change_id == change_id:
                return RedispatchState.Name(record.state).removeprefix("REDISPATCH_STATE_")
        return ""

    def _new_planner(self) -> DrivenPlanner:
        return DrivenPlanner(
            self.store,
            self.store.epoch,
            lambda node, message: self.to_agent[node].append(message),
            now_s=self.now_s,
            settings=SETTINGS,
        )
