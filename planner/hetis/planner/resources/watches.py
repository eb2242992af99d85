"""WatchCluster: the present state of a cluster, then every change; can be resumed by a token.

The hub records only *which* resource has changed; the state of a node is read when the watcher is ready for it. So a
slow watcher receives the newest state, and the present state needs no copy in memory. However many watchers there are,
a state is read once per change.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from google.protobuf.message import Message

from hetis.planner.convert import names
from hetis.planner.convert.clusters import (
    BASIC,
    FULL,
    basic_redispatch,
    basic_replica,
    cluster_message,
    redispatch_message,
)
from hetis.planner.convert.names import last_part, timestamp
from hetis.planner.failures import Reason, ServiceError, not_found
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import ClusterHub, Hubs
from hetis.planner.fleet.views import show_live
from hetis.planner.resources.checks import check
from hetis.planner.resources.nodes import NodeReader, NodeViews
from hetis.planner.resources.pages import read_page, read_page_request
from hetis.planner.store import ClusterRecord, Reader, ReplicaRecord, Store
from hetis.planner.watching import Event, LeftBehindError
from hetis.v1 import cluster_pb2, redispatch_pb2, replica_pb2, view_pb2
from hetis.v1 import cluster_service_pb2 as pb


def replica_now(fleet: LiveFleet, record: ReplicaRecord, view: view_pb2.View.ValueType) -> replica_pb2.Replica:
    """Return a replica's live state, or the stored one if the fleet does not know the replica."""
    message = deepcopy(record.body) if view == FULL else basic_replica(record.body)
    message.name, message.plan = record.name, record.plan
    message.state, message.generation = record.state, record.generation
    if view == FULL:
        fleet.show_replica(message)
    elif (live := fleet.replica_view(record.name)) is not None:
        show_live(message, live)
    return message


@dataclass(slots=True, eq=False)
class RunningResources:
    """The resources ``clusters/{cluster}/replicas/{replica}`` and ``clusters/{cluster}/redispatches/{redispatch}``."""

    _store: Store
    _fleet: LiveFleet

    async def get_replica(self, request: pb.GetReplicaRequest) -> pb.GetReplicaResponse:
        check(request, name=names.REPLICA)
        record = await self._store.require(Reader.replicas, request.name)
        return pb.GetReplicaResponse(replica=replica_now(self._fleet, record, request.view or FULL))

    async def list_replicas(self, request: pb.ListReplicasRequest) -> pb.ListReplicasResponse:
        check(request, optional=("plan",), parent=names.CLUSTER, plan=names.PLAN)
        records, token = await read_page(
            self._store, request, Reader.replicas, parent=request.parent, plan=request.plan
        )
        replicas, token = read_page_request(request).fitting(
            records, token, lambda record: replica_now(self._fleet, record, BASIC), Reader.replicas.place_of
        )
        return pb.ListReplicasResponse(replicas=replicas, next_page_token=token)

    async def get_redispatch(self, request: pb.GetRedispatchRequest) -> pb.GetRedispatchResponse:
        check(request, name=names.REDISPATCH)
        record = await self._store.require(Reader.redispatches, request.name)
        return pb.GetRedispatchResponse(redispatch=redispatch_message(record, view=request.view or FULL))

    async def list_redispatches(self, request: pb.ListRedispatchesRequest) -> pb.ListRedispatchesResponse:
        check(request, optional=("replica",), parent=names.CLUSTER, replica=names.REPLICA)
        records, token = await read_page(
            self._store, request, Reader.redispatches, parent=request.parent, replica=request.replica
        )
        redispatches = [redispatch_message(record, view=BASIC) for record in records]
        return pb.ListRedispatchesResponse(redispatches=redispatches, next_page_token=token)


Response = pb.WatchClusterResponse
ClusterEvent = Event[tuple[str, str], Message]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeToken:
    """The point up to which a watcher has seen a cluster."""

    made: float  # when the cluster was created, which distinguishes it from an earlier one of the same name
    round: int  # which of the cluster's hubs was watched
    sequence: int  # last one seen in that hub; 0 if the present state was not seen in full: the watch starts over

    def to_text(self) -> str:
        return f"{self.made.hex()}:{self.round}:{self.sequence}"

    def at(self, sequence: int) -> ResumeToken:
        return replace(self, sequence=sequence)

    @classmethod
    def from_text(cls, text: str) -> ResumeToken | None:
        """Return the token in a text, or None if the text is not a valid token."""
        try:
            made, round_, sequence = text[:100].split(":")
            return cls(made=float.fromhex(made), round=int(round_), sequence=int(sequence))
        except (ValueError, OverflowError):
            return None


@dataclass(slots=True, eq=False)
class ClusterWatches:
    """All watches of clusters."""

    _store: Store
    _hubs: Hubs
    _fleet: LiveFleet
    _reader: NodeReader

    async def watch(self, request: pb.WatchClusterRequest) -> AsyncIterator[Response | bytes]:
        """Yield changes until the cluster is deleted (NOT_FOUND), or the planner shuts down (DRAINING) or its term is
        over (NOT_LEADER).
        """
        check(request, name=names.CLUSTER)
        record = await self._read(request.name)  # first, so that no hub is created for a cluster that does not exist
        token = ResumeToken.from_text(request.resume_token)
        is_new = not request.resume_token
        while True:
            hub = self._hubs.cluster(request.name)
            here = ResumeToken(made=record.create_time_s, round=self._hubs.round_of(request.name), sequence=0)
            try:
                async for response in self._watch(hub, here, token, record.name, is_new=is_new):
                    yield response
            except LeftBehindError:
                token, is_new = None, False
                continue
            if (await self._read(request.name)).create_time_s != record.create_time_s:
                raise not_found(request.name)
            if self._hubs.cluster(request.name) is hub:
                raise ServiceError(Reason.ERROR_REASON_DRAINING, "this planner is shutting down: resume")
            token, is_new = None, False  # so much has changed that the present state is sent again

    async def _watch(
        self, hub: ClusterHub, here: ResumeToken, token: ResumeToken | None, name: str, *, is_new: bool
    ) -> AsyncIterator[Response | bytes]:
        """Yield changes until ``hub`` closes. ``here`` is the watcher's position, with no sequence yet."""
        begin = hub.sequence
        # If any change since the token is unknown, the present state is sent again.
        is_here = token is not None and (token.made, token.round) == (here.made, here.round) and token.sequence > 0
        resumes = token is not None and is_here and not hub.is_too_old(token.sequence)
        if not resumes:
            async for response in self._present_state(name, here, reset=not is_new):
                yield response
            yield self._caught_up(here.at(begin))
        after = token.sequence if token is not None and resumes else begin
        async for change in self._changes(hub, here, name, after, is_resumed=resumes):
            yield change

    async def _read(self, name: str) -> ClusterRecord:
        return await self._store.require(Reader.clusters, name)

    async def _present_state(self, name: str, here: ResumeToken, *, reset: bool) -> AsyncIterator[Response]:
        try:
            views = await self._reader.read(name)
        except ServiceError as error:
            if error.reason == Reason.ERROR_REASON_NOT_FOUND:
                self._hubs.remove_cluster(name)  # deleted since the watch began: the new hub would never be removed
            raise
        replicas, redispatches = await self._store.read(
            lambda tx: (tx.replicas.all(cluster=name), tx.redispatches.all(cluster=name))
        )
        token, now = here.to_text(), timestamp(self._store.clock())
        cluster = cluster_message(views.cluster, view=BASIC, num_connected=self._fleet.num_connected(name))
        yield Response(resume_token=token, event_time=now, reset=reset, cluster=cluster)
        for node in views.ids():
            yield Response(resume_token=token, event_time=now, node=views.node(node, BASIC))
        for replica in (replica_now(self._fleet, record, BASIC) for record in replicas):
            yield Response(resume_token=token, event_time=now, replica=replica)
        for redispatch in (redispatch_message(record, view=BASIC) for record in reversed(redispatches)):  # oldest first
            yield Response(resume_token=token, event_time=now, redispatch=redispatch)

    def _caught_up(self, at: ResumeToken) -> Response:
        return Response(resume_token=at.to_text(), event_time=timestamp(self._store.clock()), caught_up=True)

    async def _changes(
        self, hub: ClusterHub, here: ResumeToken, name: str, after: int, *, is_resumed: bool
    ) -> AsyncIterator[Response | bytes]:
        """Yield the changes after ``after``, each read and encoded once for all watchers of the hub.

        With ``is_resumed``, also announce when the watcher has caught up.
        """
        async for events in hub.watch(after):
            for content in await self._encoded(hub, here, name, events):
                if content:
                    yield content
            if is_resumed:
                is_resumed = False
                yield self._caught_up(here.at(events[-1].sequence if events else after))

    async def _encoded(
        self, hub: ClusterHub, here: ResumeToken, name: str, events: Sequence[ClusterEvent]
    ) -> list[bytes]:
        """Return the responses about these events; an empty one stands for an event of which there is nothing to say.

        Raises NOT_FOUND if there is no such cluster any more.
        """
        async with hub.encoding:  # concurrent watchers then find what the first one encodes
            found = {event.sequence: hub.encoded.get(event.sequence) for event in events}
            new = [event for event in events if found[event.sequence] is None]
            nodes = [last_part(event.key[1]) for event in new if event.key[0] == "node"]
            views = await self._reader.read(name, nodes) if nodes else None
            for event in new:
                response = self._response(event, views)
                if response is not None:
                    response.resume_token = here.at(event.sequence).to_text()
                    response.event_time.CopyFrom(timestamp(event.time_s))
                content = b"" if response is None else response.SerializeToString()
                found[event.sequence] = content
                hub.keep_encoded(event.sequence, content)
            return [content for content in found.values() if content is not None]

    def _response(self, event: ClusterEvent, views: NodeViews | None) -> Response | None:
        kind, name = event.key
        if kind == "node" and views is not None:
            node = last_part(name)
            return Response(node=views.node(node, BASIC)) if views.exists(node) else Response(removed_node=name)
        match event.value:
            case None if kind == "replica":
                return Response(removed_replica=name)
            case cluster_pb2.Cluster() as cluster:
                now = deepcopy(cluster)
                now.num_connected_nodes = self._fleet.num_connected(name)
                return Response(cluster=now)
            case replica_pb2.Replica() as replica:
                return Response(replica=basic_replica(replica))
            case redispatch_pb2.Redispatch() as redispatch:
                return Response(redispatch=basic_redispatch(redispatch))
        return None
