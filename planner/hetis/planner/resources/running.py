"""Replicas and re-dispatches: what runs, and what was moved and why. Read-only."""

from __future__ import annotations

from hetis.planner.convert import names
from hetis.planner.convert.clusters import BASIC, FULL, redispatch_message, replica_message
from hetis.planner.resources.checking import Checks
from hetis.planner.resources.live import FleetNow
from hetis.planner.resources.paging import read_page_request
from hetis.planner.store import Reader, RedispatchRecord, ReplicaRecord, Store
from hetis.v1 import cluster_service_pb2 as service_pb2
from hetis.v1 import replica_pb2, view_pb2


def replica_now(fleet: FleetNow, record: ReplicaRecord, view: view_pb2.View.ValueType) -> replica_pb2.Replica:
    """Return a replica in its live state, or in its stored one if the fleet does not know it."""
    live = fleet.replica_view(record.name)
    return replica_message(
        record,
        view=view,
        state=live.state if live else record.state,
        generation=live.generation if live else record.generation,
        report=live.report if live else None,
        report_time_s=live.report_time_s if live else None,
        redispatch=live.redispatch if live else "",
    )


class RunningResources:
    """The resources ``clusters/{cluster}/replicas/{replica}`` and ``clusters/{cluster}/redispatches/{redispatch}``."""

    def __init__(self, store: Store, fleet: FleetNow) -> None:
        self._store = store
        self._fleet = fleet

    async def get_replica(self, request: service_pb2.GetReplicaRequest) -> service_pb2.GetReplicaResponse:
        checks = Checks()
        checks.name("name", request.name, names.REPLICA)
        checks.raise_if_wrong()
        record = await self._store.read(lambda tx: tx.replicas.require(request.name))
        return service_pb2.GetReplicaResponse(replica=replica_now(self._fleet, record, request.view or FULL))

    async def list_replicas(self, request: service_pb2.ListReplicasRequest) -> service_pb2.ListReplicasResponse:
        checks = Checks()
        checks.name("parent", request.parent, names.CLUSTER)
        checks.optional_name("plan", request.plan, names.PLAN)
        checks.page_size(request.page_size)
        checks.raise_if_wrong()
        page = read_page_request(request)

        def read(tx: Reader) -> list[ReplicaRecord]:
            tx.clusters.require(request.parent)
            plan = {"plan": request.plan} if request.plan else {}
            return tx.replicas.page(page.after, page.num_read, cluster=request.parent, **plan)

        records, token = page.cut(await self._store.read(read), lambda record: record.name)
        replicas = [replica_now(self._fleet, record, BASIC) for record in records]
        return service_pb2.ListReplicasResponse(replicas=replicas, next_page_token=token)

    async def get_redispatch(self, request: service_pb2.GetRedispatchRequest) -> service_pb2.GetRedispatchResponse:
        checks = Checks()
        checks.name("name", request.name, names.REDISPATCH)
        checks.raise_if_wrong()
        record = await self._store.read(lambda tx: tx.redispatches.require(request.name))
        return service_pb2.GetRedispatchResponse(redispatch=redispatch_message(record, view=request.view or FULL))

    async def list_redispatches(
        self, request: service_pb2.ListRedispatchesRequest
    ) -> service_pb2.ListRedispatchesResponse:
        checks = Checks()
        checks.name("parent", request.parent, names.CLUSTER)
        checks.optional_name("replica", request.replica, names.REPLICA)
        checks.page_size(request.page_size)
        checks.raise_if_wrong()
        page = read_page_request(request, newest_first=True)

        def read(tx: Reader) -> list[RedispatchRecord]:
            tx.clusters.require(request.parent)
            replica = {"replica": request.replica} if request.replica else {}
            return tx.redispatches.page(page.after, page.num_read, cluster=request.parent, **replica)

        records, token = page.cut(await self._store.read(read), lambda record: (record.create_time_s, record.name))
        redispatches = [redispatch_message(record, view=BASIC) for record in records]
        return service_pb2.ListRedispatchesResponse(redispatches=redispatches, next_page_token=token)
