"""The answer: ranges of layers, the flow on every link, the rate, and how good it can be at most."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Limit(StrEnum):
    """What keeps a plan from serving more."""

    ROUND_TRIP = "round trip"  # KV room is full, and a request in flight makes a token per round trip
    COMPUTE = "compute"  # a node computes all the time
    LINK = "link"  # the card of a node sends all the time


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedNode:
    """Node ``name`` of type ``kind`` holds layers ``first_layer`` to ``end_layer - 1``, counted from 0."""

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

    A target computes the layers it holds past the last one of the source.
    """

    source: str | None
    target: str | None
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLoad:
    """What a plan does to one node.

    Attributes:
        visits: share of the requests that pass the node.
        layer_share: share of the requests that each held layer computes here, in the order of layers.
        kv_fill: share of its KV room that is taken.
        compute_load, link_load: shares of its capacity that are taken, of computing and of its card.
        visit_s: seconds that a decoding request spends here in one round trip, with the hop that follows.
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
    """What ranges and shares are worth.

    Attributes:
        rate_rps: requests per second.
        flow_rps: those that measured tokens per second and cards alone would allow, a static flow.
        in_flight: requests that KV room is enough for.
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
    """With ``least`` to ``most`` requests in flight, a layer has ``price_s`` seconds of round trip as its price.

    An infinite price: no placement that serves more has so many in flight.
    """

    least: float
    most: float
    price_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RateBound:
    """No placement serves more than ``rate_rps``; the prices prove it, for intervals that cover all there is room for.

    `hetis.solver.layers.bound` says how prices prove a rate. Capacities are counted for placements that serve more than
    ``beyond_rps``, which is at most ``rate_rps``.
    """

    rate_rps: float
    beyond_rps: float
    intervals: tuple[PricedInterval, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersPlan:
    """A placement of layers, what it is worth, and the proof of how good it is.

    Attributes:
        nodes: those that hold layers, by first layer.
        links: those that carry anything.
        bound: no placement in the model serves more; ``gap`` is its distance as a share of the rate.
        idle: names of nodes that hold nothing.
        solver_s: how long the search took, 0 without a clock.
        stopped: the search was cut short.
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
