"""A planner made of dictionaries on loopback, which keeps the guarantees that clients rely on and fails on demand.

It handles etags, request ids and pages by the contract, solves nothing, and activates at once. A test puts the
searches that it needs into ``searches``.
"""

# ruff: noqa: N802  # methods are named as in the contract
from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from hetis.v1 import (
    cluster_pb2,
    cluster_service_pb2,
    cluster_service_pb2_grpc,
    plan_pb2,
    plan_service_pb2,
    plan_service_pb2_grpc,
    profile_pb2,
    profile_service_pb2,
    profile_service_pb2_grpc,
    redispatch_pb2,
    replica_pb2,
    traffic_pb2,
)

Fail = Callable[[str, grpc.ServicerContext], None]


def refuse(
    context: grpc.ServicerContext,
    code: int,
    reason: str,
    message: str,
    *,
    metadata: dict[str, str] | None = None,
    violations: tuple[tuple[str, str], ...] = (),
    retry_after_s: float | None = None,
) -> None:
    """End the call with a status and its details, as the contract defines."""
    details: list[Message] = [error_details_pb2.ErrorInfo(domain="hetis", reason=reason, metadata=metadata or {})]
    if violations:
        wrong = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in violations]
        details.append(error_details_pb2.BadRequest(field_violations=wrong))
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        one = any_pb2.Any()
        one.Pack(detail)
        packed.append(one)
    context.abort_with_status(rpc_status.to_status(status_pb2.Status(code=code, message=message, details=packed)))


class FakePlanner(
    cluster_service_pb2_grpc.ClusterServiceServicer,
    plan_service_pb2_grpc.PlanServiceServicer,
    profile_service_pb2_grpc.ProfileServiceServicer,
):
    """The fake planner. Everything is public, so that tests can set its contents."""

    def __init__(self) -> None:
        self.address = ""
        self.clusters: dict[str, cluster_pb2.Cluster] = {}
        self.nodes: dict[str, cluster_pb2.Node] = {}
        self.replicas: dict[str, replica_pb2.Replica] = {}
        self.redispatches: dict[str, redispatch_pb2.Redispatch] = {}
        self.profiles: dict[str, profile_pb2.Profile] = {}
        self.plans: dict[str, plan_pb2.Plan] = {}
        self.traffic = traffic_pb2.ClusterTraffic()
        self.differences: list[cluster_pb2.InventoryDifference] = []
        self.documents: dict[str, bytes] = {}
        self.events: list[cluster_service_pb2.WatchClusterResponse] = []
        # States that a new plan goes through in its watch, each with the seconds before it. The last one stays.
        self.searches: list[tuple[float, plan_pb2.Plan]] = []
        self.calls: Counter[str] = Counter()
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.time_left_s: list[float | None] = []
        self.fail: Fail = lambda method, context: None

    def _called(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        self.calls[method] += 1
        self.requests.append(request)
        self.metadata.append({str(key): str(value) for key, value in context.invocation_metadata()})
        self.time_left_s.append(context.time_remaining())
        self.fail(method, context)

    def _required(self, things: dict[str, Any], name: str, context: grpc.ServicerContext) -> Any:
        if name not in things:
            refuse(context, code_pb2.NOT_FOUND, "NOT_FOUND", f"{name} does not exist", metadata={"name": name})
        return things[name]

    def _same_etag(self, present: str, given: str, name: str, context: grpc.ServicerContext) -> None:
        if given and given != present:
            refuse(
                context,
                code_pb2.ABORTED,
                "ETAG_MISMATCH",
                f"{name} has changed: its etag is {present}, the call says {given}",
                metadata={"name": name, "etag": present},
            )

    def _unused(self, name: str, user: str, context: grpc.ServicerContext) -> None:
        if user:
            metadata = {"name": name, "user": user}
            refuse(context, code_pb2.FAILED_PRECONDITION, "RESOURCE_IN_USE", f"{name} is in use", metadata=metadata)

    # --- clusters

    def CreateCluster(self, request: Any, context: Any) -> Any:
        self._called("CreateCluster", request, context)
        name = f"clusters/{request.cluster_id}"
        if name in self.clusters:
            refuse(context, code_pb2.ALREADY_EXISTS, "ALREADY_EXISTS", f"{name} exists", metadata={"name": name})
        made = cluster_pb2.Cluster(name=name, etag="v1", num_nodes=6, num_gpus=12, document=request.cluster.document)
        if not request.validate_only:
            self.clusters[name] = made
        return cluster_service_pb2.CreateClusterResponse(cluster=made)

    def UpdateCluster(self, request: Any, context: Any) -> Any:
        self._called("UpdateCluster", request, context)
        old = self._required(self.clusters, request.cluster.name, context)
        self._same_etag(old.etag, request.cluster.etag, old.name, context)
        new = cluster_pb2.Cluster()
        new.CopyFrom(old)
        new.document.CopyFrom(request.cluster.document)
        new.etag = f"v{int(old.etag[1:]) + 1}"
        self.clusters[new.name] = new
        return cluster_service_pb2.UpdateClusterResponse(cluster=new)

    def DeleteCluster(self, request: Any, context: Any) -> Any:
        self._called("DeleteCluster", request, context)
        found = self._required(self.clusters, request.name, context)
        self._unused(found.name, found.active_plan, context)
        if not request.validate_only:
            del self.clusters[request.name]
        return cluster_service_pb2.DeleteClusterResponse()

    def GetInventory(self, request: Any, context: Any) -> Any:
        self._called("GetInventory", request, context)
        inventory = cluster_pb2.Inventory(name=request.name, differences=self.differences)
        return cluster_service_pb2.GetInventoryResponse(inventory=inventory)

    def GetClusterTraffic(self, request: Any, context: Any) -> Any:
        self._called("GetClusterTraffic", request, context)
        self._required(self.clusters, request.name.removesuffix("/traffic"), context)
        return cluster_service_pb2.GetClusterTrafficResponse(cluster_traffic=self.traffic)

    def ListNodes(self, request: Any, context: Any) -> Any:
        self._called("ListNodes", request, context)
        self._required(self.clusters, request.parent, context)
        found, token = _page(self.nodes, request)
        return cluster_service_pb2.ListNodesResponse(nodes=found, next_page_token=token)

    def WatchCluster(self, request: Any, context: Any) -> Iterator[Any]:
        self._called("WatchCluster", request, context)
        tokens = [event.resume_token for event in self.events]
        begin = tokens.index(request.resume_token) + 1 if request.resume_token else 0
        yield from self.events[begin:]

    # --- profiles

    def CreateProfile(self, request: Any, context: Any) -> Any:
        self._called("CreateProfile", request, context)
        name = f"profiles/{request.profile_id}"
        if name in self.profiles:
            refuse(context, code_pb2.ALREADY_EXISTS, "ALREADY_EXISTS", f"{name} exists", metadata={"name": name})
        made = profile_pb2.Profile(name=name, etag="v1", gpu_type="L4", document=request.profile.document)
        self.profiles[name] = made
        return profile_service_pb2.CreateProfileResponse(profile=made)

    def DeleteProfile(self, request: Any, context: Any) -> Any:
        self._called("DeleteProfile", request, context)
        self._required(self.profiles, request.name, context)
        if not request.validate_only:
            del self.profiles[request.name]
        return profile_service_pb2.DeleteProfileResponse()

    def UpdateProfile(self, request: Any, context: Any) -> Any:
        self._called("UpdateProfile", request, context)
        old = self._required(self.profiles, request.profile.name, context)
        old.document.CopyFrom(request.profile.document)
        old.etag = f"v{int(old.etag[1:]) + 1}"
        return profile_service_pb2.UpdateProfileResponse(profile=old)

    # --- plans

    def CreatePlan(self, request: Any, context: Any) -> Any:
        self._called("CreatePlan", request, context)
        self._required(self.clusters, request.plan.cluster, context)
        made = plan_pb2.Plan()
        made.CopyFrom(request.plan)
        made.name = f"plans/{request.plan_id or f'p{len(self.plans) + 1}'}"
        made.etag = "v1"
        made.activation = plan_pb2.ACTIVATION_STATE_INACTIVE
        made.state = plan_pb2.PLAN_STATE_QUEUED
        if request.plan.WhichOneof("source") == "imported":
            made.state = plan_pb2.PLAN_STATE_READY
            made.result.CopyFrom(result())
            self.documents[made.name] = request.plan.imported.content
        if not request.validate_only:
            self.plans[made.name] = made
        return plan_service_pb2.CreatePlanResponse(plan=made)

    def ListPlans(self, request: Any, context: Any) -> Any:
        self._called("ListPlans", request, context)
        chosen = {
            name: plan
            for name, plan in self.plans.items()
            if request.cluster in ("", plan.cluster) and (not request.states or plan.state in request.states)
        }
        found, token = _page(chosen, request)
        return plan_service_pb2.ListPlansResponse(plans=found, next_page_token=token)

    def WatchPlan(self, request: Any, context: Any) -> Iterator[Any]:
        self._called("WatchPlan", request, context)
        plan = self._required(self.plans, request.name, context)
        if plan.state not in (plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING):
            yield plan_service_pb2.WatchPlanResponse(sequence=1000, plan=plan)
            return
        for sequence, (wait_s, change) in enumerate(self.searches, start=1):
            if sequence <= request.after_sequence:
                continue
            if not self._sleeps(wait_s, plan, context):
                break
            plan.MergeFrom(change)
            yield plan_service_pb2.WatchPlanResponse(sequence=sequence, plan=plan)
            self.fail(f"WatchPlan after {sequence}", context)
        yield plan_service_pb2.WatchPlanResponse(sequence=900, plan=plan)

    def _sleeps(self, wait_s: float, plan: plan_pb2.Plan, context: Any) -> bool:
        until_s = time.monotonic() + wait_s
        while time.monotonic() < until_s and context.is_active():
            if plan.state == plan_pb2.PLAN_STATE_CANCELLED:
                return False
            time.sleep(0.01)
        return bool(context.is_active())

    def DeletePlan(self, request: Any, context: Any) -> Any:
        self._called("DeletePlan", request, context)
        found = self._required(self.plans, request.name, context)
        is_inactive = found.activation == plan_pb2.ACTIVATION_STATE_INACTIVE
        self._unused(found.name, "" if is_inactive else found.cluster, context)
        if not request.validate_only:
            del self.plans[request.name]
        return plan_service_pb2.DeletePlanResponse()

    def CancelPlan(self, request: Any, context: Any) -> Any:
        self._called("CancelPlan", request, context)
        plan = self._required(self.plans, request.name, context)
        if plan.state in (plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING):
            plan.state = plan_pb2.PLAN_STATE_CANCELLED
        return plan_service_pb2.CancelPlanResponse(plan=plan)

    def ActivatePlan(self, request: Any, context: Any) -> Any:
        self._called("ActivatePlan", request, context)
        plan = self._required(self.plans, request.name, context)
        cluster = self._required(self.clusters, plan.cluster, context)
        self._same_etag(cluster.etag, request.cluster_etag, cluster.name, context)
        if not request.validate_only:
            cluster.earlier_plan, cluster.active_plan = cluster.active_plan, plan.name
            plan.activation = plan_pb2.ACTIVATION_STATE_ACTIVE
        step = plan_service_pb2.TransitionStep(
            wave=1,
            kind=plan_service_pb2.TRANSITION_KIND_START,
            replica=f"{plan.cluster}/replicas/r-1",
            devices=["a100-0/0", "a100-0/1"],
            load_bytes=140 * 10**9,
        )
        return plan_service_pb2.ActivatePlanResponse(plan=plan, steps=[step])

    def RollbackPlan(self, request: Any, context: Any) -> Any:
        self._called("RollbackPlan", request, context)
        plan = self._required(self.plans, request.name, context)
        cluster = self._required(self.clusters, plan.cluster, context)
        if not cluster.earlier_plan:
            refuse(
                context,
                code_pb2.FAILED_PRECONDITION,
                "NO_EARLIER_PLAN",
                f"{cluster.name} has no earlier plan",
                metadata={"cluster": cluster.name, "plan": plan.name},
            )
        earlier = self.plans[cluster.earlier_plan]
        if not request.validate_only:
            cluster.active_plan, cluster.earlier_plan = earlier.name, ""
            earlier.activation = plan_pb2.ACTIVATION_STATE_ACTIVE
        return plan_service_pb2.RollbackPlanResponse(plan=earlier)

    def ReadPlanDocument(self, request: Any, context: Any) -> Iterator[Any]:
        self._called("ReadPlanDocument", request, context)
        content = self.documents[request.name]
        for offset in range(request.offset, len(content), 10):
            yield plan_service_pb2.ReadPlanDocumentResponse(
                offset=offset, content=content[offset : offset + 10], total_bytes=len(content)
            )
            self.fail(f"ReadPlanDocument after {offset}", context)


def _reads(services: Any, one: str, many: str) -> None:
    """Add the methods that get and list these resources."""

    def get(self: FakePlanner, request: Any, context: Any) -> Any:
        self._called(f"Get{one}", request, context)
        found = self._required(getattr(self, many.lower()), request.name, context)
        return getattr(services, f"Get{one}Response")(**{one.lower(): found})

    def list_(self: FakePlanner, request: Any, context: Any) -> Any:
        self._called(f"List{many}", request, context)
        found, token = _page(getattr(self, many.lower()), request)
        return getattr(services, f"List{many}Response")(**{many.lower(): found}, next_page_token=token)

    setattr(FakePlanner, f"Get{one}", get)
    if f"List{many}" not in vars(FakePlanner):
        setattr(FakePlanner, f"List{many}", list_)


for _one in ("Cluster", "Node", "Replica", "Redispatch"):
    _reads(cluster_service_pb2, _one, f"{_one}es" if _one == "Redispatch" else f"{_one}s")
_reads(profile_service_pb2, "Profile", "Profiles")
_reads(plan_service_pb2, "Plan", "Plans")


def result(value: float = 1.61, bound: float = 1.6131) -> plan_pb2.PlanResult:
    """Return a response of a watch."""
    return plan_pb2.PlanResult(
        status=plan_pb2.SOLVE_STATUS_FEASIBLE,
        value=value,
        bound=bound,
        gap=abs(bound - value) / value,
        unit="requests/s",
        solve_s=4.2,
        family="all plans of hetis",
        num_replicas=2,
        num_gpus=12,
        num_attention_workers=4,
        verification=plan_pb2.Verification(
            rate_rps=value,
            misses=["TTFT p95 3.4 s of 2 s"],
            ttft_p95_s=3.4,
            tpot_mean_s=0.05,
            attainment=0.9,
            kept_rps=1.5,
        ),
    )


def searching(incumbent: float, bound: float) -> plan_pb2.Plan:
    """Return the progress of a search."""
    progress = plan_pb2.SolveProgress(
        phase="pricing",
        elapsed_s=1.5,
        incumbent=incumbent,
        bound=bound,
        gap=(bound - incumbent) / incumbent,
        unit="requests/s",
    )
    return plan_pb2.Plan(state=plan_pb2.PLAN_STATE_SOLVING, progress=progress)


def ready() -> plan_pb2.Plan:
    return plan_pb2.Plan(state=plan_pb2.PLAN_STATE_READY, result=result())


def _page(things: dict[str, Any], request: Any) -> tuple[list[Any], str]:
    begin = int(request.page_token or 0)
    size = request.page_size or 50
    found = list(things.values())[begin : begin + size]
    return found, str(begin + size) if begin + size < len(things) else ""


@contextmanager
def serving(
    planner: FakePlanner, *, port: int = 0, credentials: grpc.ServerCredentials | None = None
) -> Iterator[FakePlanner]:
    """Serve the planner on the loopback, with health as the real one; ``planner.address`` is its address."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    cluster_service_pb2_grpc.add_ClusterServiceServicer_to_server(planner, server)
    plan_service_pb2_grpc.add_PlanServiceServicer_to_server(planner, server)
    profile_service_pb2_grpc.add_ProfileServiceServicer_to_server(planner, server)
    healthy = health.HealthServicer()
    healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    address = f"127.0.0.1:{port}"
    bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    planner.address = f"{'localhost' if credentials else '127.0.0.1'}:{bound}"
    server.start()
    try:
        yield planner
    finally:
        server.stop(0).wait()
