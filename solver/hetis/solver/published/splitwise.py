"""`splitwise-paper`: pools of equal machines, as Splitwise (ISCA'24, arXiv 2311.18677) provisions them.

A machine runs one instance of the model, tensor parallel over its GPUs. Machines of one kind prefill (the prompt pool)
and machines of one kind decode (the token pool); both kinds may be the same. The search over kinds and numbers takes
the pair of pools that serves most. Machines that neither pool needs form the mixed pool, which does both.

Reconstructed, or required by our model beyond the paper:

- Splitwise buys DGX machines. Here the fleet is given, and the search also decides how its nodes are cut into machines:
  TP groups of one size inside nodes, up to `MAX_STAGES` of them in a pipeline if one does not hold the model.
- Splitwise evaluates a provisioning with its simulator under latency limits; here the cost model's rate within the
  limits does.
- Splitwise moves machines into the mixed pool and back as queues grow and shrink. A plan's replicas keep their roles,
  so the mixed pool is what the search does not use, and keeps its size.
- KV is sent from every prompt machine to every token machine in equal shares, within a zone. The simulator's router
  `fewest-tokens` chooses among them as Splitwise does (the shortest queue).
- (b, M, C) and the layers follow from our family, for the highest rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.solve import replica_plan
from hetis.solver.placement.tables import Atlas
from hetis.solver.placement.tabulation import build_atlas
from hetis.solver.placement.template import Template
from hetis.solver.plan import KvRoute, Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.graph import FleetGraph, graph_of
from hetis.solver.published.parallelism import ReplicaSearch
from hetis.solver.published.pipelines import duty_of
from hetis.solver.published.plans import WITHOUT_PROOF, HeuristicPlan, named_stages, no_plan, plan_of, refuse_larger

MAX_GPUS = 1024  # every prompt machine has a route to every token machine
MAX_STAGES = 8  # TP groups per machine
ROUNDING = 1e-9

NOTES = (
    WITHOUT_PROOF,
    "Splitwise reconstructed: machines cut from nodes, a mixed pool that keeps its size (docs/strategies.md)",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of machine: the GPUs of each one in the zone, and its replica in each role that it can have."""

    members: tuple[tuple[int, ...], ...]
    replicas: Mapping[Role, Template]

    def rate(self, role: Role) -> float:
        return self.replicas[role].rate if role in self.replicas else 0.0


@dataclass(frozen=True, slots=True)
class Pools:
    """The kinds and sizes of the prompt and the token pool; the rest of both kinds is mixed."""

    prompt: Machine
    token: Machine
    num_prompt: int
    num_token: int

    def split_rate(self) -> float:
        """Return the requests/s through both pools."""
        return min(self.num_prompt * self.prompt.rate(Role.PREFILL), self.num_token * self.token.rate(Role.DECODE))

    def assigned(self) -> Iterator[tuple[Role, Machine, tuple[int, ...]]]:
        """Yield role, kind and GPUs of every machine; the rest of kinds that cannot do both is idle."""
        prompt, token = self.prompt.members, self.token.members
        if self.prompt is self.token:
            token = token[self.num_prompt :]
            rest = [(self.token, gpus) for gpus in token[self.num_token :]]
        else:
            rest = [(self.prompt, gpus) for gpus in prompt[self.num_prompt :]]
            rest += [(self.token, gpus) for gpus in token[self.num_token :]]
        yield from ((Role.PREFILL, self.prompt, gpus) for gpus in prompt[: self.num_prompt])
        yield from ((Role.DECODE, self.token, gpus) for gpus in token[: self.num_token])
        yield from ((Role.UNIFIED, kind, gpus) for kind, gpus in rest if Role.UNIFIED in kind.replicas)

    def rate(self) -> float:
        """Return the total requests/s."""
        mixed = sum(kind.rate(role) for role, kind, _ in self.assigned() if role is Role.UNIFIED)
        return self.split_rate() + mixed


def solve_splitwise(problem: PlacementProblem, *, budget: Budget, seed: int, report: Report) -> Plan:
    """Return the plan that Splitwise's provisioning finds; ``seed`` has no effect.

    Raises:
        NoPlanFoundError: it finds none, which proves nothing.
    """
    refuse_larger(problem, MAX_GPUS, strategy="splitwise-paper", does="sends from every machine to every other")
    if not problem.family.splits_roles:
        raise NoPlanFoundError("splitwise-paper needs prefill and decode replicas")
    if problem.cluster.num_gpus() < 2:
        raise NoPlanFoundError("splitwise-paper needs two GPUs at least, one to prefill and one to decode")
    atlas = build_atlas(problem)
    graph = graph_of(atlas)
    replicas: list[ReplicaPlan] = []
    routes: list[KvRoute] = []
    for zone in problem.cluster.zones():
        found = best_pools(machines(atlas, graph, zone, budget))
        report(Progress(phase=f"pools of zone {zone}", elapsed_s=budget.elapsed_s()))
        if found is not None:
            routes += _routes(found, len(replicas))
            replicas += [
                replica_plan(atlas, kind.replicas[role], named_stages(atlas, graph, gpus, kind.replicas[role]))
                for role, kind, gpus in found.assigned()
            ]
    if not replicas or budget.is_spent():
        raise no_plan(budget, "splitwise-paper found no pools that serve a request within the limits")
    return plan_of(
        atlas, "splitwise-paper", HeuristicPlan(replicas=tuple(replicas), kv_routes=tuple(routes), notes=NOTES), budget
    )


def machines(atlas: Atlas, graph: FleetGraph, zone: str, budget: Budget) -> list[Machine]:
    """Return all kinds of machines that a zone's nodes can be cut into and that can prefill or decode."""
    search, found = ReplicaSearch(atlas), list[Machine]()
    duties = {role: duty_of(atlas, role, zone) for role in atlas.problem.family.roles}
    for rank, (device_class, tp) in enumerate(atlas.ranks):
        groups = _tp_groups(graph, zone, device_class, tp)
        for stages in range(1, min(MAX_STAGES, len(groups)) + 1):
            if budget.is_spent():
                return []
            fitting = {role: search.at_best_setting((rank,) * stages, duty) for role, duty in duties.items()}
            replicas = {role: template for role, template in fitting.items() if template is not None}
            if Role.PREFILL in replicas or Role.DECODE in replicas:
                found.append(Machine(_joined(groups, stages), replicas))
    return found


def best_pools(kinds: Sequence[Machine]) -> Pools | None:
    """Return the pools with the highest rate, or None if no two machines can prefill and decode."""
    gpus = {id(kind): frozenset(gpu for member in kind.members for gpu in member) for kind in kinds}
    found: list[Pools] = []
    for prompt in kinds:
        for token in kinds:
            if prompt is not token and gpus[id(prompt)] & gpus[id(token)]:
                continue  # all GPUs of a pool's type are cut alike
            num_prompt, num_token = pool_sizes(
                prompt.rate(Role.PREFILL), token.rate(Role.DECODE), len(prompt.members), len(token.members),
                is_same=prompt is token,
            )  # fmt: skip
            if num_prompt and num_token:
                found.append(Pools(prompt, token, num_prompt, num_token))
    return max(found, key=Pools.rate, default=None)


def pool_sizes(
    prompt_rate: float, token_rate: float, most_prompt: int, most_token: int, *, is_same: bool
) -> tuple[int, int]:  # fmt: skip
    """Return the fewest prompt and token machines with the highest flow, or (0, 0) if none serve anything.

    Args:
        prompt_rate, token_rate: requests/s of one machine in each pool.
        most_prompt, most_token: available machines, which are the same ones if ``is_same``.
    """
    if prompt_rate <= 0.0 or token_rate <= 0.0:
        return 0, 0
    splits = [(p, most_prompt - p) for p in range(1, most_prompt)] if is_same else [(most_prompt, most_token)]
    flow = max((min(p * prompt_rate, t * token_rate) for p, t in splits), default=0.0)
    return math.ceil(flow / prompt_rate - ROUNDING), math.ceil(flow / token_rate - ROUNDING)


def _tp_groups(graph: FleetGraph, zone: str, device_class: int, tp: int) -> list[tuple[int, ...]]:
    """Return the GPUs of every TP group of this size that the nodes of a zone hold."""
    by_node: dict[str, list[int]] = defaultdict(list)
    for gpu in range(graph.num_gpus):
        if graph.zones[gpu] == zone and graph.device_class[gpu] == device_class:
            by_node[graph.nodes[gpu]].append(gpu)
    return [
        tuple(gpus[start : start + tp]) for gpus in by_node.values() for start in range(0, len(gpus) - tp + 1, tp)
    ]  # fmt: skip


def _joined(groups: Sequence[tuple[int, ...]], stages: int) -> tuple[tuple[int, ...], ...]:
    """Return machines of ``stages`` TP groups each, in the order of the nodes."""
    starts = range(0, len(groups) - stages + 1, stages)
    return tuple(tuple(gpu for group in groups[start : start + stages] for gpu in group) for start in starts)


def _routes(pools: Pools, first: int) -> Iterator[KvRoute]:
    """Yield equal shares from every prompt to every token machine, whose replicas are numbered from ``first`` on."""
    share = pools.split_rate() / (pools.num_prompt * pools.num_token)
    for prefill in range(first, first + pools.num_prompt):
        for decode in range(first + pools.num_prompt, first + pools.num_prompt + pools.num_token):
            yield KvRoute(prefill=prefill, decode=decode, rate=share)
