"""One running cluster, as a value without I/O: stored records and node reports go in, messages and writes come out.

Nothing here waits, reads a clock, or communicates. `hetis.planner.fleet.deciding` computes the next writes; nodes are
sent the consequences of a write once it is stored. Re-dispatches are in `hetis.planner.fleet.cluster_changes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from hetis.planner.convert.names import last_part, name_of, node_name
from hetis.planner.failures import Reason, ServiceError, not_found
from hetis.planner.fleet.activation import NodeState
from hetis.planner.fleet.agents.deltas import ROOM, DeltaAnswer, ReplicaSlot, WantedAssignment, WantedRemoval
from hetis.planner.fleet.agents.leases import Leases
from hetis.planner.fleet.agents.link import HeadMapsRead, NodeLink, Reported, Response, not_connected, taken_over
from hetis.planner.fleet.cluster_changes import ClusterChanges
from hetis.planner.fleet.node_records import NodeRecords
from hetis.planner.fleet.pending import PendingEvents
from hetis.planner.fleet.replica import Contents, Replica
from hetis.planner.fleet.settings import FleetCounters, FleetSettings
from hetis.planner.fleet.writes import ReplicaWrite, StoredCluster, WriteResult, Writes
from hetis.planner.store import ClusterRecord, NodeRecord, PlanRecord, ReplicaRecord
from hetis.v1 import agent_service_pb2, change_pb2, inventory_pb2, plan_pb2


class ClusterFleet:
    """The state of one running cluster.

    Attributes:
        links, leases: the state of each node by node id.
    """

    def __init__(self, name: str, *, epoch: int, settings: FleetSettings, counters: FleetCounters) -> None:
        self.name = name  # `clusters/{cluster}`
        self.record: ClusterRecord | None = None  # None before the first read, and once the cluster is gone
        self.plan: PlanRecord | None = None  # the active plan, or None
        self.links: dict[str, NodeLink] = {}
        self.leases = Leases(suspect_s=settings.suspect_s, lease_s=settings.lease_s)
        self.replicas: dict[str, Replica] = {}  # replicas by name
        self.node_records = NodeRecords(name)
        self.pending = PendingEvents()
        self.unprepared: dict[str, None] = {}  # replicas whose plans have to be read, in order
        self.dirty: set[str] = set()  # replicas for which the rule must be evaluated
        self.decide_all = True  # whether the rule must be evaluated for all replicas
        self.progress = plan_pb2.ActivationProgress()  # progress of the active plan, as of the last decision
        self.connect_time_s: dict[str, float] = {}  # Unix time at which the last stream of each node began
        self.settings = settings
        self.counters = counters
        self._epoch = epoch
        self._replicas_on: dict[str, set[str]] = {}  # names of replicas by node id
        self._sendable: set[str] = set()  # nodes with messages to send now
        self._waiting: set[str] = set()  # nodes with messages to send later
        self.changes = ClusterChanges(self)

    # --- The stored state

    def take(self, kept: StoredCluster, declared: Iterable[str], *, now_s: float) -> None:
        """Take over the state just read from the store; ``declared`` are the node ids in the cluster's document."""
        is_first = self.record is None
        self.record, self.plan = kept.cluster, kept.plan
        self.decide_all = True
        earlier = {last_part(record.name) for record in kept.nodes if record.body.agent_version} if is_first else set()
        changed = self.leases.declare(declared, now_s=now_s, known=earlier)
        self.note_presence(changed)
        for record in kept.nodes:
            self.take_node(record)
        for node in changed:
            if self.leases.is_connected(node) and self.leases.is_declared(node):  # its earlier messages count now
                self._write_node(node, self.links[node].inventory)
        for name in self.replicas.keys() - set(kept.replica_names):
            self.drop_replica(name)
        for replica_record in kept.replicas:
            if replica_record.name in self.replicas:
                self.replicas[replica_record.name].renew(replica_record)
            else:
                self._add_replica(Replica(replica_record))
            self.show("replica", replica_record.name)
        if is_first:
            for redispatch in kept.redispatches:
                self.changes.resume(redispatch.body, now_s=now_s)
        for node in {*changed, *(last_part(record.name) for record in kept.nodes)}:
            self.forget_if_unneeded(node)

    def prepare(self, name: str, contents: Contents | None) -> None:
        """Set the plan's contents for a replica; None: the plan cannot be read, so the replica cannot be started."""
        replica = self.replicas.get(name)
        self.unprepared.pop(name, None)
        if replica is None:
            return
        replica.take_contents(contents)
        self.dirty.add(name)
        if replica.assigned_generation and not replica.is_stopping and not replica.has_failed:
            self.assign(replica, is_new=False)

    def take_node(self, record: NodeRecord) -> None:
        self.show("node", record.name)
        if self.node_records.take(record):
            self.pending.mark_capacity()
            self.dirty |= self._replicas_on.get(last_part(record.name), set())

    # --- Input from nodes

    def slot(self, node: str, replica: str) -> ReplicaSlot | None:
        """Return the state of a replica on a node, or None if the node neither has nor is to get it."""
        link = self.links.get(node)
        return None if link is None else link.slots.get(replica)

    def replicas_on(self, node: str) -> list[str]:
        """Return the names of the replicas that have GPUs of the node, in order."""
        return sorted(self._replicas_on.get(node, ()))

    def ensure_link(self, node: str) -> NodeLink:
        """Return the node's link, a new one if it has none."""
        if node not in self.links:
            record = self.node_records.get(node)
            self.links[node] = NodeLink(
                node_name(self.name, node),
                epoch=self._epoch,
                settings=self.settings,
                counters=self.counters,
                most_held=partial(self._most_held, node),
                known=None if record is None else record.body,
            )
        return self.links[node]

    def open(self, node: str, request: agent_service_pb2.ConnectNodeRequest, *, now_s: float, time_s: float) -> str:
        """Open a stream and return its session. Raises ServiceError if the stream is refused."""
        if not self._replicas_on.get(node):
            self.leases.require_room(node, cluster=self.name)
        link = self.ensure_link(node)
        link.require_same_agent(request.hello.boot_id, heard_s=self.leases.heard_s(node), now_s=now_s)
        was_connected, address = bool(link.session), link.engine_address
        link.open(request)
        self.counters.streams += 1
        self.counters.takeovers += was_connected
        self.connect_time_s[node] = time_s
        if self.leases.connect(node, now_s=now_s):
            self.note_presence([node])
        record = self.node_records.get(node)
        present = (link.agent_version, link.engine_address)
        if record is None or (record.body.agent_version, record.body.engine_address) != present:
            self._write_node(node, None)
        self.changes.reconnected(node, request.hello.changes)
        for name in list(link.slots):
            self._check_held(node, name)
        if link.engine_address != address:
            self._note_address(node, link.engine_address, before=address)
        self._sendable.add(node)
        self.dirty |= self._replicas_on.get(node, set())
        return link.session

    def close(self, node: str, session: str) -> None:
        link = self.links.get(node)
        if link is not None and link.close(session) and self.leases.disconnect(node):
            self.note_presence([node])
        self.forget_if_unneeded(node)

    def handle(
        self, node: str, session: str, request: agent_service_pb2.ConnectNodeRequest, *, now_s: float, time_s: float
    ) -> list[HeadMapsRead]:
        """Handle a message; return the head maps that callers wait for. Raises ServiceError if the stream must end."""
        link = self.links.get(node)
        if link is None or link.session != session:
            raise taken_over(f"another stream of node {node} was opened", node_name(self.name, node))
        self.counters.messages[request.WhichOneof("message") or "unknown"] += 1
        if self.leases.renew(node, now_s=now_s):
            self.note_presence([node])
        read: list[HeadMapsRead] = []
        found = link.receive(request, now_s=now_s)
        if not found and request.WhichOneof("message") == "report":
            self.counters.reports_dropped += 1
        for event in found:
            match event:
                case Reported():
                    self._note_report(node, event, time_s)
                case inventory_pb2.NodeInventory():
                    self._write_node(node, event)
                case DeltaAnswer():
                    self._note_answer(node, event, now_s)
                case change_pb2.ChangeStatus():
                    self.changes.report(node, event)
                case HeadMapsRead():
                    read.append(event)
                case ServiceError():
                    raise event
        if link.has_more:
            self._sendable.add(node)
        return read

    def pass_time(self, now_s: float) -> None:
        """Expire leases and deadlines, and schedule retransmissions."""
        self.note_presence(self.leases.expire(now_s))
        self._sendable |= self._waiting
        self._waiting.clear()
        self.changes.pass_time(now_s)
        self.dirty |= {name for name, replica in self.replicas.items() if replica.is_passing}

    def note_presence(self, nodes: Iterable[str]) -> None:
        """Record that the states of these nodes changed."""
        for node in nodes:
            self.show("node", node_name(self.name, node))
            self.show("cluster", self.name)
            self.dirty |= self._replicas_on.get(node, set())
            state = self.leases.state(node)
            if state in (NodeState.NODE_STATE_LOST, NodeState.NODE_STATE_READY) or node not in self.leases:
                self.pending.mark_capacity()
            self.changes.note_presence(node, state)

    def mark_dirty(self, replica: str) -> None:
        """Mark the replica for the next decision."""
        self.dirty.add(replica)

    def show(self, kind: str, name: str) -> None:
        """Record that the view of a node, replica, re-dispatch or plan changed."""
        self.pending.mark_view(kind, name)

    # --- Output and requests to nodes

    def mark_sendable(self, node: str) -> None:
        """Record that there are messages for the node."""
        self._sendable.add(node)

    def messages(self, now_s: float) -> dict[str, list[Response]]:
        """Return the messages to be sent now, by node id."""
        found = {}
        sendable, self._sendable = self._sendable, set()
        for node in sendable:
            link = self.links[node]
            if messages := link.messages(now_s):
                found[node] = messages
                for message in messages:
                    if message.WhichOneof("message") == "delta":
                        self.counters.deltas[message.delta.WhichOneof("change") or ""] += 1
            if link.has_more:
                self._waiting.add(node)
        return found

    def request_head_maps(self, replica: str) -> tuple[str, str]:
        """Request head maps; return node and request id. Raises NOT_FOUND, ENGINE_CANNOT or DEVICE_UNAVAILABLE."""
        if (found := self.replicas.get(replica)) is None:
            raise not_found(replica)
        node = found.primary_node
        if node not in self.links:
            raise not_connected(node)
        request_id = self.links[node].request_head_maps(replica)
        self._sendable.add(node)
        return node, request_id

    def say_goodbye(self, reason: str) -> None:
        for node, link in self.links.items():
            if link.session:
                link.say_goodbye(reason)
                self._sendable.add(node)

    # --- Consequences of stored writes

    def applied(self, writes: Writes, kept: WriteResult) -> None:
        """Take over what the store now contains, and schedule the messages that follow for the nodes."""
        for record in kept.nodes.values():
            self.take_node(record)
            self.forget_if_unneeded(last_part(record.name))  # the stream may have ended in the meantime
        for name in kept.unneeded_nodes:
            self.node_records.drop(name)
        for write in (one for one in writes.replicas if one.name not in kept.moved):
            self._take_replica(write, kept.replicas.get(write.name))
        for saving in writes.redispatches:
            self.changes.saved(saving)
        if kept.plan is not None:
            self.plan = kept.plan
            self.show("plan", kept.plan.name)

    def _take_replica(self, write: ReplicaWrite, record: ReplicaRecord | None) -> None:
        replica = self.replicas.get(write.name)
        if replica is None:
            return
        if record is None:
            self.drop_replica(write.name)
            return
        before, was = replica.assigned_generation, replica.state
        replica.renew(record, write.standing)
        if replica.state != was:
            self.decide_all = True  # other replicas may have waited for this
        if write.assigned_generation != before:
            self.assign(replica)
        elif replica.is_stopping:
            self.remove(replica)
            self.dirty.add(replica.name)
        self.show("replica", replica.name)

    def assign(self, replica: Replica, *, is_new: bool = True) -> None:
        """Send the replica's last assignment to its nodes; unless ``is_new``, an earlier planner made it."""
        peers = {node: self.ensure_link(node).engine_address for node in replica.nodes}
        plan = self.record.active_plan if self.record else ""
        for node, wanted in replica.assignments(peers, plan, is_new=is_new).items():
            self.links[node].slot(replica.name).want(wanted)
            self._sendable.add(node)

    def remove(self, replica: Replica) -> None:
        removal = WantedRemoval(reason="no plan contains the replica any more")
        for node in replica.nodes:
            self.ensure_link(node).slot(replica.name).want(removal)
            self._sendable.add(node)

    def drop_replica(self, name: str) -> None:
        """Drop a replica whose record was deleted."""
        replica = self.replicas.pop(name)
        self.unprepared.pop(name, None)
        self.changes.give_up(replica)
        for node in replica.nodes:
            self._replicas_on[node].discard(name)
            self.show("node", node_name(self.name, node))
            if (slot := self.slot(node, name)) is not None:
                if slot.held:
                    self._check_held(node, name)
                else:
                    self.links[node].forget(name)
        self.show("replica", name)
        self.dirty.discard(name)
        self.decide_all = True
        for node in replica.nodes:
            self.forget_if_unneeded(node)

    def forget_if_unneeded(self, node: str) -> None:
        """Forget a node unless it is needed: agents could fill memory and store with made-up nodes."""
        if self.is_needed(node):
            return
        self.links.pop(node, None)
        self.connect_time_s.pop(node, None)
        self._replicas_on.pop(node, None)
        self._sendable.discard(node)
        self._waiting.discard(node)
        self.leases.forget(node)
        self.node_records.forget(node)

    def is_needed(self, node: str) -> bool:
        """Whether the node is declared or connected, or a replica or a change depends on it."""
        return (
            node in self.leases
            or bool(self._replicas_on.get(node))
            or any(node in change.nodes for change in self.changes.under_way.values())
        )

    def note_progress(self, progress: plan_pb2.ActivationProgress) -> None:
        if self.plan is not None and progress != self.progress:
            self.progress = progress
            self.show("plan", self.plan.name)

    def decided(self) -> None:
        """Record that all changes so far are decided and about to be written."""
        self.dirty.clear()
        self.decide_all = False
        self.node_records.writes.clear()

    def take_back(self, writes: Writes) -> None:
        """Undo the effects of a write that failed, so that the next round decides everything again."""
        self.decide_all = True
        self.node_records.take_back(writes)
        self.changes.take_back(writes.redispatches)

    def end(self) -> None:
        """Record that the cluster is gone."""
        self.record = None

    # --- Internals

    def _add_replica(self, replica: Replica) -> None:
        self.replicas[replica.name] = replica
        self.unprepared[replica.name] = None
        for node in replica.nodes:
            self._replicas_on.setdefault(node, set()).add(replica.name)
            self.show("node", node_name(self.name, node))
            if self.slot(node, replica.name) is not None:
                self._check_held(node, replica.name)
        if replica.is_stopping:
            self.remove(replica)

    def _note_report(self, node: str, event: Reported, time_s: float) -> None:
        self.show("node", node_name(self.name, node))
        for report in event.replicas:
            replica = self.replicas.get(report.replica)
            if replica is None or node not in replica.nodes:
                self._check_held(node, report.replica)
                continue
            self.pending.report(node, report)
            self.changes.see_report(node, replica, report)
            if node == replica.primary_node:
                replica.take_report(report, time_s=time_s)
                self.show("replica", report.replica)
                if replica.is_draining:
                    self.dirty.add(report.replica)
        self.dirty.update(event.changed)

    def _note_answer(self, node: str, answer: DeltaAnswer, now_s: float) -> None:
        self.dirty.add(answer.replica)
        reason = None if answer.failure is None else answer.failure.reason
        if reason is not None:
            self.counters.nacks[name_of(Reason, reason)] += 1
        if answer.change_id:
            self.changes.answered(node, answer, now_s=now_s)
        elif answer.kind == "removal" and answer.replica not in self.replicas:
            link = self.links[node]
            if not link.slots[answer.replica].held:
                link.forget(answer.replica)
            self.decide_all = True  # other replicas may have waited for this
        elif answer.kind == "assignment" and reason == Reason.ERROR_REASON_GENERATION_MISMATCH:
            self._must_reassign(answer.replica)  # the node holds a later generation than it was given

    def _check_held(self, node: str, name: str) -> None:
        """Correct a node that holds another node's replica, or a later generation than it was ever sent."""
        replica = self.replicas.get(name)
        slot = self.links[node].reported_slot(name)
        if slot is None:
            return
        self._sendable.add(node)
        if slot.is_believed:
            slot.hold(slot.held)  # the replica may have been assigned to the node only now
        if replica is None or node not in replica.nodes:
            slot.want(WantedRemoval(reason="the replica is not assigned to this node"))
        elif slot.held > replica.generation:
            self._must_reassign(name)

    def _most_held(self, node: str, name: str) -> int | None:
        replica = self.replicas.get(name)
        return None if replica is None or node not in replica.nodes else replica.generation + ROOM

    def _must_reassign(self, name: str) -> None:
        if (replica := self.replicas.get(name)) is not None:
            replica.require_assignment()
            self.dirty.add(name)

    def _note_address(self, node: str, address: str, *, before: str) -> None:
        """Reassign replicas after a change of a node's address. ``before``: as in `Replica.has_old_address`."""
        for name in self._replicas_on.get(node, ()):
            replica, slot = self.replicas[name], self.slot(node, name)
            if replica.has_old_address(node, address, before=before):
                self._must_reassign(name)
            elif replica.can_be_sent_again and slot is not None and isinstance(slot.wanted, WantedAssignment):
                self.assign(replica, is_new=False)  # nodes that do not hold it yet receive it with the address

    def _write_node(self, node: str, found: inventory_pb2.NodeInventory | None) -> None:
        """Schedule a write of what the agent reported of its node; reports of undeclared nodes stay in memory only."""
        if found is not None:
            self.pending.mark_capacity()
        if not self.leases.is_declared(node) and not self._replicas_on.get(node):
            return
        self.node_records.report(node, self.links[node], found, connect_time_s=self.connect_time_s[node])
