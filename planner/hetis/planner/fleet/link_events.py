"""Events from a node's stream that the cluster acts on."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.planner.failures import ServiceError
from hetis.planner.fleet.deltas import DeltaAnswer
from hetis.planner.fleet.head_map_pieces import HeadMaps
from hetis.v1 import change_pb2, inventory_pb2, report_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A newer report came.

    Attributes:
        replicas: reports of the replicas in it.
        changed: replicas of which more than numbers changed.
    """

    replicas: tuple[report_pb2.ReplicaReport, ...]
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryReceived:
    """The node's inventory came."""

    inventory: inventory_pb2.NodeInventory


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A delta was acknowledged or refused."""

    answer: DeltaAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """The node holds a later generation than it was to be given: a new one must be chosen, above ``held``."""

    replica: str
    held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """The node reported the phase of a change."""

    status: change_pb2.ChangeStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMapsRead:
    """The answer to a request for head maps."""

    request_id: str
    result: HeadMaps | ServiceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fenced:
    """The node has obeyed a newer planner: this one has lost its authority."""

    newest_epoch: int


LinkEvent = Reported | InventoryReceived | Answered | Behind | Progressed | HeadMapsRead | Fenced
