"""Agents and engines as the contract defines them, small enough to be obviously right; they check what only they see.

`Engines` is the truth: which device owns each head group of one replica, and which devices hold its blocks. An agent
applies commands to its engine, and refuses what the contract tells it to refuse.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.agents.link import Response
from hetis.v1 import agent_service_pb2 as pb
from hetis.v1 import change_pb2, replica_pb2, report_pb2
from tests.planner.fleet.samples import CLUSTER

Phase = change_pb2.ChangePhase
State = report_pb2.AssignmentState
Group = tuple[str, int]


class BrokenInvariantError(AssertionError):
    """An invariant does not hold."""


@dataclass
class Engines:
    """The engines of all nodes together."""

    owner: dict[Group, str] = field(default_factory=dict)
    blocks: dict[str, set[Group]] = field(default_factory=dict)  # blocks of running requests, by device
    reserved: dict[tuple[str, str], set[Group]] = field(default_factory=dict)  # blocks reserved, by change and device
    flipped: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)  # changes that the authority has aborted
    generation: int = 0

    def start(self, devices: list[str], groups: list[Group]) -> None:
        for i, group in enumerate(groups):
            device = devices[i % len(devices)]
            self.owner[group] = device
            self.blocks.setdefault(device, set()).add(group)

    def check(self) -> None:
        """Check that each head group has one owner, which holds its KV."""
        for group, device in self.owner.items():
            if group not in self.blocks.get(device, set()):
                raise BrokenInvariantError(f"{device} owns {group} and has freed it")

    def flip(self, change: change_pb2.Change) -> None:
        if change.change_id in self.aborted:
            raise BrokenInvariantError("flipped after it was aborted")
        for move in change.moves:
            for number in move.head_groups:
                group = (move.request, number)
                if self.owner[group] != move.source:
                    continue  # this move is left out
                if group not in self.reserved.get((change.change_id, move.target), set()):
                    raise BrokenInvariantError("flipped to a device that has no copy")
                self.owner[group] = move.target
                self.blocks.setdefault(move.target, set()).add(group)
        self.flipped.add(change.change_id)
        self.generation = change.generation


@dataclass
class HeldChange:
    change: change_pb2.Change
    parts: tuple[int, ...]
    phase: Phase.ValueType = Phase.CHANGE_PHASE_PREPARING


class ModelAgent:
    """``sent``: messages that were not delivered yet, in their order."""

    def __init__(self, node: str, engines: Engines) -> None:
        self.node = node
        self.engines = engines
        self.epoch = 0
        self.held: dict[str, tuple[int, int, replica_pb2.Assignment]] = {}  # generation, epoch, assignment
        self.states: dict[str, State.ValueType] = {}
        self.changes: dict[str, HeldChange] = {}
        self.given_up: set[str] = set()
        self.sent: list[pb.ConnectNodeRequest] = []
        self.boot_id = str(uuid.uuid4())
        self.capabilities = [
            pb.AGENT_CAPABILITY_ASSIGN,
            pb.AGENT_CAPABILITY_MOVE,
            pb.AGENT_CAPABILITY_HEAD_MAP,
        ]
        self.num_running = 1
        self.reports_failure: Reason.ValueType | None = None  # failure in the reports of replicas
        self.refuse_with: Reason.ValueType | None = None  # reason to refuse the next delta
        self._answers: dict[str, pb.ConnectNodeRequest] = {}  # answer to each replica's last delta
        self._sequence = 0
        self._stream_epoch = 0

    def hello(self) -> pb.ConnectNodeRequest:
        """Begin a stream; undelivered messages are lost."""
        self.sent.clear()
        self._sequence, self._stream_epoch = 0, 0
        hello = pb.Hello(
            node=f"{CLUSTER}/nodes/{self.node}",
            protocol_version=1,
            min_protocol_version=1,
            agent_version="1.0",
            boot_id=self.boot_id,
            inventory_digest="sha256:0",
            newest_epoch=self.epoch,
            replicas=[
                pb.HeldReplica(replica=name, generation=generation, epoch=epoch, assignment_state=self.states[name])
                for name, (generation, epoch, _) in self.held.items()
            ],
            changes=[self._status(held) for held in self.changes.values()],
            capabilities=self.capabilities,
        )
        return self._request(hello=hello)

    def take(self, message: Response) -> None:
        """
        Raises:
            ServiceError: STALE_EPOCH: the stream must end.
        """
        if message.epoch < self.epoch:
            raise ServiceError(Reason.ERROR_REASON_STALE_EPOCH, "an old planner")
        self.epoch = self._stream_epoch = message.epoch
        if message.WhichOneof("message") == "delta":
            self._take_delta(message.delta)

    def report(self) -> None:
        reports = [
            report_pb2.ReplicaReport(
                replica=name,
                assignment_state=self.states[name],
                generation=generation,
                is_primary=assignment.primary_node == self.node,
                num_running=self.num_running if assignment.primary_node == self.node else 0,
            )
            for name, (generation, _, assignment) in self.held.items()
        ]
        for one in reports if self.reports_failure is not None else ():
            one.failure.reason = self.reports_failure
        self.sent.append(self._request(report=pb.NodeReport(replicas=reports)))

    def heartbeat(self) -> None:
        self.sent.append(self._request(heartbeat=pb.Heartbeat()))

    # The engine's own progress.

    def load(self) -> None:
        """Let every assignment reach its goal."""
        for name, (_, _, assignment) in self.held.items():
            self.states[name] = {
                replica_pb2.ASSIGNMENT_GOAL_LOAD: State.ASSIGNMENT_STATE_LOADED,
                replica_pb2.ASSIGNMENT_GOAL_SERVE: State.ASSIGNMENT_STATE_SERVING,
                replica_pb2.ASSIGNMENT_GOAL_DRAIN: State.ASSIGNMENT_STATE_DRAINING,
            }[assignment.goal]
        self.report()

    def get_ready(self) -> None:
        """Complete all copies."""
        for held in self.changes.values():
            if held.phase == Phase.CHANGE_PHASE_PREPARING:
                self._enter(held, Phase.CHANGE_PHASE_READY)

    def fail_copy(self) -> None:
        for held in list(self.changes.values()):
            if held.phase == Phase.CHANGE_PHASE_PREPARING and self._is(held, change_pb2.CHANGE_PART_TARGET):
                self._abort_here(held)

    def hear_from_primary(self) -> None:
        """Learn over the engines' connections how the changes ended for which this node waits."""
        for held in self.changes.values():
            if held.phase in (Phase.CHANGE_PHASE_PREPARING, Phase.CHANGE_PHASE_READY):
                if held.change.change_id in self.engines.flipped:
                    self._enter(held, Phase.CHANGE_PHASE_FLIPPED)
                elif held.change.change_id in self.engines.aborted:
                    self._abort_here(held)

    # Deltas.

    def _take_delta(self, delta: pb.Delta) -> None:
        before = self._answers.get(delta.replica)
        if before is not None and delta.nonce in (before.ack.nonce, before.nack.nonce):
            again = self._request()
            again.MergeFrom(before)
            again.sequence, again.epoch = self._sequence, self._stream_epoch
            self.sent.append(again)
            return
        generation = self.held[delta.replica][0] if delta.replica in self.held else 0
        failure = self._failure(delta, generation)
        if failure is None:
            statuses = self._obey(delta)
            held = self.held[delta.replica][0] if delta.replica in self.held else 0
            answer = self._request(ack=pb.DeltaAck(nonce=delta.nonce, replica=delta.replica, generation=held))
        else:
            statuses = []
            answer = self._request(
                nack=pb.DeltaNack(
                    nonce=delta.nonce,
                    replica=delta.replica,
                    generation=generation,
                    failure=ServiceError(failure, "refused").to_proto(),
                )
            )
        self._answers[delta.replica] = answer
        self.sent.append(answer)
        for status in statuses:
            self.sent.append(self._request(change_status=status))

    def _failure(self, delta: pb.Delta, generation: int) -> Reason.ValueType | None:
        kind = delta.WhichOneof("change")
        if self.refuse_with is not None:
            refused, self.refuse_with = self.refuse_with, None
            return refused
        if kind == "assignment":
            return Reason.ERROR_REASON_GENERATION_MISMATCH if delta.generation <= generation else None
        if kind in ("removal", "prepare") and delta.base_generation != generation:
            return Reason.ERROR_REASON_GENERATION_MISMATCH
        if kind == "prepare":
            change_id = delta.prepare.change.change_id
            if change_id in self.given_up:
                return Reason.ERROR_REASON_CHANGE_PHASE
            others = [held for other, held in self.changes.items() if other != change_id and self._is_open(held)]
            return Reason.ERROR_REASON_CHANGE_IN_FLIGHT if others else None
        if kind in ("commit", "abort", "resolved"):
            change_id = getattr(delta, kind).change_id
            if kind == "abort" and change_id not in self.changes:
                self.given_up.add(change_id)
            return None if change_id in self.changes else Reason.ERROR_REASON_CHANGE_UNKNOWN
        return None

    def _obey(self, delta: pb.Delta) -> list[change_pb2.ChangeStatus]:
        kind = delta.WhichOneof("change")
        if kind == "assignment":
            statuses = self._end_open(delta.replica)
            self.held[delta.replica] = (delta.generation, self._stream_epoch, delta.assignment)
            self.states.setdefault(delta.replica, State.ASSIGNMENT_STATE_LOADING)
            return statuses
        if kind == "removal":
            statuses = self._end_open(delta.replica)
            self.held.pop(delta.replica, None)
            self.states.pop(delta.replica, None)
            return statuses
        if kind == "prepare":
            return [self._prepare(delta.prepare)]
        held = self.changes[getattr(delta, kind or "").change_id]
        if kind == "commit":
            return [self._commit(held)]
        if kind == "abort":
            return self._abort(held)
        return self._resolve(held, delta.resolved)

    def _prepare(self, prepare: pb.PrepareChange) -> change_pb2.ChangeStatus:
        change_id = prepare.change.change_id
        if change_id not in self.changes:
            held = HeldChange(prepare.change, tuple(prepare.parts))
            self.changes[change_id] = held
            for move in prepare.change.moves:
                if move.target.startswith(f"{self.node}/"):
                    groups = self.engines.reserved.setdefault((change_id, move.target), set())
                    groups |= {(move.request, number) for number in move.head_groups}
        return self._status(self.changes[change_id])

    def _commit(self, held: HeldChange) -> change_pb2.ChangeStatus:
        if not self._is(held, change_pb2.CHANGE_PART_AUTHORITY):
            raise BrokenInvariantError("a node that is not the authority was permitted to flip")
        if held.phase == Phase.CHANGE_PHASE_READY:
            self.engines.flip(held.change)
            held.phase = Phase.CHANGE_PHASE_FLIPPED
            generation, epoch, assignment = self.held[held.change.replica]
            self.held[held.change.replica] = (max(generation, held.change.generation), epoch, assignment)
        elif held.phase == Phase.CHANGE_PHASE_PREPARING:
            raise BrokenInvariantError("permitted to flip before it was ready")
        return self._status(held)

    def _abort(self, held: HeldChange) -> list[change_pb2.ChangeStatus]:
        """Abort a change; a node that does not decide frees only what the authority has not flipped."""
        if held.phase in (Phase.CHANGE_PHASE_PREPARING, Phase.CHANGE_PHASE_READY):
            if held.change.change_id in self.engines.flipped:
                held.phase = Phase.CHANGE_PHASE_FLIPPED
            else:
                self._free_reservations(held)
                held.phase = Phase.CHANGE_PHASE_ABORTED
                if self._is(held, change_pb2.CHANGE_PART_AUTHORITY):
                    self.engines.aborted.add(held.change.change_id)
        self.given_up.add(held.change.change_id)
        return [self._status(held)]

    def _resolve(self, held: HeldChange, resolved: pb.ChangeResolved) -> list[change_pb2.ChangeStatus]:
        change_id = held.change.change_id
        was_flipped = change_id in self.engines.flipped
        if was_flipped != (resolved.outcome == change_pb2.CHANGE_OUTCOME_FLIPPED):
            raise BrokenInvariantError(f"told that {change_id} ended otherwise than it did")
        del self.changes[change_id]
        self.given_up.add(change_id)
        if not was_flipped:
            self._free_reservations(held)
            return []
        for move in held.change.moves:
            if move.source.startswith(f"{self.node}/"):
                self.engines.blocks[move.source] -= {(move.request, number) for number in move.head_groups}
        generation, epoch, assignment = self.held.get(held.change.replica, (0, 0, replica_pb2.Assignment()))
        if generation:
            self.held[held.change.replica] = (max(generation, held.change.generation), epoch, assignment)
        held.phase = Phase.CHANGE_PHASE_RELEASED
        return [self._status(held)]

    def _end_open(self, replica: str) -> list[change_pb2.ChangeStatus]:
        """End the open change that an assignment or removal meets."""
        statuses = []
        for held in self.changes.values():
            if held.change.replica == replica and self._is_open(held):
                is_authority = self._is(held, change_pb2.CHANGE_PART_AUTHORITY)
                decided = held.change.change_id in self.engines.flipped | self.engines.aborted
                if is_authority or decided:
                    statuses += self._abort(held)
        return statuses

    def _abort_here(self, held: HeldChange) -> None:
        self._free_reservations(held)
        if self._is(held, change_pb2.CHANGE_PART_AUTHORITY):
            self.engines.aborted.add(held.change.change_id)
        self._enter(held, Phase.CHANGE_PHASE_ABORTED)

    def _free_reservations(self, held: HeldChange) -> None:
        for move in held.change.moves:
            if move.target.startswith(f"{self.node}/"):
                self.engines.reserved.pop((held.change.change_id, move.target), None)

    def _enter(self, held: HeldChange, phase: Phase.ValueType) -> None:
        held.phase = phase
        self.sent.append(self._request(change_status=self._status(held)))

    def _is(self, held: HeldChange, part: change_pb2.ChangePart.ValueType) -> bool:
        return part in held.parts

    def _is_open(self, held: HeldChange) -> bool:
        return held.phase in (Phase.CHANGE_PHASE_PREPARING, Phase.CHANGE_PHASE_READY)

    def _status(self, held: HeldChange) -> change_pb2.ChangeStatus:
        generation = self.held[held.change.replica][0] if held.change.replica in self.held else 0
        return change_pb2.ChangeStatus(
            change_id=held.change.change_id, replica=held.change.replica, phase=held.phase, generation=generation
        )

    def _request(self, **message: object) -> pb.ConnectNodeRequest:
        self._sequence += 1
        return pb.ConnectNodeRequest(epoch=self._stream_epoch, sequence=self._sequence, **message)  # type: ignore[arg-type]
