"""Plans that survive a loss against all plans of tiny fleets: every replica on every node, slower ones included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.check import check_plan
from hetis.solver.cluster import GpuSlots, NodeGroup
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.placement.candidates import candidates_of
from hetis.solver.placement.families import run_by
from hetis.solver.placement.losses.survival import Survive
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import Objective, ObjectiveKind, Role
from hetis.solver.planning import solve_surviving
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import Workload
from tests.solver.instances import make_problem, make_profile
from tests.solver.placement.losses.test_survival import left_by
from tests.solver.placement.test_classes import TRAFFIC, workload

SIZES = Family(max_pool=0, tp_sizes=(1, 2), micro_batches=(1, 4), chunk_tokens=(64,), roles=(Role.UNIFIED,))


@dataclass(frozen=True)
class Whole:
    """A plan on nodes: what it serves, what is left of it, its GPUs, replicas over several nodes, and shapes."""

    rate: float
    left: float
    gpus: int
    several: int
    shapes: int


def fleet(nodes: tuple[tuple[str, int, str], ...], **given: float) -> PlacementProblem:
    """Return a problem of nodes: each has a GPU type, a number of GPUs, and a zone."""
    names = {gpu for gpu, _, _ in nodes}
    profiles = {
        "fast": make_profile(
            "fast", bytes_per_s=9e10, flops=given.get("flops", 9e12), usable_bytes=int(given.get("fast", 30e6))
        ),
        "slow": make_profile("slow", usable_bytes=int(given.get("slow", 30e6))),
    }
    groups = [
        NodeGroup(name=f"n{i}", gpus=(GpuSlots(gpu=gpu, count=count),), count=1, zone=zone)
        for i, (gpu, count, zone) in enumerate(nodes)
    ]
    family = run_by(SIZES, EngineRules(name="vllm", max_stages=2))
    problem = make_problem(groups, profiles={name: profiles[name] for name in names}, family=family)
    goal = Objective(kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=None, tpot_limit_s=None)
    return replace(problem, objective=goal)


Parts = tuple[tuple[int, int], ...]  # (device class, GPUs)
Served = tuple[float, ...]  # requests/s of each class of requests over its share of them


def replicas_of(problem: PlacementProblem) -> list[tuple[Served, Parts]]:
    """Return what every replica serves, and its parts, the slower ones of small batches included."""
    shares, found = problem.workload.shares or {"": 1.0}, set[tuple[Served, Parts]]()
    for names in problem.ranges():
        share = sum(shares[name] for name in names or shares)
        for rate, parts in replicas_of_range(problem.of_classes(names)):
            found.add((tuple(rate / share if not names or name in names else 0.0 for name in shares), parts))
    return sorted(found)


def replicas_of_range(problem: PlacementProblem) -> list[tuple[float, Parts]]:
    """Return the rate and the parts of every replica for all requests."""
    found = set[tuple[float, Parts]]()
    for batch in problem.family.micro_batches:
        costs = build_cost_tables(replace(problem, family=replace(problem.family, micro_batches=(batch,))))
        for each in candidates_of(costs)[0]:
            every = np.flatnonzero(each.fits)
            known = each.found_among(every, np.full(len(every), np.inf))
            rates = 1.0 / each.evaluator.shortest_s[known]
            for rate, i in zip(rates.tolist(), known.tolist(), strict=True):
                found.add((rate, tuple((c, size) for c, sizes in each.kind(i) for size in sizes)))
    return sorted(found)


def plans_of(problem: PlacementProblem, place: str, *, counts_shapes: bool = False) -> Iterator[Whole]:
    """Yield every choice of replicas with every way to put their parts on nodes.

    If it ``counts_shapes``, only the fastest replica on the same GPUs is one, and plans of other shapes are others.
    """
    costs, replicas = build_cost_tables(problem), replicas_of(problem)
    if counts_shapes:
        fastest = {(parts, *(one > 0.0 for one in served)): (served, parts) for served, parts in replicas}
        replicas = list(fastest.values())
    groups = list(problem.cluster.node_groups)
    class_of = {group.name: c for c, known in enumerate(costs.classes) for group in known.groups}
    classes = [class_of[group.name] for group in groups]
    places = [i if place == "node" else group.zone for i, group in enumerate(groups)]
    seen = set[tuple[object, ...]]()

    def put(
        parts: tuple[tuple[int, int], ...], free: tuple[int, ...]
    ) -> Iterator[tuple[frozenset[object], tuple[int, ...]]]:
        if not parts:
            yield frozenset(), free
            return
        (c, size), *rest = parts
        for node, room in enumerate(free):
            if classes[node] == c and room >= size:
                left = (*free[:node], room - size, *free[node + 1 :])
                for used, after in put(tuple(rest), left):
                    yield used | {places[node]}, after

    def add(
        first: int, free: tuple[int, ...], serves: Served, lost: Mapping[object, Served], gpus: int, several: int = 0,
        shapes: frozenset[object] = frozenset(),
    ) -> Iterator[Whole]:  # fmt: skip
        state = (first, free, *(tuple(round(each, 6) for each in of) for of in (serves, *lost.values())))
        state = (*state, several, shapes) if counts_shapes else state
        if state in seen:
            return
        seen.add(state)
        left = min(one - gone for of_place in lost.values() for one, gone in zip(serves, of_place, strict=True))
        yield Whole(min(serves), left, gpus, several, len(shapes))
        for k in range(first, len(replicas)):
            more, parts = replicas[k]
            for used, after in set(put(parts, free)):
                shape = (*sorted((costs.classes[c].gpu, n) for c, n in parts), *(one > 0.0 for one in more))
                taken = {place: plus(of_place, more) if place in used else of_place for place, of_place in lost.items()}
                yield from add(
                    k, after, plus(serves, more), taken, gpus + sum(n for _, n in parts), several + (len(used) > 1),
                    shapes | {shape},
                )  # fmt: skip

    none = (0.0,) * max(1, len(problem.workload.classes))
    free = tuple(sum(slots.count for slots in group.gpus) for group in groups)
    yield from add(0, free, none, dict.fromkeys(places, none), 0)


def plus(one: Served, other: Served) -> Served:
    return tuple(a + b for a, b in zip(one, other, strict=True))


NODES = st.lists(
    st.tuples(st.sampled_from(("fast", "slow")), st.integers(1, 3), st.sampled_from(("east", "west"))),
    min_size=2, max_size=4,
).map(tuple).filter(lambda nodes: sum(count for _, count, _ in nodes) <= 5)  # fmt: skip
BYTES = st.sampled_from((4e6, 9e6, 30e6))
GOALS = st.sampled_from(("throughput", "goodput", "cost", "gpus", 0.4, 0.6, 0.75))


@settings(max_examples=max(10, settings().max_examples // 4))
@given(
    nodes=NODES,
    fast=BYTES,
    slow=BYTES,
    goal=GOALS,
    place=st.sampled_from(("node", "zone")),
    share=st.sampled_from((0.3, 0.9)),
)
def test_no_plan_is_better_than_the_bound(
    nodes: tuple[tuple[str, int, str], ...], fast: float, slow: float, goal: str | float, place: str, share: float
) -> None:
    assert_no_plan_is_better(fleet(nodes, fast=fast, slow=slow), goal, place, share)


@settings(max_examples=max(10, settings().max_examples // 4))
@given(
    nodes=NODES.filter(lambda nodes: sum(count for _, count, _ in nodes) <= 4),
    fast=BYTES,
    goal=GOALS,
    place=st.sampled_from(("node", "zone")),
    share=st.sampled_from((0.3, 0.9)),
    traffic=TRAFFIC,
)
def test_no_plan_with_pools_of_classes_is_better_than_the_bound(
    nodes: tuple[tuple[str, int, str], ...], fast: float, goal: str | float, place: str, share: float, traffic: Workload
) -> None:
    assert_no_plan_is_better(replace(fleet(nodes, fast=fast), workload=traffic), goal, place, share)


@pytest.mark.parametrize("goal", ["throughput", "gpus", 0.6])
def test_pools_leave_more_where_classes_suit_other_gpus(goal: str | float) -> None:
    nodes = ("fast", 1, "east"), ("fast", 1, "east"), *[("slow", 1, "east")] * 3
    problem = replace(fleet(nodes, flops=2e11), workload=workload(10, 900, (40, 2), 0.8))
    assert_no_plan_is_better(problem, goal, "node", 0.9)
    pools, together = (solve_surviving(each, Survive(place="node")) for each in (problem, problem.of_classes()))
    assert {one.classes for one in pools[0].replicas} == {(), ("short",), ("long",)}
    assert left_by(pools[0], problem, "node") > 1.02 * left_by(together[0], problem.of_classes(), "node")


def assert_no_plan_is_better(problem: PlacementProblem, goal: str | float, place: str, share: float) -> None:
    if place == "zone" and len(problem.cluster.zones()) < 2:
        return
    plans = list(plans_of(problem, place))
    most = max(plan.left for plan in plans)
    keep = goal if isinstance(goal, float) else None
    scale = 1.0
    if goal == "goodput":
        scale = problem.assumptions.planned_utilisation
        problem = replace(problem, objective=replace(problem.objective, kind=ObjectiveKind.GOODPUT))
    if goal in ("cost", "gpus"):
        demand = share * most
        if not demand:
            return
        wanted = problem.assumptions.planned_utilisation * demand
        problem = replace(problem, objective=replace(problem.objective, kind=ObjectiveKind(goal), demand_rps=wanted))
    try:
        plan, bound = solve_surviving(problem, Survive(place=place, keep=keep), gap_target=0.0)
    except InfeasibleError:
        if keep is not None:
            assert not any(one.rate > 0.0 and one.left >= keep * one.rate for one in plans)
        else:
            assert most == pytest.approx(0.0, abs=1e-9)
        return
    except NoPlanFoundError:
        assert keep is not None, "only a slower replica may keep the share"
        return
    assert check_plan(plan, problem) == ()
    if goal in ("cost", "gpus"):
        best = min(one.gpus for one in plans if one.left >= demand * (1 - 1e-9))
        assert plan.result.bound <= best * (1 + 1e-6)
        return
    if keep is not None:
        best = max(one.rate for one in plans if one.left >= keep * one.rate * (1 - 1e-9))
        assert plan.result.bound >= best * (1 - 1e-6)
        return
    assert bound is not None
    assert bound == pytest.approx(scale * most, rel=1e-5)
    assert left_by(plan, problem, place) == pytest.approx(bound, rel=1e-5), "its GPUs are named as the program has them"
