"""A planner, three agents and three engines, all real, in virtual time, with every kind of fault under control."""

from __future__ import annotations

import atexit
import random
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from examples.simulated_engine.replica import Control
from hetis.planner.convert.names import duration
from hetis.planner.failures import ServiceError
from hetis.planner.store import Transaction
from hetis.runtime.agent.replica_state import ReplicaState
from hetis.v1 import change_pb2, redispatch_pb2, replica_pb2
from hetis.v1.agent_service_pb2 import ConnectNodeRequest
from hetis.v1.cluster_pb2 import NodeState
from hetis.v1.head_map_pb2 import Move, MoveReason
from tests.planner.fleet.samples import CLUSTER, REPLICA
from tests.protocol.agent_host import AgentHost
from tests.protocol.clock import AT_ONCE_S, VirtualLoop
from tests.protocol.engine_host import EngineHost
from tests.protocol.healed import check_healed, is_healed
from tests.protocol.ledger import BrokenError, Ledger
from tests.protocol.planner_host import NODES, PRIMARY, WORKERS, PlannerHost, new_store
from tests.protocol.transport import Fate, Network, Way

State = redispatch_pb2.RedispatchState
ENDS = (State.REDISPATCH_STATE_DONE, State.REDISPATCH_STATE_ABORTED)
ARRIVING = Control(rate_rps=1.0, prompt_tokens=60, output_tokens=4000, load_s=0.1, dense_step_s=0.2)
BUSY = Control(rate_rps=1.0, prompt_tokens=60, output_tokens=40, load_s=0.1, dense_step_s=0.2)
# Weights take long enough to load that all processes notice an engine's restart.
STILL = Control(rate_rps=0.0, load_s=3.0, dense_step_s=0.2)
LEAST_HEALED_S, HEALED_S = 4.0, 120.0  # the second exceeds every timeout several times
SERVED_S = 60.0
PREPARE_S = 10.0


@cache
def _templates() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hetis-protocol-", dir=_memory()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _move(
    request: Any, groups: list[int], source: str, target: str, *, copy_s: float, number: int = 0, together: int = 0
) -> Move:
    return Move(
        number=number,
        request=request.id,
        incarnation=request.incarnation,
        head_groups=groups,
        source=source,
        target=target,
        kv_bytes=copy_s * 1e10,
        together=together,
        reason=MoveReason.MOVE_REASON_BALANCE,
    )


class World:
    """Use it as a context manager. Invariants are checked after every delivery, call and engine step.

    Attributes:
        planner: the planner that leads. None: it is down.
        zombie: a planner that led before and does not know that it was replaced.
    """

    def __init__(self, seed: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hetis-protocol-", dir=_memory())
        folder = Path(self._folder.name)
        self.loop = VirtualLoop()
        self.random = random.Random(seed)
        self.network = Network()
        self.network.fleet = lambda node: self._fleet_of(node)
        self.network.watches.append(self._look)
        self.network.acknowledged = self._check_on_disk
        self.ledger = Ledger(primary=PRIMARY)
        self.file = new_store(_templates(), folder)
        self.planner: PlannerHost | None = None
        self.zombie: PlannerHost | None = None
        self.to_zombie: set[str] = set()  # nodes that reach the zombie instead
        self.proposed: list[str] = []
        self.acknowledged: list[str] = []  # re-dispatches that the fleet reported as stored
        self.draining: frozenset[str] = frozenset()
        self.planners_words_arrive = False  # whether messages sent before the kill still arrive
        self._proposing: list[Any] = []
        self._known_flips: set[str] = set()
        self._dead: list[PlannerHost] = []  # kept, because their pending work hangs forever
        self.engines: dict[str, EngineHost] = {}
        self.agents: dict[str, AgentHost] = {}
        self.loop.run(self._begin(folder))

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        async def kill() -> None:
            for agent in self.agents.values():
                agent.kill()
            for planner in (self.planner, self.zombie):
                if planner is not None:
                    planner.kill()

        self.loop.run(kill())
        self.loop.end()
        self._folder.cleanup()

    async def _begin(self, folder: Path) -> None:
        for node in NODES:
            self.engines[node] = EngineHost(node, self.engines, self._look, self.loop.time)
            self.engines[node].control = ARRIVING
        for node in NODES:
            self.agents[node] = AgentHost(
                node,
                folder / node,
                self.network,
                self.engines[node],
                random.Random(self.random.random()),
                self.loop.time,
            )

    def _look(self) -> None:
        if len(self.engines) >= len(NODES):
            self.ledger.look({node: self.engines[node] for node in NODES})
            for change_id in self.ledger.flipped.keys() - self._known_flips:
                self._known_flips.add(change_id)
                self._check_permitted(change_id)

    def _check_on_disk(self, node: str, request: ConnectNodeRequest) -> None:
        """Check that an acknowledged request is durable on the agent's disk."""
        ack = request.ack
        saved = self.agents[node].state.read().get(ack.replica)
        kept = 0 if saved is None else ReplicaState.from_bytes(saved, clock="this boot").held_generation
        if kept < ack.generation:
            self.ledger.failures.append(f"{node} acknowledged generation {ack.generation}, on its disk is {kept}")

    def _check_permitted(self, change_id: str) -> None:
        """Check that a flip was permitted, and that the store knew it first."""
        with closing(sqlite3.connect(f"file:{self.file}?mode=ro", uri=True)) as connection:
            name = f"{CLUSTER}/redispatches/{change_id}"
            row = connection.execute("SELECT state FROM redispatches WHERE name = ?", (name,)).fetchone()
        if row is None or row[0] in (0, State.REDISPATCH_STATE_PREPARING):
            self.ledger.failures.append(f"{change_id} was flipped, and the store knows of no permission")

    # --- the planner

    def start_planner(self) -> None:
        self.planner = self.loop.run(PlannerHost.start(self.file, self.loop, self._planner_died))

    def kill_planner(self) -> None:
        """Kill the planner as by -9; none leads until another one is started."""
        if self.planner is None:
            return
        planner, self.planner = self.planner, None
        self._bury(planner)

    def take_over(self) -> None:
        """Let another planner lead while the one before continues, as after a pause or behind a broken network."""
        if self.planner is None:
            self.start_planner()
            return
        self._drop_zombie()
        self.zombie, self.planner = self.planner, None
        self.zombie.store.lose_lock()
        self.start_planner()

    def _drop_zombie(self) -> None:
        if self.zombie is not None:
            self.to_zombie.clear()
            zombie, self.zombie = self.zombie, None
            self._bury(zombie)

    def _bury(self, planner: PlannerHost) -> None:
        def bury() -> None:
            planner.kill()
            self._dead.append(planner)
            for wire in list(self.network.wires.values()):
                if wire.fleet is planner.fleet:
                    wire.cut(arrives=[Way.DOWN] if self.planners_words_arrive else [])

        self._call(bury)

    def _planner_died(self) -> None:
        assert self.planner is not None
        self.loop.call_soon(self.kill_planner)  # messages in its streams are written by then

    def _fleet_of(self, node: str) -> Any:
        if node in self.to_zombie and self.zombie is not None:
            return self.zombie.fleet
        return None if self.planner is None or self.planner.store.is_dead else self.planner.fleet

    # --- time

    def settle(self) -> None:
        """Run everything that takes no time."""
        self.advance(AT_ONCE_S)

    def advance(self, seconds: float) -> None:
        self.loop.advance(seconds)
        self.check()

    def until(self, holds: Callable[[], bool], limit_s: float, what: str) -> None:
        end_s = self.loop.time() + limit_s
        while not holds():
            if self.loop.time() >= end_s:
                raise BrokenError(f"not after {limit_s:g} s: {what}")
            self.advance(0.25)

    def check(self) -> None:
        self.ledger.check()
        if self.loop.failures:
            raise BrokenError("; ".join(self.loop.failures))

    # --- regular courses

    def serve(self) -> None:
        """Go from an activated plan to a replica that serves some long requests."""
        self.start_planner()
        self.until(self.is_serving, SERVED_S, "the replica serves")
        self.until(lambda: len(self.running()) >= 4, SERVED_S, "requests run")
        for engine in self.engines.values():
            engine.control = STILL

    def is_still(self) -> bool:
        """Return whether no request comes, grows or ends."""
        return self.engines[PRIMARY].control is STILL

    def is_serving(self) -> bool:
        if self.planner is None:
            return False
        live = self.planner.fleet.replica_view(REPLICA)
        return live is not None and live.state == replica_pb2.REPLICA_STATE_SERVING

    def state(self) -> str:
        assert self.planner is not None
        live = self.planner.fleet.replica_view(REPLICA)
        nodes = self.planner.fleet.nodes_of(CLUSTER)
        states = {name.rpartition("/")[2]: NodeState.Name(node.state) for name, node in nodes.items()}
        return f"{'unknown' if live is None else replica_pb2.ReplicaState.Name(live.state)}; nodes: {states}"

    def running(self) -> list[str]:
        return [
            name
            for held in self.engines[PRIMARY].engine._held.values()
            if held.primary is not None
            for name in held.primary.running
        ]

    def propose(self, *, num_moves: int = 3, prepare_s: float = PREPARE_S, copy_s: float = 0.5) -> str | None:
        """Begin a re-dispatch of groups in the head map between workers; return None if it could not begin."""
        assert self.planner is not None
        try:
            generation, maps = self._map()
        except KeyError:
            return None
        moves: list[Move] = []
        names = [device.name for device in maps.devices]
        for request in maps.requests[:num_moves]:
            group = self.random.randrange(len(request.owners))
            source = names[request.owners[group]]
            target = self.random.choice([name for name in names if name != source])
            moves.append(
                _move(request, [group], source, target, number=len(moves), together=group, copy_s=copy_s / num_moves)
            )
        return None if not moves else self._propose(generation, moves, prepare_s)

    def between_workers(self, *, prepare_s: float = PREPARE_S, copy_s: float = 0.5) -> str | None:
        """Begin a re-dispatch whose authority, source and target are three nodes."""
        generation, found = self._map()
        names = [device.name for device in found.devices]
        source, target = (f"{worker}/0" for worker in WORKERS)
        for request in found.requests:
            owned = [group for group, owner in enumerate(request.owners) if names[owner] == source]
            if owned:
                break
        else:
            raise AssertionError("the first worker owns nothing")
        move = _move(request, owned[:1], source, target, copy_s=copy_s)
        return self._propose(generation, [move], prepare_s)

    def _map(self) -> tuple[int, Any]:
        held = self.engines[PRIMARY].engine._held[REPLICA]
        if held.primary is None:
            raise KeyError(REPLICA)
        return held.changes.generation, held.primary.head_maps()[0]

    def _propose(self, generation: int, moves: list[Move], prepare_s: float) -> str | None:
        change_id = str(uuid.UUID(int=self.random.getrandbits(128), version=4))
        body = redispatch_pb2.Redispatch(
            name=f"{CLUSTER}/redispatches/{change_id}",
            replica=REPLICA,
            num_moves=len(moves),
            change=change_pb2.Change(
                change_id=change_id,
                replica=REPLICA,
                base_generation=generation,
                moves=moves,
                prepare_timeout=duration(prepare_s),
            ),
        )
        assert self.planner is not None
        work = self.planner.fleet.redispatch(body)

        async def begin() -> None:
            with suppress(ServiceError):
                await work
                self.acknowledged.append(change_id)

        self.proposed.append(change_id)
        task = self.loop.create_task(begin())
        self._proposing.append(task)
        self.settle()
        return change_id if task.done() and change_id in self.acknowledged else None

    # --- single faults

    def cut(self, node: str, *, agent_notices: bool = True, planner_notices: bool = True) -> None:
        wire = self.network.wires.get(node)
        if wire is not None:
            self._call(lambda: wire.cut(agent_notices=agent_notices, planner_notices=planner_notices))

    def deliver(self, node: str, way: Way, position: int = 0, *, again: bool = False, lost: bool = False) -> None:
        """Deliver a held message out of order, twice or not at all."""
        wire = self.network.wires.get(node)
        if wire is None or not wire.held[way]:
            return
        held = wire.held[way]
        position %= len(held)
        item = held[position] if again else held.pop(position)
        if not lost:
            self._call(lambda: wire.deliver(way, item))

    def repeat_old(self, node: str, position: int) -> None:
        """Deliver again a message that the agent once got, from any planner."""
        wire, earlier = self.network.wires.get(node), self.network.earlier.get(node)
        if wire is None or not earlier:
            return
        message = earlier[position % len(earlier)]
        self._call(lambda: wire.agent_inbox.put_nowait(message))

    def kill_agent(self, node: str) -> None:
        self._call(self.agents[node].kill)

    def restart_agent(self, node: str) -> None:
        self.kill_agent(node)
        self._call(self.agents[node].start)

    def drain(self, node: str, is_draining: bool) -> None:
        """Drain or undrain like `DrainNode` and `UndrainNode`: stored first, then sent to the fleet."""
        planner = self.planner
        if planner is None or planner.store.is_dead or planner.store.dies_at is not None:
            return
        name = f"{CLUSTER}/nodes/{node}"

        def mark(tx: Transaction) -> None:
            tx.nodes.update(replace(tx.nodes.require(name), draining=is_draining))

        async def do() -> None:
            await planner.store.write(mark)
            await planner.fleet.cluster_changed(CLUSTER)

        self.loop.run(do())
        self.draining = self.draining | {node} if is_draining else self.draining - {node}

    def restart_engine(self, node: str) -> None:
        self._call(self.engines[node].restart)
        self._look()

    def _call(self, work: Callable[[], object]) -> None:
        """Run work in the loop, with its immediate consequences."""
        if self.loop.is_running():
            work()
            return

        async def do() -> None:
            work()

        self.loop.run(do())
        self.settle()

    # --- the end of a run

    def heal(self) -> None:
        """Let time pass without faults for long enough."""
        self._drop_zombie()
        self.network.fate = lambda _: Fate.PASS
        self._call(self.network.release)
        self.network.unreachable.clear()
        for engine in self.engines.values():
            engine.hears_peers, engine.answers_lost, engine.dies_at = True, 0, None
            engine.control = STILL
        if self.planner is not None:
            self.planner.store.dies_at = None
        else:
            self.start_planner()
        for node in self.draining:
            self.drain(node, False)
        for agent in self.agents.values():
            agent.state.dies_at = None
            if agent.is_dead:
                self._call(agent.start)
        end_s = self.loop.time() + HEALED_S
        self.advance(LEAST_HEALED_S)
        while not is_healed(self):
            if self.loop.time() >= end_s:
                check_healed(self)  # raises with the reason
            self.advance(2.0)

    def redispatches(self) -> dict[str, State.ValueType]:
        """Return the stored states by change id."""
        assert self.planner is not None
        records = self.loop.run(self.planner.store.read(lambda tx: tx.redispatches.all()))
        return {record.body.change.change_id: record.state for record in records}

    def _has_ended(self, change_id: str) -> bool:
        return self.redispatches().get(change_id) in ENDS

    def check_another_works(self) -> None:
        """Check that an undisturbed re-dispatch succeeds."""
        if not self.running():
            for engine in self.engines.values():
                engine.control = ARRIVING
            self.until(lambda: len(self.running()) >= 2, SERVED_S, "new requests run")
            for engine in self.engines.values():
                engine.control = STILL
        for _ in range(3):  # a delta without an answer delays the next ones for a while: an early try may abort
            change_id = self.propose(copy_s=0.2)
            if change_id is not None:
                self.until(partial(self._has_ended, change_id), 60.0, "another one ends")
                if self.redispatches()[change_id] == State.REDISPATCH_STATE_DONE:
                    return
            self.advance(10.0)
        raise BrokenError("no re-dispatch is made any more")
