"""All clusters of this planner in one event loop: streams, time and store around the state machines that decide.

The decisions about a cluster are written in one transaction, and no agent or client is sent them before it is durable.
A report touches only its node and the node's replicas, and not the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import suppress
from functools import partial

from hetis.planner.callers import Identity
from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.convert.names import NODE, cluster_of, last_part, node_name
from hetis.planner.failures import Reason, ServiceError, invalid_field, not_found, wrong_node
from hetis.planner.fleet import views
from hetis.planner.fleet.agents.deltas import protocol_violation
from hetis.planner.fleet.agents.head_maps import HeadMaps
from hetis.planner.fleet.agents.link import HeadMapsRead, taken_over
from hetis.planner.fleet.agents.messages import Request, check_hello, note_refused
from hetis.planner.fleet.agents.stream import MessageBudget, Response, Stream
from hetis.planner.fleet.cluster import ClusterFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.reconciler import Reconciler
from hetis.planner.fleet.settings import FleetCounters, FleetSettings
from hetis.planner.fleet.stored_plans import StoredPlans
from hetis.planner.fleet.views import Clock, FleetObserver, LiveNode, LiveReplica, kv_in_use
from hetis.planner.fleet.writes import StoredCluster, read_clusters
from hetis.planner.store import Store
from hetis.v1 import cluster_pb2, plan_pb2, redispatch_pb2, replica_pb2

_log = logging.getLogger("hetis.planner.fleet")
_HELLO_S = 10.0  # limit for the first message of a stream
_GOODBYE_S = 2.0  # time for agents to receive their last messages
_MOST_REQUEST_BYTES = 2**20  # as documented in docs/api.md
_READ_AT_ONCE = 200  # clusters in one query; databases limit the parameters of a statement
_STOOD_STILL = 4.0  # ticks; a longer gap between two ticks means that the planner itself was suspended


class LiveFleet:
    """The live nodes and replicas of all clusters."""

    def __init__(
        self,
        store: Store,
        hubs: Hubs,
        *,
        epoch: int,
        settings: FleetSettings,
        clock: Clock,
        plans: StoredPlans | None = None,
        declared: DeclaredFleets | None = None,
        counters: FleetCounters | None = None,
    ) -> None:
        self._observers: list[FleetObserver] = []
        self.counters = counters or FleetCounters()
        self._store, self._hubs = store, hubs
        self._epoch = epoch
        self._settings = settings
        self._clock = clock
        self._plans = plans or StoredPlans(store)
        self._declared = declared or DeclaredFleets()
        self._clusters: dict[str, ClusterFleet] = {}
        self._no_cluster = ClusterFleet("", epoch=epoch, settings=settings, counters=self.counters)  # an empty one
        self._reconcilers: dict[str, Reconciler] = {}  # even for clusters being read for the first time
        self._streams: dict[str, Stream] = {}  # by node name
        self._readings: dict[str, tuple[str, asyncio.Future[HeadMaps]]] = {}  # by request id, with the name of the node
        self._ticks: asyncio.Task[None] | None = None
        self._budget = MessageBudget()
        self._published_s = 0.0  # when the last states were published
        self._ticked_s = clock.monotonic()  # time of the last tick
        self._ending: ServiceError | None = None  # why streams are refused from now on; None: they are accepted

    # --- Life cycle

    def add_observer(self, observer: FleetObserver) -> None:
        """Call the observer on events from now on, in the event loop."""
        self._observers.append(observer)

    async def start(self) -> None:
        """Read every cluster, and resume what an earlier planner left."""
        names = sorted(await self._store.read(lambda tx: tx.clusters.versions()))
        for first in range(0, len(names), _READ_AT_ONCE):
            some = names[first : first + _READ_AT_ONCE]
            found = await self._store.read(partial(read_clusters, names=some))
            await self._declared.read(stored.cluster for stored in found.values())
            for name, stored in found.items():
                await self.cluster_changed(name, stored)
        self._ticked_s = self._clock.monotonic()
        self._ticks = asyncio.create_task(self._tick_for_ever(), name="the fleet's time")

    async def stop(self, reason: str) -> None:
        """Send a goodbye to all agents, and end their streams once it is delivered. Replicas continue to serve."""
        self._ending = ServiceError(Reason.ERROR_REASON_DRAINING, f"this planner is stopping: {reason}; reconnect")
        for cluster in self._clusters.values():
            cluster.say_goodbye(reason)
            self._send(cluster)
        begun = (self._ticks, *(reconciler.task for reconciler in self._reconcilers.values()))
        tasks = [task for task in begun if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        streams = list(self._streams.values())
        for stream in streams:
            stream.end(self._ending)
        self._fail_readings(None, self._ending)
        with suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                for stream in streams:
                    await stream.closed.wait()

    # --- Agents

    async def connect(self, identity: Identity, requests: AsyncIterator[Request]) -> AsyncGenerator[Response, None]:
        """Serve one stream until either side ends it. Raises ServiceError as ``AgentService.ConnectNode`` documents."""
        await self._budget.turn()  # thousands that come back at once leave time for calls, too
        first = await _first_of(requests)
        with self._budget.spending():
            try:
                name = self._admit(identity, first)
                cluster, node = self._clusters[cluster_of(name)], last_part(name)
                stream = Stream(cluster.open(node, first, now_s=self._clock.monotonic(), time_s=self._clock.time()))
            except ServiceError as error:
                note_refused(error, self.counters)
                raise
            if (before := self._streams.get(name)) is not None:
                gone = taken_over(f"another stream of {name} was opened", name)
                before.end(gone)
                self._fail_readings(name, gone)
            self._streams[name] = stream
            self._after(cluster)
        reading = asyncio.create_task(self._read(cluster, node, stream, requests), name=f"stream of {name}")
        try:
            async for message in stream.messages():
                yield message
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            self._close(cluster, node, name, stream)
            stream.closed.set()

    # --- Queries

    def node_view(self, name: str) -> LiveNode | None:
        """Return a node, or None if it is neither declared nor connected."""
        cluster, node = self._cluster(cluster_of(name)), last_part(name)
        return self._live_node(cluster, node) if node in cluster.leases else None

    def nodes_of(self, cluster: str) -> Mapping[str, LiveNode]:
        """Return the declared and the connected nodes, by resource name."""
        found = self._cluster(cluster)
        return {node_name(cluster, node): self._live_node(found, node) for node in found.leases.nodes}

    def num_by_state(self, cluster: str) -> Counter[cluster_pb2.NodeState.ValueType]:
        """Return how many of the nodes of `nodes_of` are in each state, without their views."""
        return Counter(state for state, _ in self.presence_of(cluster).values())

    def presence_of(self, cluster: str) -> dict[str, tuple[cluster_pb2.NodeState.ValueType, bool]]:
        """Return the state of each node of `nodes_of` and whether it drains, by node id, without their views."""
        found = self._cluster(cluster)
        return {node: (found.leases.state(node), found.node_records.is_draining(node)) for node in found.leases.nodes}

    def replicas_by_state(self, cluster: str) -> Counter[replica_pb2.ReplicaState.ValueType]:
        """Return how many replicas of the cluster are in each state, without their views."""
        return Counter(replica.state for replica in self._cluster(cluster).replicas.values())

    def activation_of(self, cluster: str) -> plan_pb2.ActivationState.ValueType | None:
        """Return how far the plan in force is activated, or None if there is none."""
        plan = self._cluster(cluster).plan
        return None if plan is None else plan.activation

    def num_connected(self, cluster: str) -> int:
        """Return the number of nodes whose agents are connected.

        The number is kept up to date, so it is cheap enough for every answer and event about a cluster. For a single
        node use `node_view`, whose cost is that of one view, whereas `nodes_of` builds the views of all nodes.
        """
        return self._cluster(cluster).leases.num_connected

    def replica_view(self, name: str) -> LiveReplica | None:
        cluster = self._cluster(cluster_of(name))
        return None if (found := cluster.replicas.get(name)) is None else views.live_replica(cluster, found)

    def show_replica(self, message: replica_pb2.Replica) -> None:
        """Add to the message of a replica what is live in the view FULL; nothing if the fleet does not know it."""
        cluster = self._cluster(cluster_of(message.name))
        if (replica := cluster.replicas.get(message.name)) is not None:
            views.show_live(message, views.live_replica(cluster, replica))
            views.show_parts(message, cluster, replica)

    def replicas_of(self, cluster: str) -> list[LiveReplica]:
        """Return the replicas of a cluster that are not stopped, ordered by name."""
        found = self._cluster(cluster)
        replicas = sorted(found.replicas.values(), key=lambda replica: replica.name)
        return [views.live_replica(found, replica) for replica in replicas if not replica.is_stopping]

    @property
    def cluster_names(self) -> list[str]:
        return list(self._clusters)

    def kv_in_use(self, cluster: str) -> Iterator[tuple[str, float]]:
        """Yield every device (``node/index``) that reports its KV, with the share of its blocks that are in use.

        The caller may yield to the event loop in between; nodes that join in the meantime are left out.
        """
        return kv_in_use(self._cluster(cluster))

    def policy_of(self, cluster: str) -> cluster_pb2.ClusterPolicy:
        """Return what the planner may do in the cluster; an empty policy stands for the defaults."""
        record = self._cluster(cluster).record
        return cluster_pb2.ClusterPolicy() if record is None else record.body.policy

    def has_plan(self, cluster: str) -> bool:
        """Return whether a plan of the cluster is in force or being activated."""
        return self._cluster(cluster).plan is not None

    def _cluster(self, name: str) -> ClusterFleet:
        return self._clusters.get(name, self._no_cluster)

    async def cluster_changed(self, cluster: str, stored: StoredCluster | None = None) -> None:
        """Read a cluster whose records were changed elsewhere, unless it is ``stored``, and act on the changes."""
        while True:
            reconciler = self._reconciler_of(cluster)
            async with reconciler.lock:
                if self._reconcilers.get(cluster) is not reconciler:
                    continue  # the cluster was gone when it was read before, and may be back
                if not await reconciler.read(stored):
                    return self._forget(reconciler.cluster)
                self._clusters[cluster] = reconciler.cluster
            return self._after(reconciler.cluster)

    def _reconciler_of(self, cluster: str) -> Reconciler:
        """Return the cluster's only reconciler, made on first use."""
        if cluster not in self._reconcilers:
            self._reconcilers[cluster] = Reconciler(
                cluster=ClusterFleet(cluster, epoch=self._epoch, settings=self._settings, counters=self.counters),
                store=self._store,
                hubs=self._hubs,
                plans=self._plans,
                declared=self._declared,
                clock=self._clock,
                observers=self._observers,
                send=self._send,
                lose_leadership=self.lose_leadership,
            )
        return self._reconcilers[cluster]

    async def read_head_maps(self, replica: str, timeout_s: float) -> HeadMaps:
        """Request a replica's head maps from the agent of its primary node.

        Raises ServiceError if there is no such replica, no agent to ask, no answer in time, or no consistent one.
        """
        cluster = self._cluster(cluster_of(replica))
        node, request_id = cluster.request_head_maps(replica)
        answer = asyncio.get_running_loop().create_future()
        self._readings[request_id] = (node_name(cluster.name, node), answer)
        self._send(cluster)
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            message = f"no head map of {replica} was received within {timeout_s:g} s"
            raise ServiceError(Reason.ERROR_REASON_ENGINE_UNREACHABLE, message) from None
        finally:
            self._readings.pop(request_id, None)
            if (link := cluster.links.get(node)) is not None:
                link.drop_head_maps(request_id)

    async def redispatch(self, redispatch: redispatch_pb2.Redispatch) -> None:
        """Begin a re-dispatch and return once it is stored; its progress is published in the cluster's hub.

        Raises:
            ServiceError: it cannot begin (CHANGE_IN_FLIGHT, GENERATION_MISMATCH, DEVICE_UNAVAILABLE), or has begun but
                could not be stored yet (`is_under_way`).
        """
        cluster = self._cluster(cluster_of(redispatch.replica))
        cluster.changes.propose(redispatch, now_s=self._clock.monotonic())
        await self._reconcilers[cluster.name].reconcile()

    def is_under_way(self, redispatch: redispatch_pb2.Redispatch) -> bool:
        """Return whether a re-dispatch has begun and not ended, whether or not it is stored."""
        return last_part(redispatch.name) in self._cluster(cluster_of(redispatch.replica)).changes.under_way

    def require_connected(self, name: str) -> None:
        """Raise NOT_FOUND if no agent is connected as this node."""
        if name not in self._streams:
            message = f"no agent is connected as {name}"
            raise ServiceError(Reason.ERROR_REASON_NOT_FOUND, message, metadata={"name": name})

    def disconnect(self, name: str) -> None:
        """End a node's stream, so that another agent may connect. Raises NOT_FOUND if no agent is connected."""
        self.require_connected(name)
        stream = self._streams[name]
        _log.warning("an admin ended the stream of an agent", extra={"node": name})
        if (cluster := self._clusters.get(cluster_of(name))) is not None:
            self._close(cluster, last_part(name), name, stream)
        stream.end(taken_over(f"an admin ended the stream of {name}", name))

    # --- Streams

    def _admit(self, identity: Identity, first: Request) -> str:
        hello = check_hello(first, epoch=self._epoch)
        if not NODE.matches(hello.node):
            raise invalid_field("hello.node", f"must have the form {NODE.text}")
        if not identity.speaks_for(hello.node):
            raise wrong_node(identity, hello.node)
        if self._ending is not None:
            raise self._ending
        if cluster_of(hello.node) not in self._clusters:
            raise not_found(cluster_of(hello.node))
        return hello.node

    async def _read(self, cluster: ClusterFleet, node: str, stream: Stream, requests: AsyncIterator[Request]) -> None:
        try:
            async for request in requests:
                _check_size(request)
                now_s, time_s = self._clock.monotonic(), self._clock.time()
                with self._budget.spending():
                    for event in cluster.handle(node, stream.session, request, now_s=now_s, time_s=time_s):
                        self._answer_reading(event)
                    self._after(cluster)
                await self._budget.turn()
            stream.end()
        except ServiceError as error:
            stream.end(error)
        except asyncio.CancelledError:
            raise
        except Exception:
            extra = {"node": node, "cluster": cluster.name}
            self.counters.errors["message"] += 1
            _log.exception("a message from an agent could not be processed", extra=extra)
            message = "a message could not be processed: see the planner's log"
            stream.end(ServiceError(Reason.ERROR_REASON_INTERNAL, message))

    def _close(self, cluster: ClusterFleet, node: str, name: str, stream: Stream) -> None:
        if self._streams.get(name) is stream:
            del self._streams[name]
            message = f"the stream of {name} ended"
            gone = ServiceError(Reason.ERROR_REASON_DEVICE_UNAVAILABLE, message, metadata={"device": node})
            self._fail_readings(name, gone)
        cluster.close(node, stream.session)
        if self._ending is None:
            self._after(cluster)

    def _answer_reading(self, event: HeadMapsRead) -> None:
        _, answer = self._readings.get(event.request_id, ("", None))
        if answer is None or answer.done():
            return
        if isinstance(event.result, ServiceError):
            answer.set_exception(event.result)
        else:
            answer.set_result(event.result)

    def _fail_readings(self, node: str | None, error: ServiceError) -> None:
        """Fail the pending reads of one node, or of all nodes."""
        for name, answer in list(self._readings.values()):
            if node in (None, name) and not answer.done():
                answer.set_exception(error)

    # --- Consequences of input

    def _after(self, cluster: ClusterFleet) -> None:
        """Send pending messages at once, call observers, and start a reconciliation if the cluster changed."""
        self._send(cluster)
        for (replica, _), report in cluster.pending.take_reports().items():
            for observer in self._observers:
                observer.replica_reported(replica, report)
        if cluster.pending.take_capacity():
            for observer in self._observers:
                observer.capacity_changed(cluster.name)
        reconciler = self._reconcilers.get(cluster.name)
        if reconciler is not None and self._ending is None:
            reconciler.begin()

    def _send(self, cluster: ClusterFleet) -> None:
        slow = []
        for node, messages in cluster.messages(self._clock.monotonic()).items():
            name = node_name(cluster.name, node)
            stream = self._streams.get(name)
            if stream is not None and not stream.send(messages):
                slow.append((node, name, stream))
        for node, name, stream in slow:
            _log.warning("an agent does not read its messages fast enough", extra={"node": name})
            self._close(cluster, node, name, stream)

    def _forget(self, cluster: ClusterFleet) -> None:
        """Forget a cluster that is gone."""
        self._reconcilers.pop(cluster.name, None)
        self._clusters.pop(cluster.name, None)
        cluster.end()
        for node in cluster.links:
            stream = self._streams.get(node_name(cluster.name, node))
            if stream is not None:
                stream.end(not_found(cluster.name))

    def lose_leadership(self, error: ServiceError) -> None:
        """End every stream; no further decisions are made."""
        self._ending = self._ending or error
        for stream in list(self._streams.values()):
            stream.end(error)

    def _live_node(self, cluster: ClusterFleet, node: str) -> LiveNode:
        return views.live_node(cluster, node, unix_s=self._clock.time(), now_s=self._clock.monotonic())

    # --- Time

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.tick_s)
            try:
                self.tick()
            except Exception:
                self.counters.errors["tick"] += 1
                _log.exception("a tick of the fleet failed")

    def tick(self) -> None:
        """Handle the passing of time: leases, deadlines, retransmissions, and updates for watchers."""
        now_s = self._clock.monotonic()
        gap_s, self._ticked_s = now_s - self._ticked_s - self._settings.tick_s, now_s
        stood_still = gap_s > _STOOD_STILL * self._settings.tick_s
        if stood_still:
            _log.warning("the planner was stalled", extra={"seconds": round(gap_s, 3)})
        publishes = now_s - self._published_s >= self._settings.publish_s
        for cluster in list(self._clusters.values()):
            if stood_still:
                cluster.leases.stood_still(gap_s, now_s=now_s)
            cluster.pass_time(now_s)
            self._after(cluster)
            if publishes:
                views.publish(cluster, self._hubs, now_s=self._clock.time())
        if publishes:
            self._published_s = now_s


async def _first_of(requests: AsyncIterator[Request]) -> Request:
    try:
        first = await asyncio.wait_for(anext(requests), _HELLO_S)
    except (StopAsyncIteration, TimeoutError):
        raise protocol_violation(f"no hello was received within {_HELLO_S:g} s") from None
    _check_size(first)
    return first


def _check_size(request: Request) -> None:
    if (size := request.ByteSize()) > _MOST_REQUEST_BYTES:
        message = f"a message from an agent has {size} bytes, at most {_MOST_REQUEST_BYTES} are allowed"
        raise ServiceError(Reason.ERROR_REASON_MESSAGE_TOO_LARGE, message, metadata={"max_bytes": _MOST_REQUEST_BYTES})
