"""`hetis-paper`: the search that Hetis (SC'25, arXiv 2509.08309) describes, under our cost model.

Data parallelism comes first: the GPUs of every type are dealt evenly to d replicas, in the order of their nodes. In
each replica the dense path is found by the 5% rule (`dense_path.py`), and types that left become attention workers of
the whole replica (`shared_pool.py`). The degree d with the least cost per request is taken.

Reconstructed, or required by our model beyond the paper:

- The joint cost of d replicas is that of one request divided among them, 1 / (sum of 1 / C). Degrees are tried from
  the cheapest on. The first one at which every replica fits memory and limits is taken, or else the one with the
  highest rate.
- Each replica lies in one zone, and every zone is planned separately.
- A pool has one GPU type: of several that left, the one that serves best. The others, and GPUs that an uneven deal
  leaves, are idle.
- (b, M, C), the layers and the share of head groups then follow from our family, for the highest rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.placement.solve import replica_plan
from hetis.solver.placement.tables import Atlas
from hetis.solver.placement.tabulation import build_atlas
from hetis.solver.placement.template import Template, kv_tokens_held
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.dense_path import DensePath, dense_path
from hetis.solver.published.graph import FleetGraph, graph_of
from hetis.solver.published.parallelism import Composition, composition
from hetis.solver.published.pipelines import ReplicaDuty, duty_of
from hetis.solver.published.plans import (
    WITHOUT_PROOF,
    HeuristicPlan,
    named_stages,
    no_plan,
    plan_of,
    refuse_larger,
    weight_bytes,
)
from hetis.solver.published.shared_pool import SharedPool, best_with_pool, worker_cost

MAX_GPUS = 4096  # GPUs are dealt one by one

NOTES = (
    WITHOUT_PROOF,
    "Hetis reconstructed: the cost's terms, whole types leaving the dense path, one share of head groups for all "
    "stages (docs/strategies.md)",
)


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """The GPUs of one replica and its dense path."""

    gpus: tuple[int, ...]
    path: DensePath


def solve_hetis_paper(problem: PlacementProblem, *, budget: Budget, seed: int, report: Report) -> Plan:
    """Return the plan that the search of Hetis finds; ``seed`` has no effect.

    Raises:
        NoPlanFoundError: it finds none, which proves nothing.
    """
    refuse_larger(problem, MAX_GPUS, strategy="hetis-paper", does="deals out GPU by GPU")
    atlas = build_atlas(problem)
    graph = graph_of(atlas)
    replicas: list[ReplicaPlan] = []
    for zone in problem.cluster.zones():
        replicas += _of_zone(atlas, graph, duty_of(atlas, Role.UNIFIED, zone), zone, budget, report)
    if not replicas:
        raise no_plan(budget, "hetis-paper found no replica that keeps memory and limits")
    notes = (*NOTES, *_who_serves_attention(replicas))
    return plan_of(atlas, "hetis-paper", HeuristicPlan(replicas=tuple(replicas), notes=notes), budget)


def _who_serves_attention(replicas: Sequence[ReplicaPlan]) -> Iterator[str]:
    """Yield a note on the attention workers, or on why there are none, for readers who look for them."""
    pools = {pool.gpu for replica in replicas for pool in replica.attention_workers}
    if pools:
        yield f"attention workers of whole replicas: {', '.join(sorted(pools))}"
    else:
        yield "no attention workers: no type left the dense path, or giving head groups to those that did serves less"


def _of_zone(
    atlas: Atlas, graph: FleetGraph, duty: ReplicaDuty, zone: str, budget: Budget, report: Report
) -> list[ReplicaPlan]:
    """Return the replicas of one zone at the cheapest feasible degree of data parallelism."""
    degrees = sorted(_degrees(atlas, graph, duty, zone), key=_cost_together)
    search = _PoolSearch(atlas, duty)
    best: list[tuple[ReplicaShare, Template]] = []
    for shares in degrees:
        if budget.is_spent():
            break
        found = [(share, search.best(composition(graph, share.gpus), share.path)) for share in shares]
        valid = [(share, template) for share, template in found if template is not None]
        if _rate(valid) > _rate(best):
            best = valid
        report(Progress(phase=f"{len(shares)} replicas", elapsed_s=budget.elapsed_s(), incumbent=_rate(best)))
        if valid and len(valid) == len(shares):
            best = valid
            break
    return [_replica(atlas, graph, share.gpus, template) for share, template in best]


def _degrees(atlas: Atlas, graph: FleetGraph, duty: ReplicaDuty, zone: str) -> Iterator[list[ReplicaShare]]:
    """Yield the replicas' shares for every number of replicas whose dense paths hold the weights."""
    members: dict[int, list[int]] = defaultdict(list)
    for gpu in range(graph.num_gpus):
        if graph.zones[gpu] == zone:
            members[int(graph.device_class[gpu])].append(gpu)
    room = float(sum(graph.room_bytes[gpus].sum() for gpus in members.values()))
    paths: dict[Composition, DensePath | None] = {}
    for degree in range(1, max(1, int(room / weight_bytes(atlas.problem.model))) + 1):
        shares = []
        for number in range(degree):
            gpus = tuple(gpu for all_of in members.values() for gpu in _dealt(all_of, degree, number))
            group = composition(graph, gpus)
            if group not in paths:
                paths[group] = dense_path(atlas, duty, group) if group else None
            path = paths[group]
            if path is None:
                break
            shares.append(ReplicaShare(gpus, path))
        else:
            yield shares


def _dealt(gpus: Sequence[int], degree: int, number: int) -> Sequence[int]:
    each = len(gpus) // degree
    return gpus[number * each : (number + 1) * each]


def _cost_together(shares: Sequence[ReplicaShare]) -> float:
    return 1.0 / sum(1.0 / share.path.cost_s for share in shares)


def _rate(chosen: Sequence[tuple[ReplicaShare, Template]]) -> float:
    return sum(template.rate for _, template in chosen)


class _PoolSearch:
    """A search for the best setting of a replica with its attention workers; equal replicas are searched once."""

    def __init__(self, atlas: Atlas, duty: ReplicaDuty) -> None:
        self._atlas, self._duty = atlas, duty
        self._found: dict[Composition, Template | None] = {}

    def best(self, group: Composition, path: DensePath) -> Template | None:
        if group not in self._found:
            pools = list(self._pools(group, path)) or [None]
            found = [best_with_pool(self._atlas, self._duty, path.ranks, pool) for pool in pools]
            templates = [template for template in found if template is not None]
            self._found[group] = max(templates, key=lambda template: template.rate, default=None)
        return self._found[group]

    def _pools(self, group: Composition, path: DensePath) -> Iterator[SharedPool | None]:
        """Yield all cards of each type that left, up to a pool size of the family."""
        for device_class, nodes in group:
            sizes = [size for size in self._atlas.pool_sizes if size <= sum(nodes)]
            if device_class in path.leavers and sizes:
                yield SharedPool(device_class, max(sizes))


def _replica(atlas: Atlas, graph: FleetGraph, gpus: Sequence[int], template: Template) -> ReplicaPlan:
    """Return the replica on named GPUs; the cards of its pool are listed with every stage that they serve."""
    stages = named_stages(atlas, graph, gpus, template)
    pooled = [stage for stage in template.stages if stage.pool_class >= 0]
    if not pooled:
        return replica_plan(atlas, template, stages)
    device_class, cards = pooled[0].pool_class, pooled[0].pool_cards
    workers = [graph.names[gpu] for gpu in gpus if graph.device_class[gpu] == device_class][:cards]
    for stage, bound in zip(template.stages, stages, strict=True):
        if stage.pool_class >= 0:
            bound.workers.extend(workers)
    plan = replica_plan(atlas, template, stages)
    return replace(
        plan,
        kv_tokens=min(plan.kv_tokens, _shared_room(atlas, template, SharedPool(device_class, cards))),
        attention_workers=tuple(replace(pool, shared=True) for pool in plan.attention_workers),
    )


def _shared_room(atlas: Atlas, template: Template, pool: SharedPool) -> int:
    """Return the replica's tokens whose KV fits on the fullest card, over all stages."""
    t = atlas.scopes[template.scope].tables
    per_token = 0.0
    for i, stage in enumerate(template.stages):
        if stage.pool_class >= 0:
            held, _ = kv_tokens_held(atlas, template, stage)
            requests = held * int(t.micro_batch[template.mix])
            pairs = np.ceil(requests * stage.pool_groups * int(t.rank_tp[stage.rank]) / pool.cards - 1e-9)
            layers = stage.layers + (t.prefix_layers if i == 0 else 0)
            per_token += layers * float(pairs) / requests * t.kv_group_bytes
    return int(worker_cost(atlas, pool).room_bytes() / per_token)
