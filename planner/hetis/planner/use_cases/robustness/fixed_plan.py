"""A plan with fixed GPUs, layers and head groups, priced under other profiles.

Micro-batches, their number in flight and the prefill chunk are settings of the engine, which may change without a new
plan. So may the routes of KV: the traffic between prefill and decode replicas is the maximum that both sides and the
links allow.

Times come from the derivation of the plan checker (`hetis.solver.check`), which needs no search. Memory does not depend
on coefficients, so a plan that fits always fits.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from hetis.planner.use_cases.grouping import group_replicas
from hetis.solver.check.rederive import Derived, completion_seconds, derive
from hetis.solver.check.replica_shapes import Fleet, ReplicaShape, replica_shape
from hetis.solver.check.setting import Setting
from hetis.solver.cluster import node_of
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Objective, Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Profile
from hetis.solver.workload import WorkloadMoments

Profiles = Mapping[str, Profile]  # by GPU type


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Equal replicas: the inputs of their times with the planned settings, and the zones of their stages in order.

    ``claimed`` is the share of the derived rate that the plan claims; it is below 1 if links are uneven, since the
    worst link counts. ``kv_zones`` are the zones to which prefill replicas may send KV.
    """

    count: int
    shape: ReplicaShape
    claimed: float
    zones: tuple[str, ...]
    kv_zones: tuple[str, ...]


def structure_of(plan: Plan) -> Mapping[str, int]:
    """Return the number of replicas of each shape in words, leaving out batches and chunks, which may change."""
    return dict(sorted(Counter(map(describe, plan.replicas)).items()))


def describe(replica: ReplicaPlan) -> str:
    """Return ``A100-PCIe-80GB TP4 52 layers + 2 L4 | RTX-3090 TP2 ×2 28 layers``, preceded by the role."""
    pools = {pool.stage: pool for pool in replica.attention_workers}
    stages = []
    for position, stage in enumerate(replica.stages):
        text = f"{stage.gpu} {replica.parallel_sizes(stage)} {stage.num_layers} layers"
        if (pool := pools.get(position)) is not None:
            text += f" + {len(pool.devices)} {pool.gpu} ({pool.kv_head_groups} head groups)"
        stages.append(text)
    role = "" if replica.role is Role.UNIFIED else f"{replica.role}: "
    return role + " | ".join(stages)


WITHIN = 1 + 1e-6  # limits are compared up to rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """A plan's rate in requests/s (goodput or saturated, depending on its objective) and worst latencies."""

    rate: float
    ttft_s: float  # p95, of the worst replica
    tpot_s: float  # mean, of the worst replica

    def misses(self, objective: Objective) -> bool:
        """Return whether a latency limit is missed."""
        return any(
            limit is not None and reached > limit * WITHIN
            for reached, limit in ((self.ttft_s, objective.ttft_limit_s), (self.tpot_s, objective.tpot_limit_s))
        )


NOTHING = Performance(rate=0.0, ttft_s=0.0, tpot_s=0.0)


class FixedPlan:
    """A plan that can be priced under different profiles; GPU types without one keep the problem's profile."""

    def __init__(self, plan: Plan, problem: PlacementProblem) -> None:
        """Prepare a plan for pricing.

        Args:
            plan: a plan of valid structure, as `check_plan` requires.
            problem: its cluster, model, workload and objective, and the profiles for the pricing.
        """
        if plan.classes:
            raise InvalidProblemError("what errors of profiles do to pools of classes of requests is not known")
        self._problem, self._planned_share = problem.at(plan.result.utilisation, plan.lanes()), plan.planned_share
        workload = problem.workload.clipped_to(problem.model.max_position)
        self._moments: WorkloadMoments = workload.moments(block_tokens=problem.assumptions.block_tokens)
        self._traffic = Traffic(problem, self._moments)
        self.groups = tuple(self._groups(plan))

    @property
    def gpus(self) -> frozenset[str]:
        """The GPU types on which the plan's times depend."""
        stages = [stage for group in self.groups for stage in group.shape.stages]
        return frozenset(s.gpu for s in stages) | {s.pool.gpu for s in stages if s.pool is not None}

    def as_planned(self, profiles: Profiles, exchange_s: float | None = None) -> Performance:
        """Return the performance with the plan's micro-batches, which may miss limits.

        ``exchange_s`` is what the plugin takes of an exchange with attention workers; None: what is planned.
        """
        problem, alike = self._under(profiles), {(group.shape, group.claimed): group for group in self.groups}
        if exchange_s is not None and (engine := problem.family.engine) is not None:
            plugin = replace(engine.plugin, exchange_s=exchange_s)
            problem = replace(problem, family=replace(problem.family, engine=replace(engine, plugin=plugin)))
        paces = {key: self._pace(problem, group, group.shape) for key, group in alike.items()}  # zones have like groups
        return self._sum((group, paces[group.shape, group.claimed]) for group in self.groups)

    def planned_rate(self, profiles: Profiles) -> float:
        """Return the rate of `as_planned`, which needs no latencies."""
        problem, rates = self._under(profiles), dict[tuple[ReplicaShape, float], float]()
        for group in self.groups:
            if (key := (group.shape, group.claimed)) not in rates:
                setting = Setting.of(problem, self._moments, group.shape)
                rates[key] = group.claimed / completion_seconds(setting, group.shape)
        unified, routed = self._traffic.served([(group, rates[group.shape, group.claimed]) for group in self.groups])
        return self._planned_share * (unified + routed)

    def as_started(self, profiles: Profiles) -> Performance:
        """Return the performance with the engines' settings as they are, at the highest rate within the limits.

        At lower rates than the saturated one fewer requests are in flight. A replica that meets the limits at no rate
        serves nothing.
        """
        problem, paces = self._under(profiles), dict[tuple[ReplicaShape, float], Performance]()
        for group in self.groups:
            if (key := (group.shape, group.claimed)) not in paces:
                most = group.shape.micro_batch
                sizes = sorted({*(size for size in problem.family.micro_batches if size < most), most})
                paces[key] = self._best_of(problem, group, sizes)
        return self._sum((group, paces[group.shape, group.claimed]) for group in self.groups)

    def _under(self, profiles: Profiles) -> PlacementProblem:
        return replace(self._problem, profiles={**self._problem.profiles, **profiles})

    def _groups(self, plan: Plan) -> Iterator[Group]:
        cluster = self._problem.cluster
        zone_of = {group.node_name(i): group.zone for group in cluster.node_groups for i in range(group.count)}
        by_zones: dict[tuple[str, ...], list[ReplicaPlan]] = {}
        for replica in plan.replicas:
            zones = tuple(zone_of[node_of(stage.devices[0])] for stage in replica.stages)
            by_zones.setdefault(zones, []).append(replica)
        found = [(zones, group) for zones, replicas in by_zones.items() for group in group_replicas(replicas)]
        names = {name for _, group in found for name in group.first.devices()}
        fleet = Fleet(cluster=cluster, devices={d.name: d for d in cluster.devices() if d.name in names})
        for zones, group in found:
            shape = replica_shape(group.first, self._problem, fleet)
            claimed = 1.0
            if fleet.has_uneven_links:
                setting = Setting.of(self._problem, self._moments, shape)
                claimed = min(1.0, group.first.rate * completion_seconds(setting, shape))
            yield Group(
                count=len(group.numbers), shape=shape, claimed=claimed, zones=zones, kv_zones=group.first.kv_zones
            )

    def _derive(self, problem: PlacementProblem, shape: ReplicaShape) -> Derived:
        return derive(Setting.of(problem, self._moments, shape), shape)

    def _pace(self, problem: PlacementProblem, group: Group, shape: ReplicaShape) -> Performance:
        derived = self._derive(problem, shape)
        t_s = derived.t_s / group.claimed
        return Performance(rate=1.0 / t_s, ttft_s=derived.ttft_s(t_s), tpot_s=t_s * derived.tpot_per_t)

    def _best_of(self, problem: PlacementProblem, group: Group, sizes: Sequence[int]) -> Performance:
        """Return the performance at the largest of the micro-batch ``sizes`` that keeps the limits."""
        paces = (self._pace(problem, group, replace(group.shape, micro_batch=size)) for size in reversed(sizes))
        return next((pace for pace in paces if not pace.misses(self._problem.objective)), NOTHING)

    def _sum(self, paces: Iterator[tuple[Group, Performance]]) -> Performance:
        found = list(paces)
        unified, routed = self._traffic.served([(group, pace.rate) for group, pace in found])
        return Performance(
            rate=self._planned_share * (unified + routed),
            ttft_s=max((pace.ttft_s for _, pace in found), default=0.0),
            tpot_s=max((pace.tpot_s for _, pace in found), default=0.0),
        )


# --- traffic at given rates of the replicas


class Traffic:
    """The traffic of one problem, independent of its profiles."""

    def __init__(self, problem: PlacementProblem, moments: WorkloadMoments) -> None:
        self._problem, self._moments = problem, moments

    def served(self, rates: Sequence[tuple[Group, float]]) -> tuple[float, float]:
        """Return the saturated requests/s of the unified replicas, and of all others, from the rates of the groups."""
        unified, hops = 0.0, defaultdict[tuple[str, str], float](float)
        prefill = defaultdict[tuple[str, tuple[str, ...]], float](float)
        decode = defaultdict[str, float](float)
        for group, rate in rates:
            match group.shape.role:
                case Role.PREFILL:
                    prefill[group.zones[0], group.kv_zones] += group.count * rate
                case Role.DECODE:
                    decode[group.zones[0]] += group.count * rate
                case _:
                    unified += group.count * rate
                    for pair in pairwise(group.zones):
                        hops[pair] += group.count * rate
        if not prefill:
            return unified, 0.0
        return unified, most_routed(prefill, decode, self._links({zone for zone, _ in prefill}, decode, hops))

    def _links(
        self, senders: Iterable[str], receivers: Iterable[str], hops: Mapping[tuple[str, str], float]
    ) -> dict[tuple[str, str], float]:
        """Return the requests/s whose KV the links between zones can carry besides the hops of unified replicas."""
        model, moments, network = self._problem.model, self._moments, self._problem.cluster.network
        hop_bytes = (moments.mean_computed + moments.mean_output) * model.residual_width * model.activation_bytes
        kv_bytes = model.prompt_kv_bytes(moments.mean_prompt)
        pairs = [(here, there) for here in senders for there in receivers if here != there]
        return {
            pair: max(0.0, network.zone_link(*pair).bytes_per_s - hops.get(pair, 0.0) * hop_bytes) / kv_bytes
            for pair in pairs
        }


# --- traffic that fits between prefill and decode replicas


def most_routed(
    prefill: Mapping[tuple[str, tuple[str, ...]], float],
    decode: Mapping[str, float],
    links: Mapping[tuple[str, str], float],
) -> float:
    """Return the highest rate in requests/s, as a maximum flow.

    KV may take other routes than planned.

    Args:
        prefill: rate of the prefill replicas by their zone and the zones they may send to.
        decode: rate of the decode replicas by their zone.
        links: requests/s whose KV a link carries, by its zones from and to; links within a zone are not needed.
    """
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    for (zone, allowed), rate in prefill.items():
        sender = ("prefill", zone, *allowed)
        graph.add_edge("source", sender, capacity=rate)
        for there in filter(decode.__contains__, allowed):
            link = ("link", zone, there)  # shared by all kinds of senders in a zone
            graph.add_edge(sender, link)
            limit = math.inf if there == zone else links.get((zone, there), 0.0)
            graph.add_edge(link, ("decode", there), capacity=limit)
    for zone, rate in decode.items():
        graph.add_edge(("decode", zone), "sink", capacity=rate)
    return float(nx.maximum_flow_value(graph, "source", "sink"))
