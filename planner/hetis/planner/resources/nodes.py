"""Nodes and the inventory: the implementation of the calls about them."""

from __future__ import annotations

import dataclasses
import itertools
import time
from bisect import bisect_right
from collections.abc import Callable

from hetis.planner.convert import names
from hetis.planner.convert.clusters import BASIC, FULL
from hetis.planner.convert.inventories import FoundNode, inventory_message
from hetis.planner.convert.names import cluster_of, last_part
from hetis.planner.failures import etag_mismatch, not_found
from hetis.planner.resources.checking import Checks
from hetis.planner.resources.hubs import Hubs
from hetis.planner.resources.live import FleetNow, NodeNow
from hetis.planner.resources.node_views import CONNECTED, NodeReader, NodeViews
from hetis.planner.resources.paging import read_page_request
from hetis.planner.resources.publishing import publish_nodes
from hetis.planner.resources.requests import CallAnswer, once, to_the_end
from hetis.planner.store import NodeRecord, Store, Transaction, etag_of
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.v1 import cluster_pb2
from hetis.v1 import cluster_service_pb2 as service_pb2


class Nodes:
    """The resources ``clusters/{cluster}/nodes/{node}`` and ``clusters/{cluster}/inventory``."""

    def __init__(
        self,
        store: Store,
        hubs: Hubs,
        fleet: FleetNow,
        reader: NodeReader,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._hubs = hubs
        self._fleet = fleet
        self._reader = reader
        self._clock = clock

    async def get(self, request: service_pb2.GetNodeRequest) -> service_pb2.GetNodeResponse:
        checks = Checks()
        checks.name("name", request.name, names.NODE)
        checks.raise_if_wrong()
        views = await self._read(request.name)
        return service_pb2.GetNodeResponse(node=views.node(last_part(request.name), request.view or FULL))

    async def list(self, request: service_pb2.ListNodesRequest) -> service_pb2.ListNodesResponse:
        checks = Checks()
        checks.name("parent", request.parent, names.CLUSTER)
        checks.page_size(request.page_size)
        checks.raise_if_wrong()
        page = read_page_request(request)
        views = await self._reader.read(request.parent)
        ids = views.ids(request.states)
        start = bisect_right(ids, page.after) if isinstance(page.after, str) else 0
        wanted = set(request.states)
        matching = (node for node in itertools.islice(ids, start, None) if not wanted or views.state(node) in wanted)
        found, token = page.cut(list(itertools.islice(matching, page.num_read)), lambda node: node)
        nodes = [views.node(node, BASIC) for node in found]
        return service_pb2.ListNodesResponse(nodes=nodes, next_page_token=token)

    async def inventory(self, request: service_pb2.GetInventoryRequest) -> service_pb2.GetInventoryResponse:
        checks = Checks()
        checks.name("name", request.name, names.INVENTORY)
        checks.raise_if_wrong()
        views = await self._reader.read(cluster_of(request.name))
        found = {
            node: found
            for node, live in views.live.items()
            if live.state in CONNECTED and (found := _found(live)) is not None
        }
        etag = etag_of(views.cluster)
        inventory = await run_in_thread_gc_paused(
            inventory_message, views.cluster.name, views.declared.value, found, cluster_etag=etag
        )
        return service_pb2.GetInventoryResponse(inventory=inventory)

    async def drain(self, request: service_pb2.DrainNodeRequest) -> service_pb2.DrainNodeResponse:
        node = await self._set_draining(request, service_pb2.DrainNodeResponse, draining=True)
        return service_pb2.DrainNodeResponse(node=node)

    async def undrain(self, request: service_pb2.UndrainNodeRequest) -> service_pb2.UndrainNodeResponse:
        node = await self._set_draining(request, service_pb2.UndrainNodeResponse, draining=False)
        return service_pb2.UndrainNodeResponse(node=node)

    async def disconnect(self, request: service_pb2.DisconnectNodeRequest) -> service_pb2.DisconnectNodeResponse:
        """End the stream of whoever is connected as the node; nothing about it is stored."""
        checks = Checks()
        checks.name("name", request.name, names.NODE)
        checks.raise_if_wrong()
        await self._read(request.name)
        self._fleet.disconnect(request.name)
        found = await self.get(service_pb2.GetNodeRequest(name=request.name))
        return service_pb2.DisconnectNodeResponse(node=found.node)

    async def _set_draining(
        self,
        request: service_pb2.DrainNodeRequest | service_pb2.UndrainNodeRequest,
        response: type[service_pb2.DrainNodeResponse] | type[service_pb2.UndrainNodeResponse],
        *,
        draining: bool,
    ) -> cluster_pb2.Node:
        checks = Checks()
        checks.name("name", request.name, names.NODE)
        checks.request_id(request.request_id)
        checks.raise_if_wrong()
        views = await self._read(request.name)
        node = last_part(request.name)
        is_changed = False

        def change(tx: Transaction) -> service_pb2.DrainNodeResponse | service_pb2.UndrainNodeResponse:
            nonlocal is_changed
            tx.clusters.require(views.cluster.name)
            record = tx.nodes.get(request.name)
            if request.etag and request.etag != etag_of(record):
                raise etag_mismatch(request.name, given=request.etag, present=etag_of(record))
            is_changed = draining != (record is not None and record.draining)
            if is_changed:
                record = _keep(tx, request.name, record, draining=draining)
            now = dataclasses.replace(views, records={node: record} if record else {})
            return response(node=now.node(node, FULL))

        async def do() -> CallAnswer[service_pb2.DrainNodeResponse | service_pb2.UndrainNodeResponse]:
            answer = await self._store.write(lambda tx: once(tx, request, response, lambda: change(tx)))
            if answer.is_new and is_changed:
                publish_nodes(self._hubs, views.cluster.name, [node], now_s=self._clock())
                await self._fleet.cluster_changed(views.cluster.name)
            return answer

        return (await to_the_end(do())).response.node

    async def _read(self, name: str) -> NodeViews:
        """Read the cluster with the node of that name, which must exist."""
        views = await self._reader.read(cluster_of(name), [last_part(name)])
        if not views.exists(last_part(name)):
            raise not_found(name)
        return views


def _keep(tx: Transaction, name: str, record: NodeRecord | None, *, draining: bool) -> NodeRecord:
    if record is not None:
        return tx.nodes.update(dataclasses.replace(record, draining=draining))
    body = cluster_pb2.Node(name=name)
    return tx.nodes.insert(NodeRecord(name=name, cluster=cluster_of(name), body=body, draining=draining))


def _found(node: NodeNow) -> FoundNode | None:
    if node.inventory is None:
        return None
    unhealthy = {device.index: device.unhealthy for device in node.devices if device.unhealthy}
    return FoundNode(inventory=node.inventory, unhealthy=unhealthy)
