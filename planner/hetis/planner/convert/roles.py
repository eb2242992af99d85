"""Roles of replicas and the routes between them, as messages and back."""

from __future__ import annotations

from collections.abc import Sequence

from hetis.solver.plan import KvRoute, Role
from hetis.v1 import replica_pb2

TO_PROTO = {
    Role.UNIFIED: replica_pb2.REPLICA_ROLE_UNIFIED,
    Role.PREFILL: replica_pb2.REPLICA_ROLE_PREFILL,
    Role.DECODE: replica_pb2.REPLICA_ROLE_DECODE,
}
FROM_PROTO = {value: role for role, value in TO_PROTO.items()}


def role_of(shape: replica_pb2.ReplicaPlan) -> Role:
    """Return the role of a replica; unified if it was written before roles existed."""
    return FROM_PROTO.get(shape.role, Role.UNIFIED)


def routes_to_proto(routes: Sequence[KvRoute]) -> list[replica_pb2.KvRoute]:
    return [replica_pb2.KvRoute(prefill=one.prefill, decode=one.decode, rate_rps=one.rate) for one in routes]


def routes_from_proto(messages: Sequence[replica_pb2.KvRoute]) -> tuple[KvRoute, ...]:
    return tuple(KvRoute(prefill=one.prefill, decode=one.decode, rate=one.rate_rps) for one in messages)
