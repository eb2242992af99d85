"""Plans of layers: ranges of layers, the flow on every link, the rate, and an upper bound on any rate."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Limit(StrEnum):
    """The limit that keeps a plan from serving more."""

    ROUND_TRIP = "round trip"  # KV room is full, and a request in flight produces a token per round trip
    COMPUTE = "compute"  # a node computes all the time
    LINK = "link"  # the network card of a node sends all the time


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedNode:
    """Node ``name`` of type ``kind``, which holds layers ``first_layer`` to ``end_layer - 1``, counted from 0."""

    name: str
    kind: str
    first_layer: int
    num_layers: int

    @property
    def end_layer(self) -> int:
        return self.first_layer + self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkShare:
    """The share of all requests that go from ``source`` to ``target``; None is the coordinator, at both ends.

    A target computes the layers that it holds after the last one of the source.
    """

    source: str | None
    target: str | None
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLoad:
    """The load of one node under a plan.

    Attributes:
        visits: share of the requests that pass through the node.
        layer_share: share of the requests for which each held layer is computed here, in the order of layers.
        kv_fill: share of its KV room in use.
        compute_load, link_load: shares in use of its computing capacity and of its network card.
        visit_s: seconds that a decoding request spends here in one round trip, including the following hop.
    """

    node: PlacedNode
    visits: float
    layer_share: tuple[float, ...]
    kv_fill: float
    compute_load: float
    link_load: float
    visit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The value of ranges and shares.

    Attributes:
        rate_rps: requests per second.
        flow_rps: requests per second that measured token rates and cards alone would allow, a static flow.
        in_flight: requests for which there is KV room.
        round_trip_s: seconds per output token of a request in flight.
        limit: what binds, at node ``limit_node``.
    """

    rate_rps: float
    flow_rps: float
    in_flight: float
    round_trip_s: float
    limit: Limit
    limit_node: str
    loads: tuple[NodeLoad, ...]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PricedInterval:
    """A price of ``price_s`` seconds of round trip per layer, for ``least`` to ``most`` requests in flight.

    With an infinite price, no placement that serves more has so many in flight.
    """

    least: float
    most: float
    price_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RateBound:
    """No placement serves more than ``rate_rps``, as the prices prove for intervals that cover all of the KV room.

    `hetis.solver.layers.bound` explains how prices prove a rate. Capacities are counted for placements that serve more
    than ``beyond_rps``, which is at most ``rate_rps``.
    """

    rate_rps: float
    beyond_rps: float
    intervals: tuple[PricedInterval, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersPlan:
    """A placement of layers, its value, and the proof of how good it is.

    Attributes:
        nodes: those that hold layers, by first layer.
        links: those that carry anything.
        bound: no placement in the model serves more; ``gap`` is its distance as a ratio to the rate.
        idle: names of nodes that hold nothing.
        solver_s: duration of the search, 0 without a clock.
        stopped: whether the search was cut short.
    """

    nodes: tuple[PlacedNode, ...]
    links: tuple[LinkShare, ...]
    judgement: Judgement
    bound: RateBound
    idle: tuple[str, ...] = ()
    solver_s: float = 0.0
    stopped: bool = False

    @property
    def rate_rps(self) -> float:
        return self.judgement.rate_rps

    @property
    def flow_rps(self) -> float:
        return self.judgement.flow_rps

    @property
    def bound_rps(self) -> float:
        return self.bound.rate_rps

    @property
    def gap(self) -> float:
        return self.bound_rps / self.rate_rps - 1
