"""A ledger of the physical place of head groups' KV on every node, which sees all engines and trusts none.

An engine that releases a change has freed the groups of which it was the source. One that aborts a change has freed
those of which it was the target. The map of the primary's engine names the device that serves a head group; that device
must still have it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hetis.v1.change_pb2 import Change, ChangePart, ChangePhase
from tests.protocol.engine_host import EngineHost

Phase = ChangePhase
Group = tuple[str, int, int]  # request, incarnation, head group
ENDED = (Phase.CHANGE_PHASE_FLIPPED, Phase.CHANGE_PHASE_RELEASED)


class BrokenError(AssertionError):
    """An invariant does not hold."""


@dataclass
class Ledger:
    """The ledger.

    Attributes:
        kv: KV of every worker's current engine.
        flipped: changes that an authority flipped, with the numbers of the moves that it left out.
        void: flipped and aborted changes whose authority's engine has died: nothing of its map is in force.
        aborted: changes that the authority aborted.
        failures: descriptions of broken invariants.
    """

    primary: str
    kv: dict[str, set[Group]] = field(default_factory=dict)
    flipped: dict[str, frozenset[int]] = field(default_factory=dict)
    void: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    _phases: dict[tuple[str, str, str], ChangePhase.ValueType] = field(default_factory=dict)
    _engines: dict[str, str] = field(default_factory=dict)
    _placed: set[tuple[str, int]] = field(default_factory=set)
    wounded: set[str] = field(default_factory=set)  # nodes whose engine died, until the primary knows it

    def look(self, hosts: dict[str, EngineHost]) -> None:
        for node, host in hosts.items():
            if self._engines.get(node) != host.engine.engine_id:
                if node in self._engines:
                    self._note_death(node)
                self._engines[node] = host.engine.engine_id
                self.kv[node] = set()
        # The authority first: the others only follow it.
        for node in sorted(hosts, key=lambda node: node != self.primary):
            for held in hosts[node].engine._held.values():
                for change in list(held.changes.known.values()):
                    self._look_at_change(node, hosts[node].engine.engine_id, change)
        self._look_at_map(hosts[self.primary])

    def check(self) -> None:
        if self.failures:
            raise BrokenError("; ".join(self.failures))

    def holes(self, hosts: dict[str, EngineHost], *, of_wounded: bool = False) -> list[str]:
        """Return the head groups whose owner lacks their KV; ``of_wounded``: also those whose engine died once."""
        found = []
        for held in hosts[self.primary].engine._held.values():
            if held.primary is None:
                continue
            for stage in held.primary.stages.values():
                for name, owners in stage.owners.items():
                    for group, owner in enumerate(owners):
                        node = stage.model.devices[owner].name.partition("/")[0]
                        key = (name, stage.requests[name].incarnation, group)
                        if node == self.primary or (node in self.wounded and not of_wounded):
                            continue
                        if key not in self.kv.get(node, set()):
                            found.append(f"{node} owns {key} and has no KV of it")
        return found

    def _note_death(self, node: str) -> None:
        if node == self.primary:
            self.void |= self.flipped.keys() | self.aborted
            self._placed.clear()
            for kv in self.kv.values():
                kv.clear()
        else:
            self.wounded.add(node)

    def _look_at_change(self, node: str, engine: str, change: object) -> None:
        body: Change = change.change  # type: ignore[attr-defined]
        key = (node, engine, body.change_id)
        before, now = self._phases.get(key, Phase.CHANGE_PHASE_UNSPECIFIED), change.phase  # type: ignore[attr-defined]
        if before == now:
            return
        self._phases[key] = now
        left_out = frozenset(change.left_out)  # type: ignore[attr-defined]
        parts = change.parts  # type: ignore[attr-defined]
        if (before in ENDED and now == Phase.CHANGE_PHASE_ABORTED) or before == Phase.CHANGE_PHASE_ABORTED:
            self._fail(f"{node}: {body.change_id} went from {Phase.Name(before)} to {Phase.Name(now)}")
        if ChangePart.CHANGE_PART_AUTHORITY in parts:
            if now in ENDED and before not in ENDED:
                self._note_flip(body, left_out)
            elif now == Phase.CHANGE_PHASE_ABORTED:
                self.aborted.add(body.change_id)
            return
        mine = {
            part: {
                (move.request, move.incarnation, group)
                for move in body.moves
                for group in move.head_groups
                if getattr(move, part).startswith(f"{node}/") and move.number not in left_out
            }
            for part in ("source", "target")
        }
        if now == Phase.CHANGE_PHASE_READY:
            self.kv[node] |= mine["target"]
        elif now in ENDED and before not in ENDED:
            if body.change_id not in self.flipped:
                self._fail(f"{node} takes {body.change_id} to be flipped, and nobody flipped it")
            self.kv[node] -= mine["source"]
        elif now == Phase.CHANGE_PHASE_ABORTED and parts:
            if body.change_id in self.flipped and body.change_id not in self.void:
                self._fail(f"{node} gave up {body.change_id}, which was flipped")
            self.kv[node] -= mine["target"]

    def _note_flip(self, body: Change, left_out: frozenset[int]) -> None:
        if body.change_id in self.aborted:
            self._fail(f"{body.change_id} was flipped after it was aborted")
        self.flipped[body.change_id] = left_out
        for move in body.moves:
            node = move.target.partition("/")[0]
            groups = {(move.request, move.incarnation, group) for group in move.head_groups}
            if move.number in left_out or node == self.primary or node in self.wounded:
                continue
            if not groups <= self.kv[node]:
                self._fail(f"{body.change_id} was flipped to {node}, which has no copy")

    def _look_at_map(self, host: EngineHost) -> None:
        for held in host.engine._held.values():
            if held.primary is None:
                continue
            held.primary.check()
            for stage in held.primary.stages.values():
                for name, owners in stage.owners.items():
                    incarnation = stage.requests[name].incarnation
                    is_new = (name, incarnation) not in self._placed
                    self._placed.add((name, incarnation))
                    for group, owner in enumerate(owners):
                        node = stage.model.devices[owner].name.partition("/")[0]
                        if node == self.primary:
                            continue
                        key = (name, incarnation, group)
                        if is_new:
                            self.kv[node].add(key)
                        elif key not in self.kv[node] and node not in self.wounded:
                            self._fail(f"{node} owns {key} and has freed it")

    def _fail(self, what: str) -> None:
        if what not in self.failures:
            self.failures.append(what)
