"""Nodes and the inventory: the calls on them, what watchers see, and how agents' reports differ from the document."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TypeVar

from hetis.formats import catalogue
from hetis.formats.cluster import cluster_to_data
from hetis.planner.convert import documents, names
from hetis.planner.convert.clusters import BASIC, FULL
from hetis.planner.convert.documents import Declared, DeclaredFleets
from hetis.planner.convert.names import cluster_of, last_part, node_name, timestamp
from hetis.planner.failures import ServiceError, not_found
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.views import LiveNode
from hetis.planner.resources.checks import Checks, check, require_etag
from hetis.planner.resources.committing import Publish, answered_before, change_once, to_the_end, write_down
from hetis.planner.resources.pages import read_page_request
from hetis.planner.store import ClusterRecord, NodeRecord, Store, Transaction, etag_of
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.solver.advice import network_between
from hetis.solver.cluster import Cluster, GpuSlots, GpuType, NodeGroup, indices_of
from hetis.v1 import cluster_pb2, document_pb2, inventory_pb2, view_pb2
from hetis.v1 import cluster_service_pb2 as pb

R = TypeVar("R", pb.DrainNodeResponse, pb.UndrainNodeResponse)
State = cluster_pb2.NodeState
_MOST_BY_NAME = 500  # if more names are requested, all node records of the cluster are read

CONNECTED = frozenset({State.NODE_STATE_READY, State.NODE_STATE_UNDECLARED})
"""States of nodes whose agents are connected."""
_HERE = CONNECTED | {State.NODE_STATE_SUSPECT}
"""States in which a node exists although the document does not name it. The fleet forgets an undeclared node when its
stream ends, and never calls it SUSPECT: that is one which the fleet, behind the document, still counts as declared.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeViews:
    """The nodes of one cluster at one moment."""

    cluster: ClusterRecord
    declared: Declared  # parsed document of the cluster
    records: Mapping[str, NodeRecord]  # all nodes, or only the requested ones, by node id
    live: Mapping[str, LiveNode]  # all nodes, or only the requested ones, by node id

    def exists(self, node: str) -> bool:
        """Return whether the node is declared or connected."""
        live = self.live.get(node)
        return node in self.declared or (live is not None and live.state in _HERE)

    def state(self, node: str) -> State.ValueType:
        """Return the state of a node that exists."""
        live = self.live.get(node)
        if node not in self.declared:
            return State.NODE_STATE_UNDECLARED
        if live is not None:
            # Declared by now, but the fleet may not have read the document yet.
            undeclared = live.state == State.NODE_STATE_UNDECLARED
            return State.NODE_STATE_READY if undeclared else live.state
        record = self.records.get(node)
        was_connected = record is not None and record.body.HasField("connect_time")
        return State.NODE_STATE_LOST if was_connected else State.NODE_STATE_EXPECTED

    def node(self, node: str, view: view_pb2.View.ValueType) -> cluster_pb2.Node:
        """Return an existing node as a message; what its agent has not reported in this term comes from its record."""
        live, record = self.live.get(node), self.records.get(node)
        message = deepcopy(record.body) if record is not None else cluster_pb2.Node()
        message.draining = record is not None and record.draining
        message.name = node_name(self.cluster.name, node)
        message.state = self.state(node)
        message.etag = etag_of(record)
        del message.devices[:], message.replicas[:]
        if live is not None:
            message.replicas.extend(live.replicas)
            message.devices.extend(live.devices)
            if live.agent_version:  # not stored for undeclared nodes
                message.agent_version, message.engine_address = live.agent_version, live.engine_address
            if live.inventory is not None and view != BASIC:
                message.inventory.CopyFrom(live.inventory)
            if live.connect_time_s is not None:
                message.connect_time.CopyFrom(timestamp(live.connect_time_s))
            if live.heard_time_s is not None:
                message.heard_time.CopyFrom(timestamp(live.heard_time_s))
        if view == BASIC:
            message.ClearField("inventory")
        return message

    def ids(self, states: Collection[State.ValueType] = ()) -> Sequence[str]:
        """Return the ids of all existing nodes in order.

        With ``states``, return at least the nodes in one of them, and possibly others.
        """
        undeclared = [node for node in self.live if node not in self.declared and self.exists(node)]
        if states and State.NODE_STATE_EXPECTED not in states:  # in a large fleet, nearly all nodes may be EXPECTED
            heard_of = (node for node in {*self.live, *self.records} if node in self.declared)
            return sorted([*heard_of, *undeclared])
        if not undeclared:
            return self.declared.nodes
        return sorted([*self.declared.nodes, *undeclared])  # nearly sorted already, which makes it fast


@dataclass(slots=True, eq=False)
class NodeReader:
    """Reads `NodeViews`."""

    _store: Store
    _fleet: LiveFleet
    _fleets: DeclaredFleets

    async def read(self, cluster: str, nodes: Collection[str] | None = None) -> NodeViews:
        """Read the nodes of ``clusters/{cluster}``, with the states of these node ids or, if None, of all nodes.

        Reading all nodes of a large fleet is noticeably slow. Raises NOT_FOUND if there is no such cluster.
        """
        is_of_few = nodes is not None and len(nodes) <= _MOST_BY_NAME
        which = {"name": [node_name(cluster, node) for node in nodes or ()]} if is_of_few else {"cluster": [cluster]}
        record, kept = await self._store.read(lambda tx: (tx.clusters.require(cluster), tx.nodes.all(**which)))
        records = {last_part(node.name): node for node in kept}
        declared = await self._fleets.of(record)
        if nodes is None:
            live = {last_part(name): node for name, node in self._fleet.nodes_of(cluster).items()}
        else:
            found = ((node, self._fleet.node_view(node_name(cluster, node))) for node in nodes)
            live = {node: view for node, view in found if view is not None}
        return NodeViews(cluster=record, declared=declared, records=records, live=live)


MAX_DIFFERENCES = 10_000
_MOST_BYTES = (4 << 20) - (16 << 10)  # in an answer
_FRAME_BYTES = 3  # tag and length of one difference, which is far shorter than 16 KiB
# Drivers reserve some memory, and cards are sold in rounded sizes: an L4 of 24 GiB shows 22.5, a T4 of 16 GiB 14.8.
_LEAST_MEMORY_RATIO = 0.9

Kind = cluster_pb2.InventoryDifferenceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedNode:
    """A node whose agent is connected. ``unhealthy``: by device index, why the device cannot be used."""

    inventory: inventory_pb2.NodeInventory
    unhealthy: Mapping[int, str]


def inventory_message(
    cluster: str, declared: Cluster, found: Mapping[str, ReportedNode], *, cluster_etag: str
) -> cluster_pb2.Inventory:
    """Return the found inventory and its differences from the declared one: at most 10,000, and as many as fit.

    Args:
        cluster: ``clusters/{cluster}``.
        declared: the content of the cluster's document.
        found: the connected nodes, by id.
        cluster_etag: the etag of the cluster with this document.
    """
    message = cluster_pb2.Inventory(
        name=f"{cluster}/inventory", found=_found_document(declared, found), cluster_etag=cluster_etag
    )
    free_bytes = _MOST_BYTES - message.ByteSize()
    for difference in itertools.islice(differences(declared, found), MAX_DIFFERENCES):
        free_bytes -= difference.ByteSize() + _FRAME_BYTES
        if free_bytes < 0:  # names have up to 200 characters, and each is there two or three times
            break
        message.differences.append(difference)
    return message


def differences(declared: Cluster, found: Mapping[str, ReportedNode]) -> Iterator[cluster_pb2.InventoryDifference]:
    """Yield every difference in the order of the document; nodes that the document does not name come last."""
    known = set[str]()
    for node, group in declared.nodes():
        if node not in found:
            message = "is declared, but its agent is not connected"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_NODE_MISSING, node, message)
            continue
        known.add(node)
        yield from _device_differences(node, group.gpus_of_node(), found[node], declared.gpu_types)
    for node in sorted(found.keys() - known):
        num_gpus = len(found[node].inventory.devices)
        message = f"is connected with {num_gpus} GPUs, but not declared"
        yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_NODE_UNDECLARED, node, message)


def _device_differences(
    node: str, declared: Mapping[int, str], found: ReportedNode, gpu_types: Mapping[str, GpuType]
) -> Iterator[cluster_pb2.InventoryDifference]:
    devices = {device.index: device for device in found.inventory.devices}
    for index in sorted(declared.keys() | devices.keys()):
        device, gpu = devices.get(index), declared.get(index)
        if device is None:
            message = f"is declared as {gpu}, but was not found"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_DEVICE_MISSING, node, message, index)
        elif gpu is None:
            message = f"was found as {_title(device)}, but is not declared"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_DEVICE_UNDECLARED, node, message, index)
        elif device.gpu_type != gpu:
            message = f"is declared as {gpu}, but was found as {_title(device)}"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_DEVICE_TYPE, node, message, index)
        elif 0 < device.memory_bytes < _LEAST_MEMORY_RATIO * gpu_types[gpu].memory_bytes:
            message = f"has {device.memory_bytes} bytes of memory, a {gpu} has {gpu_types[gpu].memory_bytes}"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_DEVICE_MEMORY, node, message, index)
        if device is not None and (why := found.unhealthy.get(index)):
            message = f"cannot be used: {why}"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_DEVICE_UNHEALTHY, node, message, index)


def _difference(
    kind: Kind.ValueType, node: str, message: str, index: int | None = None
) -> cluster_pb2.InventoryDifference:
    device = "" if index is None else f"{node}/{index}"
    return cluster_pb2.InventoryDifference(kind=kind, node=node, device=device, message=f"{device or node} {message}")


def _title(device: inventory_pb2.GpuDevice) -> str:
    return device.gpu_type or device.product_name or "an unknown device"


def _found_document(declared: Cluster, found: Mapping[str, ReportedNode]) -> document_pb2.Document:
    types = catalogue.gpu_types() | dict(declared.gpu_types)
    groups = list(_found_groups(declared, found, types))
    value = Cluster(
        name=declared.name,
        node_groups=tuple(groups),
        gpu_types={slots.gpu: types[slots.gpu] for group in groups for slots in group.gpus},
        network=network_between(declared.network, groups),
    )
    return documents.document_from_data(cluster_to_data(value, embed_gpu_types=True), "Cluster")


def _found_groups(
    declared: Cluster, found: Mapping[str, ReportedNode], types: Mapping[str, GpuType]
) -> Iterator[NodeGroup]:
    """Yield the found node groups: groups found as declared are kept, all other nodes form a group each."""
    known = set[str]()
    for group in declared.node_groups:
        nodes = [group.node_name(index) for index in range(group.count)]
        known.update(nodes)
        if all(node in found and _types_of(found[node]) == group.gpus_of_node() for node in nodes):
            yield group
        else:
            for node in nodes:
                if node in found and (own := _found_node(node, found[node], types, group)):
                    yield own
    for node in sorted(found.keys() - known):
        if own := _found_node(node, found[node], types, NodeGroup(name=node, gpus=())):
            yield own


def _types_of(node: ReportedNode) -> dict[int, str]:
    """Return the types of a node's GPUs by index, in that order."""
    devices = sorted(node.inventory.devices, key=lambda device: device.index)
    return {device.index: device.gpu_type for device in devices}


def _found_node(name: str, node: ReportedNode, types: Mapping[str, GpuType], declared: NodeGroup) -> NodeGroup | None:
    """Return a node with its GPUs by type, at the document's prices, or None if no plan can use any of them.

    Devices of unknown type are left out. A document lists each type once, so the driver's indices are in ``indices``
    unless they are 0, 1, ... in that order: without them, a launch would take other GPUs than the plan means.
    """
    stated = {slots.gpu: slots for slots in declared.gpus}
    places = dict[str, list[int]]()
    for index, gpu in _types_of(node).items():
        if gpu in types:
            places.setdefault(gpu, []).append(index)
    if not places:
        return None
    return NodeGroup(
        name=name,
        gpus=tuple(replace(stated.get(gpu, GpuSlots(gpu=gpu, count=1)), count=len(of)) for gpu, of in places.items()),
        zone=declared.zone,
        nic=declared.nic,
        intra_link=declared.intra_link,
        indices=indices_of(list(itertools.chain.from_iterable(places.values()))),
        resource=declared.resource,
    )


@dataclass(slots=True, eq=False)
class Nodes:
    """The resources ``clusters/{cluster}/nodes/{node}`` and ``clusters/{cluster}/inventory``."""

    _store: Store
    _hubs: Hubs
    _fleet: LiveFleet
    _reader: NodeReader

    async def get(self, request: pb.GetNodeRequest) -> pb.GetNodeResponse:
        check(request, name=names.NODE)
        views = await self._read(request.name)
        return pb.GetNodeResponse(node=views.node(last_part(request.name), request.view or FULL))

    async def list(self, request: pb.ListNodesRequest) -> pb.ListNodesResponse:
        checks = Checks()
        checks.request(request, parent=names.CLUSTER)
        wanted = checks.states("states", request.states, State)
        checks.raise_if_wrong()
        page = read_page_request(request)
        views = await self._reader.read(request.parent)
        ids = views.ids(wanted)
        start = bisect_right(ids, page.after) if isinstance(page.after, str) else 0
        matching = (node for node in itertools.islice(ids, start, None) if not wanted or views.state(node) in wanted)
        found, token = page.cut(list(itertools.islice(matching, page.num_read)), lambda node: node)
        nodes, token = page.fitting(found, token, lambda node: views.node(node, BASIC), lambda node: node)
        return pb.ListNodesResponse(nodes=nodes, next_page_token=token)

    async def inventory(self, request: pb.GetInventoryRequest) -> pb.GetInventoryResponse:
        check(request, name=names.INVENTORY)
        views = await self._reader.read(cluster_of(request.name))
        found = {
            node: ReportedNode(
                inventory=live.inventory,
                unhealthy={device.index: device.unhealthy for device in live.devices if device.unhealthy},
            )
            for node, live in views.live.items()
            if live.state in CONNECTED and live.inventory is not None
        }
        etag = etag_of(views.cluster)
        inventory = await run_in_thread_gc_paused(
            inventory_message, views.cluster.name, views.declared.value, found, cluster_etag=etag
        )
        return pb.GetInventoryResponse(inventory=inventory)

    async def drain(self, request: pb.DrainNodeRequest) -> pb.DrainNodeResponse:
        return await self._set_draining(request, pb.DrainNodeResponse, draining=True)

    async def undrain(self, request: pb.UndrainNodeRequest) -> pb.UndrainNodeResponse:
        return await self._set_draining(request, pb.UndrainNodeResponse, draining=False)

    async def disconnect(self, request: pb.DisconnectNodeRequest) -> pb.DisconnectNodeResponse:
        """End the stream of the agent that is connected as the node. Only the audit log records the call."""
        check(request, name=names.NODE)
        await self._read(request.name)
        self._fleet.require_connected(request.name)

        async def disconnect() -> None:
            # Written first, so that no agent is disconnected without a trace. The agent may have left in the meantime.
            await self._store.write(lambda tx: write_down(tx, request, pb.DisconnectNodeResponse()))
            with suppress(ServiceError):
                self._fleet.disconnect(request.name)

        await to_the_end(disconnect())
        views = await self._reader.read(cluster_of(request.name), [last_part(request.name)])
        return pb.DisconnectNodeResponse(node=views.node(last_part(request.name), FULL))

    async def _set_draining(
        self, request: pb.DrainNodeRequest | pb.UndrainNodeRequest, response: type[R], *, draining: bool
    ) -> R:
        check(request, name=names.NODE)
        try:
            views = await self._read(request.name)
        except ServiceError as error:
            return await answered_before(self._store, request, response, error)
        node = last_part(request.name)

        async def publish() -> None:
            self._hubs.publish_nodes(views.cluster.name, [node], now_s=self._store.clock())
            await self._fleet.cluster_changed(views.cluster.name)

        def change(tx: Transaction) -> tuple[R, Publish | None]:
            tx.clusters.require(views.cluster.name)
            record = tx.nodes.get(request.name)
            require_etag(record, request.etag, request.name)
            is_changed = draining != (record is not None and record.draining)
            if is_changed and record is not None:
                record = tx.nodes.update(replace(record, draining=draining))
            elif is_changed:
                body = cluster_pb2.Node(name=request.name)
                cluster = views.cluster.name
                record = tx.nodes.insert(NodeRecord(name=request.name, cluster=cluster, body=body, draining=draining))
            now = replace(views, records={node: record} if record else {})
            return response(node=now.node(node, FULL)), publish if is_changed else None

        return await change_once(self._store, request, response, change)

    async def _read(self, name: str) -> NodeViews:
        """Read the cluster, with the node of that name, which must exist."""
        views = await self._reader.read(cluster_of(name), [last_part(name)])
        if not views.exists(last_part(name)):
            raise not_found(name)
        return views
