"""An assignment and the engine that is to run it: what has to agree, and which device is which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.heads import StageHeads
from hetis.runtime.executor.refusals import refusal
from hetis.solver.dispatch.snapshot import DeviceStatus as OwnStatus
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.replica_pb2 import Assignment, ReplicaRole
from hetis.v1.report_pb2 import DeviceStatus
from hetis.v1.stage_pb2 import StageModel

STATUS = {
    OwnStatus.OK: DeviceStatus.DEVICE_STATUS_OK,
    OwnStatus.DRAINING: DeviceStatus.DEVICE_STATUS_DRAINING,
    OwnStatus.LOST: DeviceStatus.DEVICE_STATUS_LOST,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBinding:
    """A copy of a stage of an assignment in this engine.

    Attributes:
        part: the engine's.
        model: as the planner knows it.
        index: the place of each of its devices in the stage, by name: that of the primary is all of its ranks'.
    """

    part: StageHeads
    model: StageModel
    index: Mapping[str, int]

    def name(self, device: int) -> str:
        """What the planner calls the device that the engine has by that number."""
        place = self.part.placement.group.place(device)
        return next(name for name, index in self.index.items() if index == place)

    def status(self, place: int) -> OwnStatus:
        """That of all the ranks of the primary is the first that is not ok."""
        return self.part.placement.group.status(self.part.placement.state.devices, place)

    def blocks(self, place: int) -> tuple[int, int]:
        """In all, and in use."""
        state, devices = self.part.placement.state, self.part.placement.group.devices(place)
        free = state.free_blocks()
        total = sum(state.devices[device].total_blocks for device in devices)
        return total, total - sum(int(free[device]) for device in devices)

    def room(self, place: int) -> int:
        """Blocks that are free for heads which come together: of the primary, what the fullest rank has on each."""
        free, group = self.part.placement.state.free_blocks(), self.part.placement.group
        return min(int(free[device]) for device in group.devices(place)) * group.unit(place)


def bind(assignment: Assignment, engine: Engine) -> tuple[StageBinding, ...]:
    """The stages of an assignment, copy by copy, as the engine has them.

    Raises:
        RefusedError: ENGINE_CANNOT, with all the reasons: an engine runs what it was started for.
    """
    reasons = list(_differences(assignment, engine))
    if reasons:
        raise refusal(ErrorReason.ERROR_REASON_ENGINE_CANNOT, "; ".join(reasons))
    return tuple(
        StageBinding(
            part=part,
            model=model,
            index={name: place for place, name in enumerate(_names(part))},
        )
        for part, model in zip(engine.stages, _in_order(assignment), strict=True)
    )


def _in_order(assignment: Assignment) -> list[StageModel]:
    """As the engine has them: copies of a stage follow one another."""
    return sorted(assignment.stages, key=lambda model: (model.stage, model.copy))


def _differences(assignment: Assignment, engine: Engine) -> Iterator[str]:
    if assignment.shape.role not in (ReplicaRole.REPLICA_ROLE_UNSPECIFIED, ReplicaRole.REPLICA_ROLE_UNIFIED):
        role = ReplicaRole.Name(assignment.shape.role).removeprefix("REPLICA_ROLE_").lower()
        yield f"the replica's role is {role}, this engine runs unified ones"
    elif len(assignment.stages) != len(engine.stages):
        yield f"the assignment has {len(assignment.stages)} stages with their copies, this engine {len(engine.stages)}"
    else:
        several = len(engine.stages) > 1
        for part, model in zip(engine.stages, _in_order(assignment), strict=True):
            where = f"stage {model.stage}, copy {model.copy}: " if several else ""
            yield from (where + what for what in _stage_differences(part, model))


def _stage_differences(part: StageHeads, model: StageModel) -> Iterator[str]:
    heads, shape = part.placement.costs.heads, part.stage.shape
    for what, planned, here in (
        ("layers", model.num_layers, shape.layers),
        ("head groups", model.heads.head_groups, heads.head_groups),
        ("query heads per group", model.heads.queries_per_group, heads.queries_per_group),
        ("tokens per KV block (--page-tokens)", model.heads.block_tokens, heads.block_tokens),
    ):
        if planned != here:
            yield f"the plan counts on {planned} {what}, this engine has {here}"
    planned_names, own = [device.name for device in model.devices], _names(part)
    if sorted(planned_names) != sorted(own):
        yield f"the plan's devices are {', '.join(planned_names)}, this engine's {', '.join(own)}"
    elif planned_names[0] != own[0]:
        yield f"the plan's primary is {planned_names[0]}, this engine's {own[0]}"
    elif (cards := max(len(model.devices[0].gpus), 1)) != part.stage.num_ranks:
        yield f"the plan's primary {own[0]} has {cards} cards, this engine's {part.stage.num_ranks}"


def _names(part: StageHeads) -> list[str]:
    """Of the devices, as the planner counts them: the primary by its first rank."""
    group = part.placement.group
    return [part.stage.devices[group.devices(place)[0]].name for place in range(group.num_places)]
