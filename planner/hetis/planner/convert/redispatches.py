"""The solver's moves as a change of the API: with their head groups and their reasons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hetis.planner.convert.head_groups import leaving
from hetis.planner.convert.stages_in import StageTerms
from hetis.solver.redispatch.result import Move, MoveReason
from hetis.solver.redispatch.triggers import Trigger, TriggerKind
from hetis.v1 import head_map_pb2, redispatch_pb2

_REASONS = {
    MoveReason.BALANCE: head_map_pb2.MOVE_REASON_BALANCE,
    MoveReason.MEMORY: head_map_pb2.MOVE_REASON_MEMORY,
    MoveReason.DRAIN: head_map_pb2.MOVE_REASON_DRAIN,
    MoveReason.DETOUR: head_map_pb2.MOVE_REASON_DETOUR,
}
_KINDS = {
    TriggerKind.DEVIATION: redispatch_pb2.TRIGGER_KIND_DEVIATION,
    TriggerKind.HIGH_WATER: redispatch_pb2.TRIGGER_KIND_HIGH_WATER,
    TriggerKind.DRAINING: redispatch_pb2.TRIGGER_KIND_DRAINING,
    TriggerKind.LOST: redispatch_pb2.TRIGGER_KIND_LOST,
    TriggerKind.CHANGED: redispatch_pb2.TRIGGER_KIND_CHANGED,
}


def moves_to_proto(moves: Sequence[Move], head_map: head_map_pb2.HeadMap, terms: StageTerms) -> list[head_map_pb2.Move]:
    """Return the moves with individual head groups, which belong to the source in the head map; no group moves twice.

    Nothing of the requests that move may be moving already.
    """
    place = [terms.index[device.name] for device in head_map.devices]
    wanted = {move.request for move in moves}
    running = {request.id: request for request in head_map.requests if request.id in wanted}
    now = {name: [place[owner] for owner in request.owners] for name, request in running.items()}
    after = {name: list(owners) for name, owners in now.items()}
    messages = []
    for number, move in enumerate(moves):
        request = running[move.request]
        head_groups = leaving(
            terms.stage, now[move.request], after[move.request], move.source, move.target, move.groups
        )
        for group in head_groups:
            after[move.request][group] = move.target
        messages.append(
            head_map_pb2.Move(
                number=number,
                request=move.request,
                incarnation=request.incarnation,
                head_groups=head_groups,
                source=terms.stage.devices[move.source],
                target=terms.stage.devices[move.target],
                kv_bytes=move.num_bytes,
                reason=_REASONS[move.reason],
                together=move.together,
                copy_s=move.seconds,
                payback_steps=move.payback_steps,
            )
        )
    return messages


def triggers_to_proto(fired: Iterable[Trigger]) -> list[redispatch_pb2.RedispatchTrigger]:
    return [
        redispatch_pb2.RedispatchTrigger(
            kind=_KINDS[trigger.kind], device=trigger.device or "", value=trigger.value, limit=trigger.limit
        )
        for trigger in fired
    ]


def trigger_from_proto(message: redispatch_pb2.RedispatchTrigger) -> Trigger | None:
    """Return the same trigger, or None for a kind that a newer planner sends."""
    kind = next((ours for ours, theirs in _KINDS.items() if theirs == message.kind), None)
    if kind is None:
        return None
    return Trigger(kind=kind, device=message.device or None, value=message.value, limit=message.limit)
