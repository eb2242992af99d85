"""The clients, for code without an event loop and for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from copy import deepcopy
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message

from hetis.planner.client.channels import AsyncLeaderChannel, LeaderChannel, at_once, each_at_once
from hetis.planner.client.connection import HEALTH_METHOD, Connection, says_serving
from hetis.planner.client.errors import Retries, call_error
from hetis.v1 import cluster_pb2, plan_pb2, profile_pb2, redispatch_pb2, replica_pb2
from hetis.v1 import cluster_service_pb2 as cluster_rpc
from hetis.v1 import cluster_service_pb2_grpc as cluster_grpc
from hetis.v1 import dispatch_service_pb2_grpc as dispatch_grpc
from hetis.v1 import plan_service_pb2 as plan_rpc
from hetis.v1 import plan_service_pb2_grpc as plan_grpc
from hetis.v1 import profile_service_pb2 as profile_rpc
from hetis.v1 import profile_service_pb2_grpc as profile_grpc

P = ParamSpec("P")
R = TypeVar("R")
Q = TypeVar("Q")
MOST_PER_PAGE = 500  # the planner's limit


class Pages(Generic[R]):
    """An iterator over the items of a list, which fetches each page when it is needed; usable once.

    Unless the request has a ``page_size``, pages are as large as the planner allows: each takes it a read of its store.

    Pages of a `Client` support ``for`` and `next`, those of an `AsyncClient` support ``async for`` and `anext`.
    """

    def __init__(self, call: Callable[[Any], Any], request: Message) -> None:
        self._call = call
        self._request = cast(Any, deepcopy(request))
        self._request.page_size = self._request.page_size or MOST_PER_PAGE
        self._items: Iterator[Any] = iter(())
        self._is_last = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> R:
        while (item := next(self._items, None)) is None:
            if self._is_last:
                raise StopIteration
            page = self._call(self._request)
            if isinstance(page, Awaitable):
                cast(Any, page).close()
                raise TypeError("a list of an AsyncClient is for `async for`")
            self._turn_to(page)
        return cast(R, item)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        while (item := next(self._items, None)) is None:
            if self._is_last:
                raise StopAsyncIteration
            self._turn_to(await self._call(self._request))
        return cast(R, item)

    def _turn_to(self, page: Any) -> None:
        """Continue with the items of a page, which are in its only repeated field."""
        self._items = iter(next(getattr(page, field.name) for field in page.DESCRIPTOR.fields if field.is_repeated))
        self._request.page_token = page.next_page_token
        self._is_last = not page.next_page_token


def _connection(given: Connection | str, settings: dict[str, Any]) -> Connection:
    """Return the connection that is given, or one to an address, with settings."""
    if not isinstance(given, Connection):
        return Connection(address=given, **settings)
    if settings:
        raise ValueError(f"a Connection has settings of its own, and {', '.join(settings)} cannot be added to them")
    return given


class _AnyClient:
    """The stubs and the lists of both clients.

    Attributes:
        clusters, plans, profiles, dispatch: the stubs of the API. Unary calls raise `CallError`; streams called
            directly raise ``grpc.RpcError``, which `watch_plan`, `watch_cluster` and `read_plan_document` do not.
        retries: creates the `Retries` of a watch that was not passed one.
    """

    clusters: Any
    plans: Any
    profiles: Any
    dispatch: Any

    def __init__(self, channel: Any, retries: Callable[[], Retries]) -> None:
        self._channel, self.retries = channel, retries
        self._health = channel.unary_unary(HEALTH_METHOD)
        self.clusters = cluster_grpc.ClusterServiceStub(channel)
        self.plans = plan_grpc.PlanServiceStub(channel)
        self.profiles = profile_grpc.ProfileServiceStub(channel)
        self.dispatch = dispatch_grpc.DispatchServiceStub(channel)

    @property
    def has_standby_answered(self) -> bool:
        """Whether a read was answered by a standby alone, without what only the leader knows of agents and searches."""
        return bool(self._channel.has_standby_answered)

    def list_clusters(self, *, page_size: int = 0) -> Pages[cluster_pb2.Cluster]:
        return Pages(self.clusters.ListClusters, cluster_rpc.ListClustersRequest(page_size=page_size))

    def list_nodes(
        self, cluster: str, *, states: list[cluster_pb2.NodeState.ValueType] | None = None, page_size: int = 0
    ) -> Pages[cluster_pb2.Node]:
        request = cluster_rpc.ListNodesRequest(parent=cluster, states=states, page_size=page_size)
        return Pages(self.clusters.ListNodes, request)

    def list_replicas(self, cluster: str, *, plan: str = "", page_size: int = 0) -> Pages[replica_pb2.Replica]:
        request = cluster_rpc.ListReplicasRequest(parent=cluster, plan=plan, page_size=page_size)
        return Pages(self.clusters.ListReplicas, request)

    def list_redispatches(
        self, cluster: str, *, replica: str = "", page_size: int = 0
    ) -> Pages[redispatch_pb2.Redispatch]:
        request = cluster_rpc.ListRedispatchesRequest(parent=cluster, replica=replica, page_size=page_size)
        return Pages(self.clusters.ListRedispatches, request)

    def list_plans(
        self, *, cluster: str = "", states: list[plan_pb2.PlanState.ValueType] | None = None, page_size: int = 0
    ) -> Pages[plan_pb2.Plan]:
        request = plan_rpc.ListPlansRequest(cluster=cluster, states=states, page_size=page_size)
        return Pages(self.plans.ListPlans, request)

    def list_profiles(self, *, gpu_type: str = "", page_size: int = 0) -> Pages[profile_pb2.Profile]:
        request = profile_rpc.ListProfilesRequest(gpu_type=gpu_type, page_size=page_size)
        return Pages(self.profiles.ListProfiles, request)

    async def _resumed(
        self,
        call: Callable[..., Any],
        request: Q,
        next_request: Callable[[Q, R], Q],
        retries: Retries | None,
        *,
        is_endless: bool = False,
    ) -> AsyncGenerator[R, None]:
        """Yield a response stream; after a lost connection, open it again to continue after the last response.

        The same goes for a stream whose credentials the planner no longer accepts, if there are newer ones.
        ``is_endless``: a stream that ends by itself is opened again, too.
        """
        retries = retries or self.retries()
        while True:
            retries.attempt()
            stream = call(request, on_open=retries.opened)
            try:
                async for response in stream:
                    retries.answered()
                    request = next_request(request, response)
                    yield response
                if not is_endless:
                    return
                wait_s = retries.next_wait_s(None)
            except grpc.RpcError as error:
                newer = stream.has_newer_credentials()
                wait_s = retries.next_wait_s(call_error(error), has_newer_credentials=newer)
            finally:
                stream.cancel()  # the caller may have stopped reading, and the planner allows few open streams
            await self._channel.wait(wait_s)


def _at_once(method: Callable[Concatenate[Any, P], Awaitable[R]]) -> Callable[Concatenate[Any, P], R]:
    """Return a method of `Client` that does what one of `AsyncClient` does."""

    @wraps(method)
    def call(self: Any, /, *args: P.args, **given: P.kwargs) -> R:
        return at_once(method(self, *args, **given))

    return call


def _each_at_once(
    method: Callable[Concatenate[Any, P], AsyncGenerator[R, None]],
) -> Callable[Concatenate[Any, P], Iterator[R]]:
    """Return a method of `Client` that yields what one of `AsyncClient` does."""

    @wraps(method)
    def call(self: Any, /, *args: P.args, **given: P.kwargs) -> Iterator[R]:
        return each_at_once(method(self, *args, **given))

    return call


class AsyncClient(_AnyClient):
    """A connection to a planner, opened by the first call, for asyncio."""

    clusters: cluster_grpc.ClusterServiceAsyncStub
    plans: plan_grpc.PlanServiceAsyncStub
    profiles: profile_grpc.ProfileServiceAsyncStub
    dispatch: dispatch_grpc.DispatchServiceAsyncStub

    def __init__(
        self,
        connection: Connection | str,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        retries: Callable[[], Retries] = Retries,
        **settings: Any,
    ) -> None:
        """Prepare a connection, as `Client` does."""
        super().__init__(AsyncLeaderChannel(_connection(connection, settings), sleep), retries)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every call on it."""
        await self._channel.close()

    async def is_serving(self) -> bool:
        """Return whether the planner accepts calls; False while it starts or drains.

        Raises:
            CallError: the planner cannot be reached.
        """
        return says_serving(await self._health(b""))

    def watch_plan(
        self, name: str, *, after_sequence: int = 0, retries: Retries | None = None
    ) -> AsyncGenerator[plan_rpc.WatchPlanResponse, None]:
        """Yield the plan now and after each change, until it can no longer change without a call.

        Raises:
            CallError: the plan does not exist, or the planner is out of reach for longer than ``retries``.
        """
        request = plan_rpc.WatchPlanRequest(name=name, after_sequence=after_sequence)
        return self._resumed(self.plans.WatchPlan, request, _next_of_plan, retries)

    def watch_cluster(
        self, name: str, *, resume_token: str = "", retries: Retries | None = None
    ) -> AsyncGenerator[cluster_rpc.WatchClusterResponse, None]:
        """Yield the cluster's present state, then every change, until the caller stops.

        An event with ``reset`` invalidates everything known before.

        Raises:
            CallError: the cluster does not exist, or the planner is out of reach for longer than ``retries``.
        """
        request = cluster_rpc.WatchClusterRequest(name=name, resume_token=resume_token)
        return self._resumed(self.clusters.WatchCluster, request, _next_of_cluster, retries, is_endless=True)

    async def wait(
        self,
        plan: str,
        *,
        on_change: Callable[[plan_pb2.Plan], object] = lambda plan: None,
        retries: Retries | None = None,
    ) -> plan_pb2.Plan:
        """Wait until the plan can no longer change without a call, active or not, and return it in the view BASIC.

        Args:
            on_change: called with every state of the plan on the way, including the last.
            retries: how long to wait for a planner that does not answer.
        """
        last = plan_pb2.Plan(name=plan)
        async for response in AsyncClient.watch_plan(self, plan, retries=retries):
            last = response.plan
            on_change(last)
        return last

    async def read_plan_document(self, name: str, *, retries: Retries | None = None) -> bytes:
        """Return the Plan document as canonical JSON, whatever its size; resumes after a lost connection."""
        request = plan_rpc.ReadPlanDocumentRequest(name=name)
        pieces = self._resumed(self.plans.ReadPlanDocument, request, _next_of_document, retries)
        return b"".join([piece.content async for piece in pieces])


class Client(_AnyClient):
    """A connection to a planner, opened by the first call. Methods are those of `AsyncClient`, without ``await``."""

    clusters: cluster_grpc.ClusterServiceStub
    plans: plan_grpc.PlanServiceStub
    profiles: profile_grpc.ProfileServiceStub
    dispatch: dispatch_grpc.DispatchServiceStub

    def __init__(
        self,
        connection: Connection | str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        retries: Callable[[], Retries] = Retries,
        on_slow: Callable[[list[str]], object] | None = None,
        **settings: Any,
    ) -> None:
        """Prepare a connection.

        Args:
            connection: the connection to a planner; an address alone becomes a `Connection` with ``settings``.
            sleep: how watches wait before they retry.
            retries: creates the `Retries` of a watch that was not passed one.
            on_slow: called from another thread while a call other than a watch has had no answer for a second or more,
                with the address of the planner that is tried and, behind it, those that are tried next.
            **settings: settings of the `Connection`, if an address is passed.

        Raises:
            ValueError: the settings contradict each other.
            OSError: a certificate or key cannot be read.
        """
        super().__init__(LeaderChannel(_connection(connection, settings), sleep, on_slow), retries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_serving(self) -> bool:
        """Return what `AsyncClient.is_serving` does."""
        return says_serving(self._health(b""))

    close = _at_once(AsyncClient.close)
    watch_plan = _each_at_once(AsyncClient.watch_plan)
    watch_cluster = _each_at_once(AsyncClient.watch_cluster)
    wait = _at_once(AsyncClient.wait)
    read_plan_document = _at_once(AsyncClient.read_plan_document)


def _next_of_plan(request: plan_rpc.WatchPlanRequest, last: plan_rpc.WatchPlanResponse) -> plan_rpc.WatchPlanRequest:
    return plan_rpc.WatchPlanRequest(name=request.name, after_sequence=last.sequence)


def _next_of_cluster(
    request: cluster_rpc.WatchClusterRequest, last: cluster_rpc.WatchClusterResponse
) -> cluster_rpc.WatchClusterRequest:
    return cluster_rpc.WatchClusterRequest(name=request.name, resume_token=last.resume_token)


def _next_of_document(
    request: plan_rpc.ReadPlanDocumentRequest, last: plan_rpc.ReadPlanDocumentResponse
) -> plan_rpc.ReadPlanDocumentRequest:
    return plan_rpc.ReadPlanDocumentRequest(name=request.name, offset=request.offset + len(last.content))
