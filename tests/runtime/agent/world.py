"""Three nodes in virtual time: agents, simulated engines, and a correct planner on an unreliable network."""

from __future__ import annotations

import random

from examples.simulated_engine.engine import SimulatedEngine
from examples.simulated_engine.replica import Control
from hetis.runtime.agent.outbox import EngineRequest, EngineResponse
from hetis.runtime.agent.replica_state import ReplicaState
from hetis.runtime.moves.refusals import RefusedError, unreachable
from hetis.v1.agent_service_pb2 import ConnectNodeRequest, ConnectNodeResponse
from hetis.v1.change_pb2 import Change, ChangePart, ChangePhase, ChangeStatus
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    ApplyAssignmentRequest,
    CopyMovesRequest,
    CopyMovesResponse,
    FlipMovesRequest,
    ReadHeadMapsRequest,
    ReleaseMovesRequest,
    ReserveMovesRequest,
)
from hetis.v1.failure_pb2 import Failure
from hetis.v1.head_map_pb2 import Move, MoveReason
from hetis.v1.replica_pb2 import EnginePeer
from tests.runtime.agent.builders import (
    AUTHORITY,
    REPLICA,
    SOURCE,
    TARGET,
    Bench,
    Planner,
    assignment,
    change,
    stage_model,
    welcome,
)

NODES = ("p", "w", "x")
PEERS = [EnginePeer(node="p", address="p:1")]
BUSY = Control(rate_rps=2, prompt_tokens=60, output_tokens=40, load_s=0.0, dense_step_s=0.2)
CALM = BUSY.model_copy(update={"output_tokens": 500.0})  # no request ends soon
ENDED = (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_RELEASED)


class World:
    """All parts under test, and the checks of what must never happen.

    Attributes:
        flipped: changes that the authority ever flipped.
        lost_flips: those of them whose authority died afterwards: nothing of its head map is in force any more.
        ready: nodes that reported READY to the planner, by change.
        told: the authority's status of a change, as the planner received it.
    """

    def __init__(self, seed: int, *, blocks: int = 60, control: Control = BUSY) -> None:
        self.random = random.Random(seed)
        self.control = control
        self.now_s = 100.0
        self.model = stage_model(blocks=blocks)
        self.benches = {node: Bench(node=node) for node in NODES}
        self.engines = {node: self._new_engine(node) for node in NODES}
        self.planner = Planner(1)
        self.generation = 0
        self.inbox: dict[str, list[ConnectNodeResponse]] = {node: [] for node in NODES}
        self.delivered: dict[str, list[ConnectNodeResponse]] = {node: [] for node in NODES}
        self.change: Change | None = None
        self.parts: dict[str, list[ChangePart.ValueType]] = {}
        self.earlier: list[tuple[Change, dict[str, list[ChangePart.ValueType]]]] = []
        self.aborting = False
        self.flipped: set[str] = set()
        self.lost_flips: set[str] = set()
        self.ready: dict[str, set[str]] = {}
        self.told: dict[str, ChangeStatus] = {}
        self.phases: dict[tuple[str, str], int] = {}
        self.epochs = dict.fromkeys(NODES, 0)
        for node in NODES:
            self.connect(node)

    def _new_engine(self, node: str) -> SimulatedEngine:
        engine = SimulatedEngine(node, 1, seed=7, engine_id=f"{node}-{self.random.random()}")
        engine.control = self.control
        return engine

    # --- the planner

    def connect(self, node: str) -> None:
        bench = self.benches[node]
        self.inbox[node].clear()
        hello = bench.core.hello()
        for status in hello.hello.changes:
            self._hear_status(node, status)
        self.hear_all(node, bench.hear(welcome(self.planner.epoch)))

    def assign(self) -> None:
        self.generation += 1
        if self.change is not None:
            self.aborting = True
        for node in NODES:
            what = assignment(node, model=self.model, peers=PEERS)
            what.plan = f"plans/{self.generation}"
            self.inbox[node].append(self.planner.assign(what, generation=self.generation))

    def prepare(self, timeout_s: float) -> bool:
        """A change of moves that the head map allows, to all three nodes."""
        maps = None
        try:
            maps = self.engines["p"].head_maps(REPLICA)
        except RefusedError:
            return False
        if self.change is not None and not self._is_over(self.change.change_id):
            return False
        moves: list[Move] = []
        for request in sorted(maps.head_maps[0].requests, key=lambda found: -found.remaining_tokens)[:4]:
            group = self.random.randrange(8)
            names = [device.name for device in maps.head_maps[0].devices]
            source = names[request.owners[group]]
            target = self.random.choice([name for name in names if name != source])
            moves.append(
                Move(
                    number=len(moves),
                    request=request.id,
                    incarnation=request.incarnation,
                    head_groups=[group],
                    source=source,
                    target=target,
                    kv_bytes=self.random.choice([0, 1e6, 5e9]),
                    together=group,
                    reason=MoveReason.MOVE_REASON_BALANCE,
                )
            )
        if not moves:
            return False
        if self.change is not None:
            self.earlier.append((self.change, self.parts))
        self.change = change(base=maps.generation, timeout_s=timeout_s, moves=moves)
        self.generation = max(self.generation, self.change.generation)
        self.aborting = False
        self.parts = {"p": [AUTHORITY]}
        for move in moves:
            for device, part in ((move.source, SOURCE), (move.target, TARGET)):
                parts = self.parts.setdefault(device[0], [])
                if part not in parts:
                    parts.append(part)
        for node, parts in self.parts.items():
            base = self.benches[node].core.held()[0].generation if self.benches[node].core.held() else 0
            self.inbox[node].append(self.planner.prepare(self.change, *parts, base=base))
        return True

    def decide(self) -> None:
        """Return a correct planner's next directive for its change."""
        for earlier, parts in self.earlier:
            self._decide_on(earlier, parts, aborting=True)
        if self.change is not None:
            self._decide_on(self.change, self.parts, aborting=self.aborting)

    def _decide_on(self, of: Change, parts: dict[str, list[ChangePart.ValueType]], *, aborting: bool) -> None:
        said = self.told.get(of.change_id)
        if said is not None and said.phase in (*ENDED, ChangePhase.CHANGE_PHASE_ABORTED):
            outcome = 1 if said.phase in ENDED else 2
            for node in parts:
                message = self.planner.resolved(of, outcome)  # type: ignore[arg-type]
                message.delta.resolved.moves.extend(said.moves if outcome == 1 else [])
                self.inbox[node].append(message)
        elif aborting:
            for node in parts:
                self.inbox[node].append(self.planner.abort(of))
        elif self.ready.get(of.change_id, set()) >= set(parts):
            self.inbox["p"].append(self.planner.commit(of))

    def abort(self) -> None:
        self.aborting = True
        self.decide()

    def new_planner(self) -> None:
        self.planner = Planner(self.planner.epoch + 1)
        self.aborting = True
        for node in NODES:
            self.benches[node].core.stream_ended()
            self.connect(node)

    def _is_over(self, change_id: str) -> bool:
        return all(
            held is None or held.has_ended
            for bench in self.benches.values()
            for entry in bench.core.held()
            for held in [entry.changes.get(change_id)]
        )

    # --- the wire

    def deliver(self, node: str, *, dies_after: int | None = None) -> None:
        if self.inbox[node]:
            message = self.inbox[node].pop(0)
            self.delivered[node].append(message)
            self.give(node, message, dies_after=dies_after)

    def repeat(self, node: str, *, old_epoch: bool) -> None:
        """Deliver an earlier message again, or with the epoch of a planner whose term is over."""
        if not self.delivered[node]:
            return
        message = ConnectNodeResponse()
        message.CopyFrom(self.random.choice(self.delivered[node]))
        if old_epoch:
            message.epoch = max(self.epochs[node] - 1, 0)
            before = [held.to_bytes(clock="") for held in self.benches[node].core.held()]
            self.give(node, message)
            assert [held.to_bytes(clock="") for held in self.benches[node].core.held()] == before, "fenced"
            self.connect(node)
        elif message.epoch >= self.epochs[node]:
            self.give(node, message)

    def give(self, node: str, message: ConnectNodeResponse, *, dies_after: int | None = None) -> None:
        bench = self.benches[node]
        actions = bench.core.handle(message, self.now_s)
        self.hear_all(node, bench.do(actions if dies_after is None else actions[:dies_after]))
        if dies_after is not None:
            self.restart_agent(node)
        self.check()

    def hear_all(self, node: str, messages: list[ConnectNodeRequest]) -> None:
        for message in messages:
            if message.HasField("change_status"):
                self._hear_status(node, message.change_status)
            if message.HasField("nack") and self.change is not None:
                self.aborting = True

    def _hear_status(self, node: str, status: ChangeStatus) -> None:
        known = self.phases.get((node, status.change_id), 0)
        assert status.phase >= known, f"{node} went back from phase {known} to {status.phase}"
        self.phases[node, status.change_id] = status.phase
        if status.phase == ChangePhase.CHANGE_PHASE_READY:
            self.ready.setdefault(status.change_id, set()).add(node)
        if (
            status.phase == ChangePhase.CHANGE_PHASE_ABORTED
            and self.change
            and status.change_id == self.change.change_id
        ):
            self.aborting = True
        if node == "p" and status.phase in (*ENDED, ChangePhase.CHANGE_PHASE_ABORTED):
            self.told.setdefault(status.change_id, ChangeStatus()).CopyFrom(status)

    # --- engines

    def call(self, node: str, *, answer_lost: bool = False, authority_reached: bool = True) -> None:
        """Let the engine execute the oldest pending call."""
        bench = self.benches[node]
        if not bench.calls:
            return
        number, request = next(iter(bench.calls.items()))
        answer = self._ask(node, request, authority_reached)
        if answer is None:
            return  # the call takes longer
        del bench.calls[number]
        if answer_lost:
            answer = unreachable("the answer was lost")
        self.hear_all(node, bench.do(bench.core.answered(number, answer, self.now_s)))
        self.check()

    def _ask(self, node: str, request: EngineRequest, reached: bool) -> EngineResponse | Failure | None:
        engine, now_s = self.engines[node], self.now_s
        try:
            match request:
                case ApplyAssignmentRequest():
                    return engine.apply_assignment(request, now_s)
                case ReserveMovesRequest():
                    return engine.reserve_moves(request, now_s)
                case CopyMovesRequest():
                    found = engine.copy_moves(request, now_s)
                    if found.phase == ChangePhase.CHANGE_PHASE_PREPARING:
                        return None
                    return CopyMovesResponse(copied_bytes=found.status.copied_bytes, total_bytes=found.copy_bytes)
                case FlipMovesRequest():
                    engine.flip_moves(request, now_s)
                    return engine.flip_answer(request.change_id)
                case ReleaseMovesRequest():
                    return engine.release_moves(request, now_s)
                case AbortMovesRequest():
                    said = list(self.engines["p"].report(now_s).changes) if reached else None
                    return engine.abort_moves(request, now_s, authority=said)
                case ReadHeadMapsRequest():
                    return [engine.head_maps(request.replica)]
        except RefusedError as error:
            return error.failure

    def report(self, node: str, *, peers: bool) -> None:
        if peers and node != "p":
            self.engines[node].hear(REPLICA, self.engines["p"].report(self.now_s))
        bench = self.benches[node]
        self.hear_all(node, bench.do(bench.core.on_engine_report(self.engines[node].report(self.now_s), self.now_s)))
        self.check()

    def restart_engine(self, node: str) -> None:
        if node == "p":
            self.lost_flips |= self.flipped
        self.engines[node] = self._new_engine(node)
        self.report(node, peers=False)

    def restart_agent(self, node: str) -> None:
        self.benches[node].boot()
        self.benches[node].now_s = self.now_s
        self.connect(node)
        self.check()

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        for node in NODES:
            self.engines[node].step(self.now_s)
            bench = self.benches[node]
            bench.now_s = self.now_s
            self.hear_all(node, bench.do(bench.core.tick(self.now_s)))
        self.check()

    def settle(self) -> None:
        """Let everything end: the network works, the planner decides, and time passes."""
        for _ in range(60):
            self.pass_time(2.0)
            self.decide()
            for node in NODES:
                while self.inbox[node]:
                    self.deliver(node)
                for _ in range(8):
                    self.call(node)
                self.report(node, peers=True)

    # --- what must hold

    def check(self) -> None:
        for held in self.engines["p"]._held.values():
            assert held.primary is not None
            held.primary.check()
            for known in held.changes.known.values():
                if known.phase in ENDED:
                    self.flipped.add(known.change.change_id)
        for node, engine in self.engines.items():
            for status in engine.report(self.now_s).changes:
                self._check_phase(node, status.change_id, status.phase, is_engine=True)
        for node, bench in self.benches.items():
            assert bench.core.newest_epoch >= self.epochs[node], "the fence fell"
            self.epochs[node] = bench.core.newest_epoch
            for entry in bench.core.held():
                self._check_disk(bench, entry)
                for found in entry.changes.values():
                    self._check_phase(node, found.id, found.phase, is_engine=False)

    def _check_phase(self, node: str, change_id: str, phase: int, *, is_engine: bool) -> None:
        if phase in ENDED:
            assert change_id in self.flipped, f"{node} takes {change_id} to be flipped, the authority never did"
        if phase == ChangePhase.CHANGE_PHASE_ABORTED and is_engine and change_id in self.flipped - self.lost_flips:
            known = [held.changes.known.get(change_id) for held in self.engines[node]._held.values()]
            assert not any(found is not None and found.parts for found in known), f"{node} gave up what was flipped"

    def _check_disk(self, bench: Bench, entry: ReplicaState) -> None:
        if not entry.generation:
            return
        saved = ReplicaState.from_bytes(bench.disk[entry.replica], clock="boot-1")
        assert (saved.generation, saved.epoch, saved.assignment, saved.nonce) == (
            entry.generation,
            entry.epoch,
            entry.assignment,
            entry.nonce,
        )
        assert {c.id: c.phase for c in saved.changes.values()} == {c.id: c.phase for c in entry.changes.values()}
