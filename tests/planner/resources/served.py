"""ClusterService and ProfileService on a real loopback server, with a store in a file and a fake fleet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.failures import not_found
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.stored_plans import StoredPlans
from hetis.planner.fleet.views import Clock, LiveNode, LiveReplica, show_live
from hetis.planner.resources import dispatch
from hetis.planner.resources.clusters import Clusters
from hetis.planner.resources.nodes import CONNECTED, NodeReader, Nodes
from hetis.planner.resources.profiles import Profiles
from hetis.planner.resources.traffic import MeasuredTraffic
from hetis.planner.resources.watches import ClusterWatches, RunningResources
from hetis.planner.service.calls import Calls
from hetis.planner.service.identity.credentials import NoCredentials
from hetis.planner.service.methods import Method
from hetis.planner.service.observability.metrics import ServiceMetrics
from hetis.planner.service.observability.telemetry import Telemetry
from hetis.planner.service.server import PlannerServer
from hetis.planner.service.servicers import servicing
from hetis.planner.store import Store
from hetis.v1 import (
    cluster_pb2,
    cluster_service_pb2_grpc,
    dispatch_service_pb2_grpc,
    document_pb2,
    profile_service_pb2_grpc,
    replica_pb2,
)
from tests.fleets import fleet

T = TypeVar("T")
STATE = cluster_pb2.NodeState

CLUSTER = fleet("fleet", "a100: 2 A100-SXM-80GB", "3 l4: 2 L4")


def document(text: str = CLUSTER, name: str = "fleet.yaml") -> document_pb2.Document:
    return document_pb2.Document(content=text.encode(), source_name=name)


def live_node(state: STATE.ValueType = STATE.NODE_STATE_READY, **given: Any) -> LiveNode:
    """Return a node as the fleet sees it; ``given`` fields replace the defaults."""
    usual: dict[str, Any] = {
        "is_draining": False,
        "replicas": (),
        "devices": (),
        "inventory": None,
        "agent_version": "",
        "engine_address": "",
        "connect_time_s": 5.0,
        "heard_time_s": 6.0,
    }
    return LiveNode(state=state, **(usual | given))


def live_replica(state: replica_pb2.ReplicaState.ValueType, generation: int, **given: Any) -> LiveReplica:
    """Return a replica as the fleet sees it; ``given`` fields replace the defaults."""
    usual: dict[str, Any] = {
        "name": "",
        "plan": "",
        "primary_node": "",
        "stages": (),
        "shape": replica_pb2.ReplicaPlan(),
        "conditions": {},
        "report": None,
        "report_time_s": None,
        "redispatch": "",
    }
    return LiveReplica(state=state, generation=generation, **(usual | given))


class FakeFleet:
    """A fleet whose observations the test sets."""

    def __init__(self) -> None:
        self.nodes: dict[str, LiveNode] = {}
        self.replicas: dict[str, LiveReplica] = {}
        self.changed: list[str] = []
        self.looked_up: list[str] = []

    def node_view(self, name: str) -> LiveNode | None:
        self.looked_up.append(name)
        return self.nodes.get(name)

    def nodes_of(self, cluster: str) -> Mapping[str, LiveNode]:
        self.looked_up.append(cluster)
        return {name: node for name, node in self.nodes.items() if name.startswith(f"{cluster}/")}

    def presence_of(self, cluster: str) -> dict[str, tuple[cluster_pb2.NodeState.ValueType, bool]]:
        return {name.rpartition("/")[2]: (one.state, one.is_draining) for name, one in self.nodes_of(cluster).items()}

    def num_connected(self, cluster: str) -> int:
        return sum(node.state in CONNECTED for name, node in self.nodes.items() if name.startswith(f"{cluster}/"))

    def replica_view(self, name: str) -> LiveReplica | None:
        return self.replicas.get(name)

    def show_replica(self, message: replica_pb2.Replica) -> None:
        if (live := self.replicas.get(message.name)) is not None:
            show_live(message, live)

    async def cluster_changed(self, cluster: str) -> None:
        self.changed.append(cluster)

    def require_connected(self, name: str) -> None:
        if name not in self.nodes or self.nodes[name].state not in CONNECTED:
            raise not_found(name)

    def disconnect(self, name: str) -> None:
        self.require_connected(name)
        del self.nodes[name]


@dataclass(kw_only=True)
class Served:
    """A planner with its services; calls of the stubs have a deadline."""

    clusters: Any
    profiles: Any
    dispatch: Any
    store: Store
    hubs: Hubs
    fleet: FakeFleet
    now_s: list[float]


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Served]:
    now_s = [1000.0]
    store = await Store.open(f"sqlite:///{folder}/hetis.db", clock=lambda: now_s[0])
    hubs, fleet, fleets = Hubs(await store.leadership.grant("test")), FakeFleet(), DeclaredFleets()
    reader = NodeReader(store, fleet, fleets)
    parts = SimpleNamespace(
        clusters=Clusters(store, hubs, fleet, fleets),
        nodes=Nodes(store, hubs, fleet, reader),
        running=RunningResources(store, fleet),
        watches=ClusterWatches(store, hubs, fleet, reader),
        profiles=Profiles(store),
        dispatch=dispatch,
        traffic=MeasuredTraffic(store, fleet, StoredPlans(store), Clock()),
    )

    def answer(method: Method, request: Any, _context: Any) -> Any:
        return method.carry_out(parts, request)

    servicings = [servicing(name, answer) for name in ("ClusterService", "ProfileService", "DispatchService")]
    server = PlannerServer(servicings, Calls(NoCredentials(), Telemetry(ServiceMetrics("0"))))
    address = server.listen("127.0.0.1:0")
    await server.start()
    try:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            yield Served(
                clusters=_WithDeadline(cluster_service_pb2_grpc.ClusterServiceStub(channel)),
                profiles=_WithDeadline(profile_service_pb2_grpc.ProfileServiceStub(channel)),
                dispatch=_WithDeadline(dispatch_service_pb2_grpc.DispatchServiceStub(channel)),
                store=store,
                hubs=hubs,
                fleet=fleet,
                now_s=now_s,
            )
    finally:
        hubs.close()
        await server.stop_at_once()
        await store.close()


class _WithDeadline:
    def __init__(self, stub: object) -> None:
        self._stub = stub

    def __getattr__(self, name: str) -> Callable[[Message], Any]:
        call = getattr(self._stub, name)
        return lambda request: call(request) if name.startswith("Watch") else call(request, timeout=20)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A failed call."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]
    fields: dict[str, str]
    message: str


async def refused(call: Any) -> Refusal:
    """Return the failure of a call, which must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    assert status is not None, caught.value
    info, wrong = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(wrong)
    fields = {violation.field: violation.description for violation in wrong.field_violations}
    return Refusal(
        code=caught.value.code(),
        reason=info.reason,
        metadata=dict(info.metadata),
        fields=fields,
        message=status.message,
    )
