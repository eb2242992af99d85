"""What a plan says attention costs on its devices: the fitted profiles and the network it was made with."""

from __future__ import annotations

from collections.abc import Mapping

from hetis.formats.documents import from_data
from hetis.runtime.measured.coefficients import Coefficients
from hetis.solver.check.fleet import Fleet, slowest
from hetis.solver.cluster import Cluster, Link
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import AttentionWorkerPool, Plan, StagePlan
from hetis.solver.profile import Op, Profile


def planned_coefficients(plan: Plan, replica: int) -> Mapping[str, Coefficients]:
    """Of every device of a replica, by name; empty where the plan does not hold the documents it was made from.

    The first device of a stage's tensor-parallel group stands for the group, as in the plan's layout.

    Raises:
        DocumentError: a document in the plan is not usable.
    """
    documents = plan.inputs.get("documents")
    if not isinstance(documents, Mapping) or not {"cluster", "model", "profiles"} <= documents.keys():
        return {}
    cluster = from_data(documents["cluster"], name="inputs.documents.cluster")
    model = from_data(documents["model"], name="inputs.documents.model")
    if not isinstance(cluster, Cluster) or not isinstance(model, ModelSpec):
        return {}
    profiles = {
        gpu: profile
        for gpu, data in documents["profiles"].items()
        if isinstance(profile := from_data(data, name=f"inputs.documents.profiles.{gpu}"), Profile)
    }
    fleet, found = Fleet.of(cluster), dict[str, Coefficients]()
    one = plan.replicas[replica]
    for number, stage in enumerate(one.stages):
        own = _attention(profiles, stage.gpu, model, stage.tp)
        found |= dict.fromkeys(stage.devices, own) if own else {}
        for pool in one.attention_workers:
            if pool.stage == number:
                found |= _workers(profiles, model, pool, _link(fleet, stage, pool))
    return found


def _workers(
    profiles: Mapping[str, Profile], model: ModelSpec, pool: AttentionWorkerPool, link: Link
) -> dict[str, Coefficients]:
    attention, profile = _attention(profiles, pool.gpu, model, 1), profiles.get(pool.gpu)
    fit = profile.fit(Op.TRANSFER, model, 1) if profile else None
    if attention is None or fit is None:
        return {}
    costs = Coefficients(
        pieces=attention.pieces,
        transfer_byte_s=max(piece.byte_s + piece.wire / link.bytes_per_s for piece in fit.pieces),
        transfer_s=max(piece.fixed_s for piece in fit.pieces) + 2.0 * link.latency_s,
    )
    return dict.fromkeys(pool.devices, costs)


def _attention(profiles: Mapping[str, Profile], gpu: str, model: ModelSpec, tp: int) -> Coefficients | None:
    """FLOPs grow with the KV that is read, so that they count per byte."""
    profile = profiles.get(gpu)
    fit = profile.fit(Op.DECODE_ATTENTION, model, tp) if profile else None
    if fit is None:
        return None
    flops_per_byte = model.decode_attention_flops(1.0, model.queries_per_group) / model.kv_bytes_per_token_group()
    # Where cards outnumber head groups, the query heads of a group are shared by the cards that hold it.
    flops_per_byte /= max(1, tp // model.head_groups)
    return Coefficients(pieces=tuple((p.head_s, p.byte_s + p.flop_s * flops_per_byte, p.fixed_s) for p in fit.pieces))


def _link(fleet: Fleet, stage: StagePlan, pool: AttentionWorkerPool) -> Link:
    """The slowest of what lies between a stage and its attention workers."""
    devices = (*stage.devices, *pool.devices)
    unknown = [name for name in devices if name not in fleet.devices]
    if unknown:
        raise InvalidProblemError(f"the plan has devices that its cluster lacks: {', '.join(unknown)}")
    zones = fleet.zones_of(stage.devices)
    return slowest(
        [
            *fleet.nic_links(devices),
            *(fleet.cluster.network.zone_link(zone, zone) for zone in zones),
            *fleet.node_links(stage.devices, pool.devices),
        ]
    )
