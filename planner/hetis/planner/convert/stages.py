"""The stages of a plan's replica as messages for the dispatcher of its primary."""

from __future__ import annotations

from collections.abc import Sequence

from hetis.planner.use_cases.sources import PlanAndProblem
from hetis.planner.use_cases.stage_of_plan import state_of_stage
from hetis.planner.use_cases.stage_sources import LoadedStage, with_costs
from hetis.solver.dispatch.problem import HeadShape
from hetis.solver.plan import Role
from hetis.v1 import stage_pb2


def stages_of_replica(found: PlanAndProblem, replica: int) -> list[stage_pb2.StageModel]:
    """Return one model per copy of each stage, in order. ``replica`` is its index in the plan.

    A prefill replica has none: it decodes nothing, so nothing is dispatched. KV blocks are those of the whole device:
    all micro-batches in flight share them. Slow: not for an event loop.

    Raises:
        InvalidProblemError: the plan contradicts its inputs.
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
    return messages


def _stage(
    loaded: LoadedStage, position: int, copy: int, gpus: Sequence[Sequence[str]], micro_batches: int
) -> stage_pb2.StageModel:
    """Return one copy's model with ``gpus`` for its devices, in the order of the loaded stage, the first copy."""
    costs, saved = loaded.snapshot.stage, loaded.saved
    moving_s = saved.move_byte_s()
    message = stage_pb2.StageModel(stage=position, copy=copy, num_layers=saved.num_layers, heads=_heads(costs.heads))
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
        pieces = list(
            dict.fromkeys(
                (float(a), float(b), float(c))
                for a, b, c in zip(costs.head_s[i], costs.kv_byte_s[i], costs.call_s[i], strict=True)
            )
        )
        for head_s, kv_byte_s, call_s in pieces:
            device.pieces.add(head_s=head_s, kv_byte_s=kv_byte_s, call_s=call_s)
    return message


def _heads(heads: HeadShape) -> stage_pb2.HeadShape:
    return stage_pb2.HeadShape(
        head_groups=heads.head_groups,
        queries_per_group=heads.queries_per_group,
        kv_bytes_per_token=heads.kv_bytes_per_token,
        exchange_bytes_per_head=heads.exchange_bytes_per_head,
        block_tokens=heads.block_tokens,
    )
