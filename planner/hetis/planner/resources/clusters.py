"""Clusters: the implementation of the calls about them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from google.protobuf.duration_pb2 import Duration

from hetis.planner.convert import names
from hetis.planner.convert.clusters import BASIC, FULL, cluster_body, cluster_document, cluster_message
from hetis.planner.convert.documents import MAX_NODES
from hetis.planner.failures import Reason, ServiceError, etag_mismatch
from hetis.planner.resources.requests import CallAnswer, Checks, once, read_page_request, to_the_end
from hetis.planner.resources.shared import DeclaredFleets, FleetNow, Hubs, publish_cluster, publish_nodes
from hetis.planner.store import ClusterRecord, Reader, Store, Transaction, etag_of
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.solver.cluster import Cluster
from hetis.v1 import cluster_pb2, document_pb2, view_pb2
from hetis.v1 import cluster_service_pb2 as service_pb2

Parsed = tuple[document_pb2.Document, Cluster]
ClusterDeleted = Callable[[str, Sequence[str]], None]
"""Called in the loop with ``clusters/{cluster}`` and the names of its plans; must return at once."""


class Clusters:
    """The resource ``clusters/{cluster}``.

    Attributes:
        deleted: callbacks for deleted clusters.
    """

    def __init__(
        self,
        store: Store,
        hubs: Hubs,
        fleet: FleetNow,
        fleets: DeclaredFleets,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._hubs = hubs
        self._fleet = fleet
        self._fleets = fleets
        self._clock = clock
        self.deleted: list[ClusterDeleted] = []

    async def create(self, request: service_pb2.CreateClusterRequest) -> service_pb2.CreateClusterResponse:
        checks = Checks()
        checks.new_id("cluster_id", request.cluster_id)
        checks.request_id(request.request_id)
        check_policy(checks, request.cluster.policy, "cluster.policy")
        parsed = await self._read_document(checks, request.cluster)
        checks.raise_if_wrong()
        assert parsed is not None
        policy = request.cluster.policy if request.cluster.HasField("policy") else None
        now_s = self._clock()
        name = f"clusters/{request.cluster_id}"
        body = cluster_body(name, *parsed, policy)
        record = ClusterRecord(name=name, body=body, create_time_s=now_s, update_time_s=now_s)
        if request.validate_only:
            await self._store.read(lambda tx: _must_be_free(tx, name))
            cluster = self._message(record, FULL)
            for field in ("etag", "create_time", "update_time"):
                cluster.ClearField(field)
            return service_pb2.CreateClusterResponse(cluster=cluster)

        def insert(tx: Transaction) -> service_pb2.CreateClusterResponse:
            nonlocal record
            record = tx.clusters.insert(record)
            return service_pb2.CreateClusterResponse(cluster=self._message(record, FULL))

        async def change() -> CallAnswer[service_pb2.CreateClusterResponse]:
            answer = await self._store.write(
                lambda tx: once(tx, request, service_pb2.CreateClusterResponse, lambda: insert(tx))
            )
            if answer.is_new:
                await self._tell(record, before=None)
            return answer

        return (await to_the_end(change())).response

    async def get(self, request: service_pb2.GetClusterRequest) -> service_pb2.GetClusterResponse:
        checks = Checks()
        checks.name("name", request.name, names.CLUSTER)
        checks.raise_if_wrong()
        record = await self._store.read(lambda tx: tx.clusters.require(request.name))
        return service_pb2.GetClusterResponse(cluster=self._message(record, request.view or FULL))

    async def list(self, request: service_pb2.ListClustersRequest) -> service_pb2.ListClustersResponse:
        checks = Checks()
        checks.page_size(request.page_size)
        checks.raise_if_wrong()
        page = read_page_request(request)
        found = await self._store.read(lambda tx: tx.clusters.page(page.after, page.num_read))
        records, token = page.cut(found, lambda record: record.name)
        clusters = [self._message(record, BASIC) for record in records]
        return service_pb2.ListClustersResponse(clusters=clusters, next_page_token=token)

    async def update(self, request: service_pb2.UpdateClusterRequest) -> service_pb2.UpdateClusterResponse:
        checks = Checks()
        checks.name("cluster.name", request.cluster.name, names.CLUSTER)
        checks.request_id(request.request_id)
        paths = _paths(checks, request)
        if any(path.startswith("policy") for path in paths):
            check_policy(checks, request.cluster.policy, "cluster.policy")
        parsed = await self._read_document(checks, request.cluster) if "document" in paths else None
        checks.raise_if_wrong()
        now_s = self._clock()

        def changed(record: ClusterRecord) -> ClusterRecord:
            if request.cluster.etag and request.cluster.etag != etag_of(record):
                raise etag_mismatch(record.name, given=request.cluster.etag, present=etag_of(record))
            return _with_changes(record, request.cluster, paths, parsed, now_s=now_s)

        if request.validate_only:
            record = await self._store.read(lambda tx: changed(tx.clusters.require(request.cluster.name)))
            return service_pb2.UpdateClusterResponse(cluster=self._message(record, FULL))
        before: ClusterRecord | None = None
        after: ClusterRecord | None = None

        def update(tx: Transaction) -> service_pb2.UpdateClusterResponse:
            nonlocal before, after
            before = tx.clusters.require(request.cluster.name)
            after = changed(before)
            if after is not before:
                after = tx.clusters.update(after)
            return service_pb2.UpdateClusterResponse(cluster=self._message(after, FULL))

        async def change() -> CallAnswer[service_pb2.UpdateClusterResponse]:
            answer = await self._store.write(
                lambda tx: once(tx, request, service_pb2.UpdateClusterResponse, lambda: update(tx))
            )
            if answer.is_new and after is not None and after is not before:
                await self._tell(after, before=before)
            return answer

        return (await to_the_end(change())).response

    async def delete(self, request: service_pb2.DeleteClusterRequest) -> service_pb2.DeleteClusterResponse:
        checks = Checks()
        checks.name("name", request.name, names.CLUSTER)
        checks.request_id(request.request_id)
        checks.raise_if_wrong()
        if request.validate_only:
            await self._store.read(lambda tx: _must_be_deletable(tx, request.name, request.etag))
            return service_pb2.DeleteClusterResponse()
        plans: list[str] = []

        def delete(tx: Transaction) -> service_pb2.DeleteClusterResponse:
            _must_be_deletable(tx, request.name, request.etag)
            plans.extend(plan.name for plan in tx.plans.all(cluster=request.name))
            for plan in plans:
                tx.plan_documents.delete(plan)
            for table in (tx.plans, tx.redispatches, tx.replicas, tx.nodes):
                table.delete_all(cluster=request.name)
            tx.clusters.delete(request.name)
            return service_pb2.DeleteClusterResponse()

        async def change() -> CallAnswer[service_pb2.DeleteClusterResponse]:
            answer = await self._store.write(
                lambda tx: once(tx, request, service_pb2.DeleteClusterResponse, lambda: delete(tx))
            )
            if answer.is_new:
                await self._tell_deleted(request.name, plans)
            return answer

        return (await to_the_end(change())).response

    def _message(self, record: ClusterRecord, view: view_pb2.View.ValueType) -> cluster_pb2.Cluster:
        return cluster_message(record, view=view, num_connected=self._fleet.num_connected(record.name))

    async def _read_document(self, checks: Checks, cluster: cluster_pb2.Cluster) -> Parsed | None:
        if not checks.require(cluster.HasField("document"), "cluster.document", "is required"):
            return None
        parsed = await checks.document("cluster.document", cluster.document, cluster_document)
        if parsed is not None:
            num_nodes = sum(group.count for group in parsed[1].node_groups)
            message = f"has {num_nodes} nodes, a cluster of the service has at most {MAX_NODES}"
            checks.require(num_nodes <= MAX_NODES, "cluster.document#nodes", message)
        return parsed

    async def _tell(self, record: ClusterRecord, *, before: ClusterRecord | None) -> None:
        """Tell watchers and fleet about a cluster that was created or changed."""
        publish_cluster(self._hubs, self._fleet, record, now_s=self._clock())
        if before is not None and record.body.document.digest != before.body.document.digest:
            was, is_ = await self._fleets.of(before), await self._fleets.of(record)
            changed = await run_in_thread_gc_paused(lambda: sorted({*was.nodes} ^ {*is_.nodes}))
            publish_nodes(self._hubs, record.name, changed, now_s=self._clock())
        await self._fleet.cluster_changed(record.name)

    async def _tell_deleted(self, name: str, plans: Sequence[str]) -> None:
        self._hubs.remove_cluster(name)
        for plan in plans:
            self._hubs.plans.publish(plan, None, now_s=self._clock())
        for tell in self.deleted:
            tell(name, plans)
        await self._fleet.cluster_changed(name)


_POLICY = cluster_pb2.ClusterPolicy.DESCRIPTOR.fields_by_name


def _paths(checks: Checks, request: service_pb2.UpdateClusterRequest) -> frozenset[str]:
    """Return the paths to change: the mask, or the fields that are set."""
    cluster, given = request.cluster, list(request.update_mask.paths)
    if not given:
        fields = (("document", cluster.HasField("document")), ("policy", cluster.HasField("policy")))
        return frozenset(name for name, is_set in fields if is_set)
    for number, path in enumerate(given):
        field, _, inside = path.partition(".")
        known = path in ("document", "policy") or (field == "policy" and inside in _POLICY)
        message = f"is {path[:80]!r}, must be document, policy or policy.FIELD"
        checks.require(known, f"update_mask.paths[{number}]", message)
    return frozenset(given)


def _with_changes(
    record: ClusterRecord,
    wanted: cluster_pb2.Cluster,
    paths: frozenset[str],
    parsed: Parsed | None,
    *,
    now_s: float,
) -> ClusterRecord:
    """Return the changed record, or the same object if nothing changes."""
    policy = cluster_pb2.ClusterPolicy()
    policy.CopyFrom(wanted.policy if "policy" in paths else record.body.policy)
    for name in (path.partition(".")[2] for path in paths if path.startswith("policy.")):
        policy.ClearField(name)  # type: ignore[arg-type]
        part = cluster_pb2.ClusterPolicy()
        part.CopyFrom(wanted.policy)
        for other in _POLICY:
            if other != name:
                part.ClearField(other)
        policy.MergeFrom(part)
    body = cluster_pb2.Cluster()
    if parsed is not None:
        body = cluster_body(record.name, *parsed, None)
    else:
        body.CopyFrom(record.body)
    body.ClearField("policy")
    if policy.ByteSize():
        body.policy.CopyFrom(policy)
    document, present = body.document, record.body.document
    is_same = (document.digest, document.text) == (present.digest, present.text)
    if is_same and body.policy == record.body.policy:
        return record
    return dataclasses.replace(record, body=body, update_time_s=now_s)


def _must_be_free(tx: Reader, name: str) -> None:
    if tx.clusters.get(name) is not None:
        raise ServiceError(Reason.ERROR_REASON_ALREADY_EXISTS, f"{name} exists already", metadata={"name": name})


def _must_be_deletable(tx: Reader, name: str, etag: str) -> None:
    record = tx.clusters.require(name)
    if etag and etag != etag_of(record):
        raise etag_mismatch(name, given=etag, present=etag_of(record))
    if record.active_plan:
        raise _in_use(name, record.active_plan, "is in force")
    if replicas := tx.replicas.page(None, 1, cluster=name):
        raise _in_use(name, replicas[0].name, "is not stopped yet")


def _in_use(name: str, user: str, why: str) -> ServiceError:
    return ServiceError(
        Reason.ERROR_REASON_RESOURCE_IN_USE, f"{name} is in use: {user} {why}", metadata={"name": name, "user": user}
    )


_LONGEST_S = 315_576_000_000  # in a valid Duration


def check_policy(checks: Checks, policy: cluster_pb2.ClusterPolicy, field: str) -> None:
    """Check the limits that ``cluster.proto`` states."""
    ratio = policy.deviation_ratio
    checks.require(0 <= ratio <= 100, f"{field}.deviation_ratio", f"is {ratio}, must be from 0 to 100")
    mark = policy.high_water
    checks.require(0 <= mark <= 1, f"{field}.high_water", f"is {mark}, must be above 0 and at most 1, or 0 for 0.9")
    for name, least_s, most_s, words in (
        ("redispatch_interval", 0.0, 3600.0, "0 to 1 hour"),
        ("prepare_timeout", 0.1, 600.0, "100 ms to 10 minutes"),
        ("placement_patience", 1.0, 86400.0, "1 s to 24 hours"),
    ):
        if policy.HasField(name):  # type: ignore[arg-type]
            _check_duration(checks, getattr(policy, name), f"{field}.{name}", least_s, most_s, words)


def _check_duration(checks: Checks, duration: Duration, field: str, least_s: float, most_s: float, words: str) -> None:
    signs_agree = duration.seconds * duration.nanos >= 0
    valid = abs(duration.seconds) <= _LONGEST_S and abs(duration.nanos) < 10**9 and signs_agree
    if checks.require(valid, field, f"is no valid duration: {duration.seconds} s and {duration.nanos} ns"):
        seconds = duration.seconds + duration.nanos / 1e9
        checks.require(least_s <= seconds <= most_s, field, f"is {seconds:g} s, must be {words}")
