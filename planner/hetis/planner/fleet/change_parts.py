"""Which nodes take part in a change of heads, and in which roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hetis.planner.failures import invalid_field
from hetis.solver.cluster import node_of
from hetis.v1 import change_pb2, replica_pb2

ChangePart = change_pb2.ChangePart
Parts = Mapping[str, tuple[ChangePart.ValueType, ...]]


def parts_of(
    change: change_pb2.Change,
    shape: replica_pb2.ReplicaPlan,
    *,
    primary_node: str,
    moves_heads: Callable[[str], bool] = lambda node: True,
) -> Parts:
    """Return the parts of each node by node id, the authority's first.

    A node that does not move heads has no part itself: its attention workers belong to the primary's engine, which
    reserves, copies and frees there, so the primary's node has the part. Raises INVALID_FIELD if a move names a device
    that is not in the stage's copy.
    """
    gpus = gpus_of_copy(shape, change.stage, change.copy)
    found: dict[str, set[ChangePart.ValueType]] = {primary_node: {ChangePart.CHANGE_PART_AUTHORITY}}
    for move in change.moves:
        for device, part in (
            (move.source, ChangePart.CHANGE_PART_SOURCE),
            (move.target, ChangePart.CHANGE_PART_TARGET),
        ):
            if device not in gpus:
                raise invalid_field(f"change.moves[{move.number}]", f"{device} is not a device of the stage's copy")
            for node in map(node_of, gpus[device]):
                found.setdefault(node if moves_heads(node) else primary_node, set()).add(part)
    return {node: tuple(sorted(parts)) for node, parts in found.items()}


def gpus_of_copy(shape: replica_pb2.ReplicaPlan, stage: int, copy: int) -> dict[str, list[str]]:
    """Return the GPUs of every device of one copy of a stage, by the device's first GPU, the primary first."""
    if stage >= len(shape.stages) or copy >= shape.stages[stage].copies:
        raise invalid_field("change.stage", f"the replica has no copy {copy} of stage {stage}")
    one = shape.stages[stage]
    primary = list(one.devices[copy * one.tp : (copy + 1) * one.tp])
    gpus = {primary[0]: primary}
    for pool in shape.attention_workers:
        if pool.stage == stage:
            each = len(pool.devices) // one.copies
            gpus |= {device: [device] for device in pool.devices[copy * each : (copy + 1) * each]}
    return gpus
