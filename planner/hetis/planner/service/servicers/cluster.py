"""ClusterService: each call is passed to a resource."""

# ruff: noqa: N802  # gRPC's names

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from hetis.planner.resources.clusters import Clusters
from hetis.planner.resources.nodes import Nodes
from hetis.planner.resources.watches import ClusterWatches, RunningResources
from hetis.v1 import cluster_service_pb2 as pb
from hetis.v1 import cluster_service_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ClusterServicer(cluster_service_pb2_grpc.ClusterServiceServicer):
    def __init__(self, clusters: Clusters, nodes: Nodes, running: RunningResources, watches: ClusterWatches) -> None:
        self._clusters = clusters
        self._nodes = nodes
        self._running = running
        self._watches = watches

    async def CreateCluster(self, request: pb.CreateClusterRequest, context: Context) -> pb.CreateClusterResponse:
        return await self._clusters.create(request)

    async def GetCluster(self, request: pb.GetClusterRequest, context: Context) -> pb.GetClusterResponse:
        return await self._clusters.get(request)

    async def ListClusters(self, request: pb.ListClustersRequest, context: Context) -> pb.ListClustersResponse:
        return await self._clusters.list(request)

    async def UpdateCluster(self, request: pb.UpdateClusterRequest, context: Context) -> pb.UpdateClusterResponse:
        return await self._clusters.update(request)

    async def DeleteCluster(self, request: pb.DeleteClusterRequest, context: Context) -> pb.DeleteClusterResponse:
        return await self._clusters.delete(request)

    async def WatchCluster(
        self, request: pb.WatchClusterRequest, context: Context
    ) -> AsyncIterator[pb.WatchClusterResponse]:
        async for response in self._watches.watch(request):
            yield response

    async def GetInventory(self, request: pb.GetInventoryRequest, context: Context) -> pb.GetInventoryResponse:
        return await self._nodes.inventory(request)

    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> pb.GetNodeResponse:
        return await self._nodes.get(request)

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        return await self._nodes.list(request)

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Context) -> pb.DrainNodeResponse:
        return await self._nodes.drain(request)

    async def UndrainNode(self, request: pb.UndrainNodeRequest, context: Context) -> pb.UndrainNodeResponse:
        return await self._nodes.undrain(request)

    async def DisconnectNode(self, request: pb.DisconnectNodeRequest, context: Context) -> pb.DisconnectNodeResponse:
        return await self._nodes.disconnect(request)

    async def GetReplica(self, request: pb.GetReplicaRequest, context: Context) -> pb.GetReplicaResponse:
        return await self._running.get_replica(request)

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Context) -> pb.ListReplicasResponse:
        return await self._running.list_replicas(request)

    async def GetRedispatch(self, request: pb.GetRedispatchRequest, context: Context) -> pb.GetRedispatchResponse:
        return await self._running.get_redispatch(request)

    async def ListRedispatches(
        self, request: pb.ListRedispatchesRequest, context: Context
    ) -> pb.ListRedispatchesResponse:
        return await self._running.list_redispatches(request)
