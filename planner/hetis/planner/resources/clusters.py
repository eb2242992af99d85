"""Clusters: the implementations of the calls on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from hetis.planner.convert import names
from hetis.planner.convert.clusters import BASIC, FULL, cluster_message, without
from hetis.planner.convert.documents import MAX_NODES, DeclaredFleets, canonical_document
from hetis.planner.convert.names import seconds_of, word_of
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.resources.checks import Checks, check, require_etag
from hetis.planner.resources.committing import Publish, change_once
from hetis.planner.resources.in_force import how_to_withdraw
from hetis.planner.resources.pages import read_page
from hetis.planner.resources.plan_creation import forget_problem
from hetis.planner.store import ClusterRecord, Reader, Store, Transaction
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.solver.cluster import Cluster
from hetis.v1 import cluster_pb2, document_pb2, view_pb2
from hetis.v1 import cluster_service_pb2 as pb

Parsed = tuple[document_pb2.Document, Cluster]
ClusterDeleted = Callable[[str, Sequence[str]], None]
"""Called in the event loop with ``clusters/{cluster}`` and the names of its plans; must return at once."""


@dataclass(slots=True, eq=False)
class Clusters:
    """The resource ``clusters/{cluster}``."""

    _store: Store
    _hubs: Hubs
    _fleet: LiveFleet
    _fleets: DeclaredFleets
    _deleted: ClusterDeleted = lambda _cluster, _plans: None

    async def create(self, request: pb.CreateClusterRequest) -> pb.CreateClusterResponse:
        checks = Checks()
        checks.new_id("cluster_id", request.cluster_id)
        checks.request(request)
        check_policy(checks, request.cluster.policy, "cluster.policy")
        parsed = await self._read_document(checks, request.cluster)
        checks.raise_if_wrong()
        assert parsed is not None
        policy = request.cluster.policy if request.cluster.HasField("policy") else None
        now_s = self._store.clock()
        name = f"clusters/{request.cluster_id}"
        body = _body(name, *parsed, policy)
        record = ClusterRecord(name=name, body=body, create_time_s=now_s, update_time_s=now_s)
        if request.validate_only:
            await self._store.read(lambda tx: tx.clusters.require_free(name))
            cluster = without(self._message(record, FULL), "etag", "create_time", "update_time")
            return pb.CreateClusterResponse(cluster=cluster)

        def insert(tx: Transaction) -> tuple[pb.CreateClusterResponse, Publish]:
            made = tx.clusters.insert(record)
            publish = partial(self._publish_change, made, before=None)
            return pb.CreateClusterResponse(cluster=self._message(made, FULL)), publish

        return await change_once(self._store, request, pb.CreateClusterResponse, insert)

    async def get(self, request: pb.GetClusterRequest) -> pb.GetClusterResponse:
        check(request, name=names.CLUSTER)
        record = await self._store.require(Reader.clusters, request.name)
        return pb.GetClusterResponse(cluster=self._message(record, request.view or FULL))

    async def list(self, request: pb.ListClustersRequest) -> pb.ListClustersResponse:
        check(request)
        records, token = await read_page(self._store, request, Reader.clusters)
        clusters = [self._message(record, BASIC) for record in records]
        return pb.ListClustersResponse(clusters=clusters, next_page_token=token)

    async def update(self, request: pb.UpdateClusterRequest) -> pb.UpdateClusterResponse:
        checks = Checks()
        name = request.cluster.name
        checks.name("cluster.name", name, names.CLUSTER)
        checks.request(request)
        paths = _paths(checks, request)
        if any(path.startswith("policy") for path in paths):
            check_policy(checks, request.cluster.policy, "cluster.policy")
        parsed = await self._read_document(checks, request.cluster) if "document" in paths else None
        checks.raise_if_wrong()
        now_s = self._store.clock()

        def changed(record: ClusterRecord) -> ClusterRecord:
            require_etag(record, request.cluster.etag)
            return _with_changes(record, request.cluster, paths, parsed, now_s=now_s)

        if request.validate_only:
            record = await self._store.read(lambda tx: changed(tx.clusters.require(name)))
            return pb.UpdateClusterResponse(cluster=self._message(record, FULL))

        def update(tx: Transaction) -> tuple[pb.UpdateClusterResponse, Publish | None]:
            before = tx.clusters.require(name)
            after = changed(before)
            publish: Publish | None = None
            if after is not before:
                after = tx.clusters.update(after)
                publish = partial(self._publish_change, after, before=before)
            return pb.UpdateClusterResponse(cluster=self._message(after, FULL)), publish

        return await change_once(self._store, request, pb.UpdateClusterResponse, update)

    async def delete(self, request: pb.DeleteClusterRequest) -> pb.DeleteClusterResponse:
        check(request, name=names.CLUSTER)
        if request.validate_only:
            await self._store.read(lambda tx: _must_be_deletable(tx, request.name, request.etag))
            return pb.DeleteClusterResponse()

        def delete(tx: Transaction) -> tuple[pb.DeleteClusterResponse, Publish]:
            _must_be_deletable(tx, request.name, request.etag)
            plans = list(tx.plans.versions(cluster=request.name))
            for plan in plans:
                tx.plan_documents.delete(plan)
                forget_problem(tx, plan)  # here, since the planner may die before it has ended the search
            for table in (tx.plans, tx.redispatches, tx.replicas, tx.nodes, tx.traffic):
                table.delete_all(cluster=request.name)
            tx.clusters.delete(request.name)
            return pb.DeleteClusterResponse(), partial(self._publish_deleted, request.name, plans)

        return await change_once(self._store, request, pb.DeleteClusterResponse, delete)

    def _message(self, record: ClusterRecord, view: view_pb2.View.ValueType) -> cluster_pb2.Cluster:
        return cluster_message(record, view=view, num_connected=self._fleet.num_connected(record.name))

    async def _read_document(self, checks: Checks, cluster: cluster_pb2.Cluster) -> Parsed | None:
        if not checks.require(cluster.HasField("document"), "cluster.document", "is required"):
            return None
        parsed = await checks.document("cluster.document", cluster.document, partial(canonical_document, kind=Cluster))
        if parsed is not None:
            num_nodes = parsed[1].num_nodes()
            message = f"has {num_nodes} nodes, a cluster of the service has at most {MAX_NODES}"
            checks.require(num_nodes <= MAX_NODES, "cluster.document#nodes", message)
        return parsed

    async def _publish_change(self, record: ClusterRecord, *, before: ClusterRecord | None) -> None:
        """Publish a cluster that was created or changed to watchers, and pass it to the fleet."""
        num_connected = self._fleet.num_connected(record.name)
        self._hubs.publish_cluster(record, num_connected=num_connected, now_s=self._store.clock())
        if before is not None and record.body.document.digest != before.body.document.digest:
            was, is_ = await self._fleets.of(before), await self._fleets.of(record)
            changed = await run_in_thread_gc_paused(lambda: sorted({*was.nodes} ^ {*is_.nodes}))
            self._hubs.publish_nodes(record.name, changed, now_s=self._store.clock())
        await self._fleet.cluster_changed(record.name)

    async def _publish_deleted(self, name: str, plans: Sequence[str]) -> None:
        self._hubs.remove_cluster(name)
        for plan in plans:
            self._hubs.plans.publish(plan, None, now_s=self._store.clock())
        self._deleted(name, plans)
        await self._fleet.cluster_changed(name)


def _paths(checks: Checks, request: pb.UpdateClusterRequest) -> frozenset[str]:
    """Return the paths to change: those in the mask or, without a mask, the fields that are set."""
    cluster, given = request.cluster, list(request.update_mask.paths)
    if not given:
        fields = (("document", cluster.HasField("document")), ("policy", cluster.HasField("policy")))
        return frozenset(name for name, is_set in fields if is_set)

    known = ("document", "policy", *(f"policy.{name}" for name in cluster_pb2.ClusterPolicy.DESCRIPTOR.fields_by_name))
    return checks.update_mask(given, known, "document, policy or policy.FIELD")


def _with_changes(
    record: ClusterRecord, wanted: cluster_pb2.Cluster, paths: frozenset[str], parsed: Parsed | None, *, now_s: float
) -> ClusterRecord:
    """Return the changed record, or the same object if nothing changes."""
    policy = deepcopy(wanted.policy if "policy" in paths else record.body.policy)
    fields = FieldMask(paths=[path.removeprefix("policy.") for path in paths if path.startswith("policy.")])
    fields.MergeMessage(wanted.policy, policy, replace_message_field=True)
    body = deepcopy(record.body) if parsed is None else _body(record.name, *parsed, None)
    body.ClearField("policy")
    if policy.ByteSize():
        body.policy.CopyFrom(policy)
    document, present = body.document, record.body.document
    is_same = (document.digest, document.text) == (present.digest, present.text)
    if is_same and body.policy == record.body.policy:
        return record
    return replace(record, body=body, update_time_s=now_s)


def _must_be_deletable(tx: Reader, name: str, etag: str) -> None:
    record = tx.clusters.require(name)
    require_etag(record, etag)
    if record.active_plan:
        plan = tx.plans.get(record.active_plan)
        way_out = "" if plan is None else how_to_withdraw(tx, plan)
        raise _in_use(name, record.active_plan, f"is in force{way_out}")
    if replicas := tx.replicas.page(None, 1, cluster=name):
        raise _in_use(name, replicas[0].name, "has not stopped yet")


def _in_use(name: str, user: str, why: str) -> ServiceError:
    message, metadata = f"{name} is in use: {user} {why}", {"name": name, "user": user}
    return ServiceError(Reason.ERROR_REASON_RESOURCE_IN_USE, message, metadata=metadata)


_LONGEST_S = 315_576_000_000  # the longest valid Duration


def check_policy(checks: Checks, policy: cluster_pb2.ClusterPolicy, field: str) -> None:
    """Check the limits that ``cluster.proto`` states."""
    modes = cluster_pb2.ReactionMode
    for name in ("redispatch", "placement", "traffic"):
        mode = getattr(policy, name)
        known = ", ".join(word_of(modes, value) for value in modes.values() if value)
        checks.require(mode in modes.values(), f"{field}.{name}", f"is {mode}, must be one of {known}")
    ratio = policy.deviation_ratio
    checks.require(0 <= ratio <= 100, f"{field}.deviation_ratio", f"is {ratio}, must be from 0 to 100")
    mark = policy.high_water
    checks.require(0 <= mark <= 1, f"{field}.high_water", f"is {mark}, must be above 0 and at most 1, or 0 for 0.9")
    most = policy.traffic_changes_per_hour
    checks.require(most <= 60, f"{field}.traffic_changes_per_hour", f"is {most}, must be at most 60")
    for name, least_s, most_s, words in (
        ("redispatch_interval", 0.0, 3600.0, "0 to 1 hour"),
        ("prepare_timeout", 0.1, 600.0, "100 ms to 10 minutes"),
        ("placement_patience", 1.0, 86400.0, "1 s to 24 hours"),
        ("traffic_cool_down", 0.0, 86400.0, "0 to 24 hours"),
    ):
        if policy.HasField(name):  # type: ignore[arg-type]
            _check_duration(checks, getattr(policy, name), f"{field}.{name}", least_s, most_s, words)


def _check_duration(checks: Checks, duration: Duration, field: str, least_s: float, most_s: float, words: str) -> None:
    signs_agree = duration.seconds * duration.nanos >= 0
    valid = abs(duration.seconds) <= _LONGEST_S and abs(duration.nanos) < 10**9 and signs_agree
    if checks.require(valid, field, f"is not a valid duration: {duration.seconds} s and {duration.nanos} ns"):
        seconds = seconds_of(duration)
        checks.require(least_s <= seconds <= most_s, field, f"is {seconds:g} s, must be {words}")


def _body(
    name: str, document: document_pb2.Document, value: Cluster, policy: cluster_pb2.ClusterPolicy | None
) -> cluster_pb2.Cluster:
    """Return the stored body of a cluster. ``document`` is canonical, and ``value`` is its parsed content."""
    return cluster_pb2.Cluster(
        name=name,
        document=document,
        policy=policy,
        num_nodes=value.num_nodes(),
        num_gpus=value.num_gpus(),
    )
