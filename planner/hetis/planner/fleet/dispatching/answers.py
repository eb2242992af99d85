"""Results of dispatch as messages."""

from __future__ import annotations

from collections.abc import Sequence

from hetis.planner.convert.stages import owners_of
from hetis.planner.fleet.dispatching.admission import Home, Quality, Refusal
from hetis.planner.fleet.dispatching.replica import RunningRequest
from hetis.planner.fleet.dispatching.stage_copy import StageCopy
from hetis.solver.dispatch.result import Path, Resource
from hetis.v1 import dispatch_service_pb2

_PATHS = {
    Path.CHAIN: dispatch_service_pb2.DISPATCH_PATH_CHAIN,
    Path.MIXED: dispatch_service_pb2.DISPATCH_PATH_MIXED,
    Path.LP: dispatch_service_pb2.DISPATCH_PATH_LP,
    Path.MILP: dispatch_service_pb2.DISPATCH_PATH_MILP,
}
_RESOURCES = {
    Resource.KV_BLOCKS: dispatch_service_pb2.MISSING_RESOURCE_KV_BLOCKS,
    Resource.WHOLE_GROUPS: dispatch_service_pb2.MISSING_RESOURCE_WHOLE_GROUPS,
}


def placement_to_proto(
    request: str, running: RunningRequest | None, homes: Sequence[Home] | None
) -> dispatch_service_pb2.Placement:
    """Return where a request is, or where it would go."""
    if running is not None:
        owners = [(copy, copy.owners[request]) for copy in running.copies]
    else:
        owners = [(home.copy, owners_of(home.copy.terms.stage, home.groups)) for home in homes or ()]
    return dispatch_service_pb2.Placement(
        request=request, stages=[_stage_placement(copy, positions) for copy, positions in owners]
    )


def refusal_to_proto(request: str, refusal: Refusal) -> dispatch_service_pb2.Unplaced:
    return dispatch_service_pb2.Unplaced(
        request=request, stage=refusal.stage, resource=_RESOURCES[refusal.resource], missing=refusal.missing
    )


def quality_to_proto(quality: Quality) -> dispatch_service_pb2.StageQuality:
    return dispatch_service_pb2.StageQuality(
        stage=quality.stage,
        copy=quality.copy,
        makespan_s=quality.makespan_s,
        bound_s=quality.bound_s,
        path=_PATHS[quality.path],
    )


def _stage_placement(copy: StageCopy, owners: Sequence[int]) -> dispatch_service_pb2.StagePlacement:
    used = sorted(set(owners))
    position = {device: n for n, device in enumerate(used)}
    return dispatch_service_pb2.StagePlacement(
        stage=copy.stage,
        copy=copy.copy,
        devices=[copy.terms.stage.devices[device] for device in used],
        owners=[position[owner] for owner in owners],
    )
