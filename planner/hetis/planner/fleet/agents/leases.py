"""Presence of nodes: READY while messages arrive, SUSPECT when they are late, LOST when the lease has expired."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from hetis.planner.failures import Reason, ServiceError
from hetis.v1 import cluster_pb2

State = cluster_pb2.NodeState
MOST_UNDECLARED = 64  # connected nodes of a cluster that its document does not name


@dataclass(slots=True, kw_only=True)
class _Presence:
    state: State.ValueType
    declared: bool
    connected: bool = False
    heard_s: float | None = None  # when the last message arrived; None: never
    due_s: float | None = None  # when the state may change by time alone; other entries of the heap are void

    @property
    def is_present(self) -> bool:
        return self.declared or self.connected


_UNKNOWN = _Presence(state=State.NODE_STATE_UNSPECIFIED, declared=False)  # of every node that is not known


class Leases:
    """The presence of nodes by name. A message only records its time; `expire` finds the silent nodes.

    A node that was connected, and is neither declared nor connected any more, is absent: its lease still expires, after
    which it is LOST, until it is declared, connected or forgotten. Replicas on it must not be believed to serve.

    Args:
        suspect_s: silence after which a node is SUSPECT.
        lease_s: silence after which a node is LOST.
    """

    def __init__(self, *, suspect_s: float, lease_s: float) -> None:
        self._suspect_s = suspect_s
        self._lease_s = lease_s
        self._nodes: dict[str, _Presence] = {}
        self._due: list[tuple[float, str]] = []  # a heap of times at which nodes must be checked
        self.num_connected = 0  # nodes with a stream, whatever their state
        self._num_declared = self._num_absent = 0

    def __contains__(self, node: str) -> bool:
        """Return whether the node is declared or connected."""
        return self._nodes.get(node, _UNKNOWN).is_present

    @property
    def nodes(self) -> list[str]:
        """All nodes that are declared or connected."""
        return [node for node, found in self._nodes.items() if found.is_present]

    @property
    def num_undeclared(self) -> int:
        """The number of nodes with a stream that the cluster's document does not name."""
        return len(self._nodes) - self._num_declared - self._num_absent

    def require_room(self, node: str, *, cluster: str) -> None:
        """Raise TOO_MANY_STREAMS if the node is unknown, and too many such nodes are connected.

        Credentials are valid for any node of a cluster, even for made-up names.
        """
        if node in self or self.num_undeclared < MOST_UNDECLARED:
            return
        message = (
            f"{cluster} does not declare node {node}, and {MOST_UNDECLARED} undeclared nodes are connected"
            " already: declare it, or disconnect others"
        )
        raise ServiceError(Reason.ERROR_REASON_TOO_MANY_STREAMS, message, metadata={"max_streams": MOST_UNDECLARED})

    def is_declared(self, node: str) -> bool:
        return self._nodes.get(node, _UNKNOWN).declared

    def state(self, node: str) -> State.ValueType:
        return self._nodes.get(node, _UNKNOWN).state

    def heard_s(self, node: str) -> float | None:
        return self._nodes.get(node, _UNKNOWN).heard_s

    def is_connected(self, node: str) -> bool:
        return self._nodes.get(node, _UNKNOWN).connected

    def declare(self, nodes: Iterable[str], *, now_s: float, known: Iterable[str] = ()) -> list[str]:
        """Set the nodes that the cluster's document names, all of them; return those whose state changed.

        ``known`` are nodes that were connected under an earlier planner: they are not LOST before a lease, counted from
        now, has expired.
        """
        names, earlier = set(nodes), set(known)
        self._num_declared = len(names)
        changed = []
        for node, presence in list(self._nodes.items()):
            if node in names or not presence.is_present:
                continue
            presence.declared = False
            if not presence.connected:
                self._leave(node)
                changed.append(node)
            elif self._enter(node, State.NODE_STATE_UNDECLARED):
                changed.append(node)
        for node in names | earlier:
            before, is_declared = self._nodes.get(node), node in names
            if before is None:
                self._nodes[node] = _Presence(state=State.NODE_STATE_EXPECTED, declared=is_declared)
                self._num_absent += not is_declared
                if node in earlier:
                    self._nodes[node].state = State.NODE_STATE_SUSPECT
                    self._nodes[node].heard_s = now_s
                    self._look_at(node, now_s + self._lease_s)
                changed.append(node)
            elif is_declared and not before.declared:
                before.declared = True
                if before.connected:
                    self._enter(node, State.NODE_STATE_READY)
                else:  # SUSPECT or LOST
                    self._num_absent -= 1
                changed.append(node)
        return changed

    def forget(self, node: str) -> None:
        """Forget a node if it is absent: whether it is LOST is of no interest any more."""
        if node in self._nodes and node not in self:
            del self._nodes[node]
            self._num_absent -= 1

    def connect(self, node: str, *, now_s: float) -> bool:
        """Record that a stream began; return whether the state changed. An undeclared node becomes UNDECLARED."""
        presence = self._nodes.get(node)
        if presence is None:
            presence = self._nodes[node] = _Presence(state=State.NODE_STATE_UNSPECIFIED, declared=False)
        elif not presence.is_present:
            self._num_absent -= 1
        self.num_connected += not presence.connected
        presence.connected, presence.heard_s = True, now_s
        self._look_at(node, now_s + self._suspect_s)
        return self._enter(node, State.NODE_STATE_READY if presence.declared else State.NODE_STATE_UNDECLARED)

    def disconnect(self, node: str) -> bool:
        """Record that the stream ended; return whether the state changed. The lease keeps running."""
        presence = self._nodes.get(node, _UNKNOWN)
        if not presence.connected:
            return False
        presence.connected = False
        self.num_connected -= 1
        if not presence.declared:
            self._leave(node)
            return True
        assert presence.heard_s is not None
        self._look_at(node, presence.heard_s + self._lease_s)
        return presence.state == State.NODE_STATE_READY and self._enter(node, State.NODE_STATE_SUSPECT)

    def renew(self, node: str, *, now_s: float) -> bool:
        """Renew the lease after a message; return whether the state changed."""
        presence = self._nodes.get(node, _UNKNOWN)
        if not presence.connected:
            return False
        presence.heard_s = now_s
        if presence.state in (State.NODE_STATE_READY, State.NODE_STATE_UNDECLARED):
            return False
        self._look_at(node, now_s + self._suspect_s)
        return self._enter(node, State.NODE_STATE_READY if presence.declared else State.NODE_STATE_UNDECLARED)

    def expire(self, now_s: float) -> list[str]:
        """Return the nodes whose state changed because of their silence."""
        changed = []
        while self._due and self._due[0][0] <= now_s:
            due_s, node = heapq.heappop(self._due)
            presence = self._nodes.get(node, _UNKNOWN)
            if presence.due_s != due_s or presence.heard_s is None:
                continue
            if presence.connected and not presence.declared:  # UNDECLARED, however silent
                continue
            presence.due_s = None
            silent_s = now_s - presence.heard_s
            if silent_s >= self._lease_s:
                state = State.NODE_STATE_LOST
            elif silent_s >= self._suspect_s or not presence.connected:
                state = State.NODE_STATE_SUSPECT
                self._look_at(node, presence.heard_s + self._lease_s)
            else:
                state = State.NODE_STATE_READY
                self._look_at(node, presence.heard_s + self._suspect_s)
            if self._enter(node, state):
                changed.append(node)
        return changed

    def stood_still(self, gap_s: float, *, now_s: float) -> None:
        """Forgive ``gap_s`` of silence until ``now_s``, during which the planner was suspended."""
        self._due.clear()
        for node, presence in self._nodes.items():
            if presence.heard_s is not None:
                presence.heard_s = min(presence.heard_s + gap_s, now_s)
            if presence.due_s is not None:
                self._look_at(node, presence.due_s + gap_s)

    def _leave(self, node: str) -> None:
        """Let a node be absent, or forget it if it was never connected."""
        presence = self._nodes[node]
        if presence.heard_s is None:
            del self._nodes[node]
            return
        self._num_absent += 1
        if presence.state != State.NODE_STATE_LOST:
            presence.state = State.NODE_STATE_SUSPECT
            self._look_at(node, presence.heard_s + self._lease_s)

    def _look_at(self, node: str, due_s: float) -> None:
        self._nodes[node].due_s = due_s
        heapq.heappush(self._due, (due_s, node))

    def _enter(self, node: str, state: State.ValueType) -> bool:
        presence = self._nodes[node]
        before, presence.state = presence.state, state
        return before != state
