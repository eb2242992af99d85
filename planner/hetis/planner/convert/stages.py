"""The copies of a replica's stages as the API and the solver represent them: costs, head maps, moves of head groups."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import ge
from types import MappingProxyType

import numpy as np

from hetis.formats.dispatch.saved_state import piece_costs
from hetis.planner.convert.plans import message_of, value_from
from hetis.planner.use_cases.dispatch.stages import CostedStage, state_of_stage, with_costs
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.solver.dispatch.dispatch_problem import FloatArray, HeadShape, IntArray, Primary, Stage
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, PreparedMove, StateSnapshot
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Role
from hetis.solver.redispatch.redispatch_problem import Move, MoveReason
from hetis.solver.redispatch.triggers import Trigger, TriggerKind
from hetis.v1 import head_map_pb2, redispatch_pb2, report_pb2, stage_pb2

HIGH_WATER = 0.9  # used if StageDevice.high_water is 0
_HEADS = [field.name for field in fields(HeadShape)]  # also the names of the message's fields
Conditions = Mapping[str, report_pb2.DeviceStatus.ValueType]  # by GPU, as `node/index`; GPUs that are not listed are OK
_NO_CONDITIONS: Conditions = MappingProxyType({})
_NOT_SLOW: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTerms:
    """The data about one copy of one stage that dispatch and re-dispatch need; ``stage`` is part of a problem."""

    stage: Stage  # devices and the costs of attention on them
    num_layers: int  # a head group has KV in all of them, and moves with all of it
    link_byte_s: FloatArray  # seconds per byte of KV moved into or out of each device, shape [D]
    high_water: tuple[float, ...]  # share of each device's KV blocks above which head groups should leave
    gpus: tuple[tuple[str, ...], ...]  # GPUs of each device, as ``node/index``
    index: Mapping[str, int]  # positions of the devices by name

    def statuses(self, conditions: Conditions) -> tuple[report_pb2.DeviceStatus.ValueType, ...]:
        """Return the worst known status among the GPUs of each device.

        ``conditions`` are by GPU; a GPU that is missing there is OK.
        """
        ok = report_pb2.DEVICE_STATUS_OK
        return tuple(max((conditions.get(gpu, ok) for gpu in gpus), default=ok) for gpus in self.gpus)


def stage_from_proto(message: stage_pb2.StageModel, *, slowness: Mapping[str, float] = _NOT_SLOW) -> StageTerms:
    """Return a stage of the API as the solver's value.

    Args:
        slowness: ratio of measured to predicted times by device name; 1 if missing. All terms are scaled, including the
            exchange, which is part of the measured times.

    Raises:
        InvalidProblemError: the stage contradicts itself.
    """
    if not message.devices:
        raise InvalidProblemError("a stage needs at least one device")
    if missing := [device.name for device in message.devices if not device.pieces]:
        raise InvalidProblemError(f"{missing[0]}: a device needs at least one piece")
    primaries = [i for i, device in enumerate(message.devices) if device.is_primary]
    if len(primaries) > 1:
        raise InvalidProblemError(f"{len(primaries)} devices are marked as primary, at most one is allowed")
    factor = np.array([slowness.get(device.name, 1.0) for device in message.devices])
    costs = piece_costs([device.pieces for device in message.devices])
    names = tuple(device.name for device in message.devices)
    return StageTerms(
        stage=Stage(
            heads=HeadShape(**{name: getattr(message.heads, name) for name in _HEADS}),
            devices=names,
            **{name: times * factor[:, None] for name, times in costs.items()},
            transfer_byte_s=np.array([device.transfer_byte_s for device in message.devices]) * factor,
            transfer_s=np.array([device.transfer_s for device in message.devices]) * factor,
            primary=None
            if not primaries
            else Primary(
                device=primaries[0],
                tp=len(message.devices[primaries[0]].gpus) or 1,
                nic_byte_s=message.nic_byte_s,
                nic_s=message.nic_s,
            ),
        ),
        num_layers=message.num_layers,
        link_byte_s=np.array([device.link_byte_s for device in message.devices]),
        high_water=tuple(device.high_water or HIGH_WATER for device in message.devices),
        gpus=tuple(tuple(device.gpus) for device in message.devices),
        index={name: i for i, name in enumerate(names)},
    )


def stages_of_replica(found: PlanAndProblem, replica: int) -> list[stage_pb2.StageModel]:
    """Return a model for every copy of each stage, in order. ``replica`` is an index in the plan.

    A prefill replica has none: it decodes nothing, so nothing is dispatched. The stages of an engine have one head map,
    and so one model (`merged`). KV blocks are those of the whole device: all micro-batches in flight share them. Slow,
    so not for an event loop. Raises InvalidProblemError if the plan contradicts its inputs.
    """
    one = found.plan.replicas[replica]
    if one.role is Role.PREFILL:
        return []
    messages = []
    for position, stage in enumerate(one.stages):
        loaded = with_costs(state_of_stage(found, replica, position), f"replica {replica}", {})
        micro_batches = -(-one.in_flight // stage.copies)
        pools = [pool for pool in one.attention_workers if pool.stage == position]
        for copy in range(stage.copies):
            gpus = [stage.devices[copy * stage.tp : (copy + 1) * stage.tp]]
            for pool in pools:
                each = len(pool.devices) // stage.copies
                gpus += [(device,) for device in pool.devices[copy * each : (copy + 1) * each]]
            messages.append(_stage(loaded, position, copy, gpus, micro_batches))
    return messages if found.problem.family.engine is None or len(one.stages) == 1 else [merged(messages)]


def merged(stages: Sequence[stage_pb2.StageModel]) -> stage_pb2.StageModel:
    """Return one model for the stages of a pipeline whose requests keep a head group on the same device of every stage.

    Device i stands for the i-th devices of all stages, and has the fewest of their blocks. With L_s of L layers, stage
    s takes L_s t_si per token batch, so device i takes max over s of (L_s / L) t_si for each of the L layers: the
    pieces of all stages, scaled, with exchanges folded in. The makespan of the model times L is then the time of the
    slowest stage, which sets the pace of the pipeline. Its network card is bounded by the largest of its scaled terms.
    The primary lists the cards of its first stage alone, because their number is that of the ranks that share heads.
    """
    total = sum(stage.num_layers for stage in stages)
    found = stage_pb2.StageModel(num_layers=total, heads=stages[0].heads)
    shares = [stage.num_layers / total for stage in stages]
    found.nic_byte_s = max(share * stage.nic_byte_s for share, stage in zip(shares, stages, strict=True))
    found.nic_s = max(share * stage.nic_s for share, stage in zip(shares, stages, strict=True))
    exchange_bytes = stages[0].heads.exchange_bytes_per_head
    for same in zip(*(stage.devices for stage in stages), strict=True):
        first = same[0]
        gpus = first.gpus if first.is_primary else dict.fromkeys(gpu for device in same for gpu in device.gpus)
        pieces = [
            (
                share * (piece.head_s + device.transfer_byte_s * exchange_bytes),
                share * piece.kv_byte_s,
                share * (piece.call_s + device.transfer_s),
            )
            for share, device in zip(shares, same, strict=True)
            for piece in device.pieces
        ]
        found.devices.add(
            name=first.name,
            gpus=gpus,
            is_primary=first.is_primary,
            pieces=[
                stage_pb2.AttentionPiece(head_s=head_s, kv_byte_s=kv_byte_s, call_s=call_s)
                for head_s, kv_byte_s, call_s in _undominated(pieces)
            ],
            link_byte_s=max(share * device.link_byte_s for share, device in zip(shares, same, strict=True)),
            high_water=min(device.high_water or HIGH_WATER for device in same),
            total_blocks=min(device.total_blocks for device in same),
        )
    return found


def _undominated(pieces: Iterable[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Return the affine pieces that no other exceeds in every coefficient: only they can be the slowest."""
    every = list(dict.fromkeys(pieces))
    return [one for one in every if not any(o != one and all(map(ge, o, one)) for o in every)]


def _stage(
    loaded: CostedStage, position: int, copy: int, gpus: Sequence[Sequence[str]], micro_batches: int
) -> stage_pb2.StageModel:
    """Return the model of one copy, whose devices are ``gpus`` in the order of the loaded stage, the first copy."""
    costs, saved = loaded.snapshot.stage, loaded.saved
    moving_s = saved.move_byte_s()
    heads = stage_pb2.HeadShape(**asdict(costs.heads))
    message = stage_pb2.StageModel(stage=position, copy=copy, num_layers=saved.num_layers, heads=heads)
    if costs.primary is not None:
        message.nic_byte_s, message.nic_s = costs.primary.nic_byte_s, costs.primary.nic_s
    for i, own in enumerate(gpus):
        device = message.devices.add(
            name=own[0],
            gpus=own,
            is_primary=costs.has_primary_at(i),
            transfer_byte_s=float(costs.transfer_byte_s[i]),
            transfer_s=float(costs.transfer_s[i]),
            link_byte_s=float(moving_s[i]),
            high_water=saved.devices[i].high_water,
            total_blocks=saved.devices[i].total_blocks * micro_batches,
        )
        pieces = zip(costs.head_s[i].tolist(), costs.kv_byte_s[i].tolist(), costs.call_s[i].tolist(), strict=True)
        for head_s, kv_byte_s, call_s in dict.fromkeys(pieces):
            device.pieces.add(head_s=head_s, kv_byte_s=kv_byte_s, call_s=call_s)
    return message


def leaving(stage: Stage, owners: Sequence[int], after: Sequence[int], source: int, target: int, num: int) -> list[int]:
    """Return ``num`` head groups that move from ``source`` to ``target``, in increasing order.

    Earlier moves lead from ``owners`` to ``after``; the groups that they move are not moved again. Groups that leave or
    reach the primary keep its cards as even as the source's groups allow. If the source has too few, all are returned.
    """
    held = [group for group, owner in enumerate(owners) if owner == source == after[group]]
    cards, there = card_of(stage), dict[int, int]()
    if stage.primary is not None and stage.primary.device in (source, target):
        primary, sign = stage.primary.device, -1 if source == stage.primary.device else 1
        for group, owner in enumerate(after):
            there[cards[group]] = there.get(cards[group], 0) + sign * (owner == primary)
    return sorted(evenly(held, num, cards, there))


def card_of(stage: Stage) -> list[int]:
    """Return, for every head group, the primary's card that computes it; the first one if there are several."""
    num = stage.heads.head_groups
    share = num // stage.primary_groups
    return [group // share for group in range(num)]


def evenly(groups: Iterable[int], num: int, cards: Sequence[int], there: Mapping[int, int]) -> list[int]:
    """Return up to ``num`` groups, each from the card with the fewest so far, counting those already ``there``."""
    by_card: dict[int, list[int]] = {}
    for group in groups:
        by_card.setdefault(cards[group], []).append(group)
    counts, found = {card: there.get(card, 0) for card in by_card}, list[int]()
    while len(found) < num and by_card:
        card = min(by_card, key=lambda one: (counts[one], one))
        found.append(by_card[card].pop(0))
        counts[card] += 1
        if not by_card[card]:
            del by_card[card]
    return found


_FROM_STATUS = {report_pb2.DeviceStatus.Value(f"DEVICE_STATUS_{status.name}"): status for status in DeviceStatus}
_FROM_BEST = (DeviceStatus.OK, DeviceStatus.DRAINING, DeviceStatus.LOST)


def status_from_proto(status: report_pb2.DeviceStatus.ValueType) -> DeviceStatus:
    """Return the status; unknown and unspecified ones count as OK."""
    return _FROM_STATUS.get(status, DeviceStatus.OK)


def snapshot_from_proto(
    message: head_map_pb2.HeadMap,
    terms: StageTerms,
    *,
    conditions: Conditions = _NO_CONDITIONS,
    high_water: float | None = None,
    changed: Collection[str] = (),
) -> StateSnapshot:
    """Return the content of a head map as the solver's value.

    Requests with head groups on a lost device are left out, since they will be prefilled again; blocks that they still
    hold elsewhere are deducted from those devices. Devices of the stage that the map does not name have no blocks.

    Args:
        conditions: the planner's status of devices, by GPU; the worse of this and the map's status applies.
        high_water: of all devices; None: those of the stage.
        changed: devices that re-dispatch should look at, whatever they hold.

    Raises:
        InvalidProblemError: the map contradicts itself or the stage.
    """
    names = terms.stage.devices
    totals, place = [0] * len(names), list[int]()
    statuses = [status_from_proto(status) for status in terms.statuses(conditions)]
    for device in message.devices:
        i = terms.index.get(device.name)
        if i is None:
            raise InvalidProblemError(f"{device.name} is not a device of the stage, which has {', '.join(names)}")
        place.append(i)
        totals[i] = device.total_blocks
        statuses[i] = max(statuses[i], status_from_proto(device.status), key=_FROM_BEST.index)
    lost = [i for i, status in enumerate(statuses) if status is DeviceStatus.LOST]
    groups = _groups(message, terms, place)
    gone = groups[:, lost].sum(axis=1) > 0
    block_tokens = terms.stage.heads.block_tokens
    for j in np.flatnonzero(gone):
        blocks = -(-message.requests[j].context_tokens // block_tokens)
        totals = [max(0, total - blocks * int(n)) for total, n in zip(totals, groups[j], strict=True)]
    kept = [request for request, is_gone in zip(message.requests, gone, strict=True) if not is_gone]
    return StateSnapshot(
        stage=terms.stage,
        devices=tuple(
            DeviceSnapshot(
                name=name, total_blocks=total, status=status, high_water=high_water or own, changed=name in changed
            )
            for name, total, status, own in zip(names, totals, statuses, terms.high_water, strict=True)
        ),
        ids=tuple(request.id for request in kept),
        context_tokens=np.array([request.context_tokens for request in kept], np.int64),
        remaining_tokens=np.array([request.remaining_tokens for request in kept], np.int64),
        groups=groups[~gone],
        moves=_moves(message, terms, {request.id for request in kept}),
    )


def _groups(message: head_map_pb2.HeadMap, terms: StageTerms, place: list[int]) -> IntArray:
    """Return the number of head groups of each request on each device, shape [N, D]."""
    num, head_groups = terms.stage.num_devices, terms.stage.heads.head_groups
    groups = np.zeros((len(message.requests), num), np.int64)
    for j, request in enumerate(message.requests):
        owners = request.owners
        if len(owners) != head_groups or max(owners) >= len(place):
            raise InvalidProblemError(
                f"request {request.id} has owners {list(owners)}, must be {head_groups} positions in a list of "
                f"{len(place)} devices"
            )
        for owner in owners:
            groups[j, place[owner]] += 1
    return groups


def _moves(message: head_map_pb2.HeadMap, terms: StageTerms, kept: set[str]) -> tuple[PreparedMove, ...]:
    under_way = [one.move for one in message.moves if one.move.request in kept]
    for move in under_way:
        for name in (move.source, move.target):
            if name not in terms.index:
                raise InvalidProblemError(
                    f"{name}, to or from which {move.request} moves, is not a device of the stage"
                )
    return tuple(
        PreparedMove(
            number=number,
            request=move.request,
            groups=len(move.head_groups),
            source=terms.index[move.source],
            target=terms.index[move.target],
        )
        for number, move in enumerate(under_way)
    )


_REASONS = {reason: head_map_pb2.MoveReason.Value(f"MOVE_REASON_{reason.name}") for reason in MoveReason}
_TRIGGERS = {kind: redispatch_pb2.TriggerKind.Value(f"TRIGGER_KIND_{kind.name}") for kind in TriggerKind}


def reason_to_proto(reason: MoveReason) -> head_map_pb2.MoveReason.ValueType:
    return _REASONS[reason]


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
            message_of(
                head_map_pb2.Move,
                move,
                number=number,
                incarnation=request.incarnation,
                head_groups=head_groups,
                source=terms.stage.devices[move.source],
                target=terms.stage.devices[move.target],
                kv_bytes=move.num_bytes,
                reason=_REASONS[move.reason],
                copy_s=move.seconds,
            )
        )
    return messages


def triggers_to_proto(fired: Iterable[Trigger]) -> list[redispatch_pb2.RedispatchTrigger]:
    return [
        message_of(redispatch_pb2.RedispatchTrigger, one, kind=_TRIGGERS[one.kind], device=one.device or "")
        for one in fired
    ]


def trigger_from_proto(message: redispatch_pb2.RedispatchTrigger) -> Trigger | None:
    """Return the same trigger, or None for a kind that a newer planner sends."""
    kind = next((ours for ours, theirs in _TRIGGERS.items() if theirs == message.kind), None)
    return None if kind is None else value_from(Trigger, message, kind=kind, device=message.device or None)
