"""Fleets shared by tenants with different models: brute force agrees, bounds hold at any prices, rules are kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.cluster import Cluster, Link, Network
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.fleet import Routes
from hetis.solver.plan import Objective, ObjectiveKind, Role, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.tenants import fleet_search
from hetis.solver.tenants.fleet_search import FleetSearch
from hetis.solver.tenants.joint_master import TenantColumns, TenantsGoal, choose_whole
from hetis.solver.tenants.share_check import check_fleet_shares
from hetis.solver.tenants.tenancy import FleetShares, Tenancy, Tenant, TenantRule
from hetis.solver.tenants.tenant_replicas import part_of
from tests.solver.instances import (
    NO_LIMITS,
    SMALL_FAMILY,
    make_model,
    make_node,
    make_problem,
    make_profile,
    make_workload,
    problems,
)

EXAMPLES = max(2, settings().max_examples // 10)
REL = 1e-6
UNIFIED = replace(SMALL_FAMILY, roles=(Role.UNIFIED,), micro_batches=(1, 8))
SPLIT = replace(UNIFIED, roles=(Role.UNIFIED, Role.PREFILL, Role.DECODE), max_pool=0)
OTHER_MODELS = (make_model(num_layers=4), make_model(num_layers=8, kv_heads=1))
OTHER_WORKLOADS = (make_workload((200, 10)), make_workload((30, 90)))
OTHER_GOALS = (NO_LIMITS, Objective(kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=None, tpot_limit_s=0.01))


@st.composite
def tenancies(draw: st.DrawFn, *, max_gpus: int = 4) -> Tenancy:
    """Draw two tenants that can both be served on up to ``max_gpus`` GPUs in one zone."""
    family = draw(st.sampled_from((UNIFIED, SPLIT)))
    first = draw(problems(max_gpus=max_gpus, family=family, num_zones=1))
    second = replace(
        first,
        model=draw(st.sampled_from(OTHER_MODELS)),
        workload=draw(st.sampled_from(OTHER_WORKLOADS)),
        objective=draw(st.sampled_from(OTHER_GOALS)),
    )
    weights = draw(st.sampled_from(((1.0, 1.0), (1.0, 2.0), (3.0, 1.0))))
    worth = draw(st.sampled_from((None, None, 0.01)))
    return Tenancy(
        tenants=(
            Tenant(name="one", problem=first, weight=weights[0]),
            Tenant(name="other", problem=second, weight=weights[1], worth=worth),
        )
    )


def searched(tenancy: Tenancy) -> FleetSearch | None:
    """Return the search, or None if a tenant cannot be served at all."""
    try:
        return FleetSearch(tenancy, gap_target=0.0)
    except InfeasibleError:
        return None


class Split(NamedTuple):
    """Return the rates of two tenants for one distribution of the nodes' GPUs."""

    one: float
    other: float


def every_split(tenancy: Tenancy) -> Iterator[Split]:
    """Yield every distribution of the nodes' GPUs, with each tenant's part placed as if it were the whole fleet."""
    first, second = (tenant.problem for tenant in tenancy.tenants)
    cards = [
        (number, node, slot)
        for number, group in enumerate(first.cluster.node_groups)
        for node in range(group.count)
        for slot in range(len(group.gpus))
    ]
    counts = [first.cluster.node_groups[g].gpus[slot].count for g, _, slot in cards]
    known: dict[object, float] = {}
    for given_away in itertools.product(*(range(count + 1) for count in counts)):
        left = tuple(count - taken for count, taken in zip(counts, given_away, strict=True))
        yield Split(
            _served(0, first, dict(zip(cards, given_away, strict=True)), known),
            _served(1, second, dict(zip(cards, left, strict=True)), known),
        )


def _served(
    who: int, problem: PlacementProblem, cards: Mapping[tuple[int, int, int], int], known: dict[object, float]
) -> float:
    groups, shape = [], []
    for number, group in enumerate(problem.cluster.node_groups):
        for node in range(group.count):
            slots = tuple(
                replace(s, count=cards[number, node, slot])
                for slot, s in enumerate(group.gpus)
                if cards[number, node, slot]
            )
            if slots:
                groups.append(replace(group, name=f"{group.name}-{node}", gpus=slots, count=1, numbered=False))
                shape.append((number, slots))
    key = (who, tuple(sorted(shape, key=repr)))
    if key not in known:
        try:
            part = replace(problem, cluster=replace(problem.cluster, node_groups=tuple(groups)))
            known[key] = solve_placement(part).result.value if groups else 0.0
        except InfeasibleError:
            known[key] = 0.0
    return known[key]


def assert_best_of(splits: list[Split], search: FleetSearch, answer: FleetShares) -> None:
    """Assert that the answer is the best of all splits under its rule, and its bounds are not below it."""
    alone = np.array([share.alone for share in answer.shares])
    weights = np.array([share.weight for share in answer.shares])
    worths = np.array([share.worth for share in answer.shares])
    rates = np.array(splits)
    if answer.rule.has_level:
        best_level = (rates / alone / weights).min(axis=1).max()
        assert answer.level == pytest.approx(best_level, rel=REL, abs=1e-12)
        assert answer.level_bound is not None
        assert answer.level_bound >= best_level * (1 - REL)
    owed = np.zeros(2)
    if answer.rule is TenantRule.MAX_MIN:
        owed = answer.level * weights * alone
    if answer.rule is TenantRule.SHARING_INCENTIVE:
        owed = np.array([share.part for share in answer.shares])
    best = float((rates @ worths)[np.all(rates >= owed * (1 - 1e-7), axis=1)].max())
    if answer.rule is TenantRule.EQUAL_THROUGHPUT:
        best = float(answer.level * (weights * alone) @ worths)
    assert answer.value == pytest.approx(best, rel=REL)
    assert answer.bound >= best * (1 - REL)
    assert answer.status is Status.OPTIMAL or answer.value == 0.0


@given(tenancies())
@settings(max_examples=EXAMPLES)
def test_small_fleets_are_shared_as_brute_force_shares_them(tenancy: Tenancy) -> None:
    search = searched(tenancy)
    if search is None:
        return
    splits = list(every_split(tenancy))
    for rule in TenantRule:
        answer = search.share(rule)
        assert check_fleet_shares(search.tenancy, answer) == ()
        assert_best_of(splits, search, answer)


@given(tenancies())
@settings(max_examples=EXAMPLES)
def test_prices_alone_bound_what_whole_replicas_reach(tenancy: Tenancy) -> None:
    search = searched(tenancy)
    if search is None:
        return
    for rule in (TenantRule.EFFICIENCY, TenantRule.MAX_MIN, TenantRule.SHARING_INCENTIVE):
        answer = search.share(rule)
        assert answer.proof is not None
        assert answer.value <= answer.proof.bound * (1 + REL)
        if answer.level_proof is not None:
            assert answer.level <= answer.level_proof.bound * (1 + REL)


# --- what every rule promises


@pytest.fixture(scope="module")
def search() -> FleetSearch:
    """Three tenants on two strong and four weak cards."""
    nodes = [make_node("a", "A", gpus=2), make_node("b", "B", gpus=1, nodes=4)]
    profiles = {
        "A": make_profile("A", flops=4e12, bytes_per_s=4e10, usable_bytes=60_000_000),
        "B": make_profile("B", usable_bytes=25_000_000),
    }
    models = (make_model(), make_model(num_layers=4), make_model(num_layers=8))
    lengths = ((120, 40), (300, 20), (40, 90))
    return FleetSearch(
        Tenancy(
            tenants=tuple(
                Tenant(
                    name=name,
                    weight=weight,
                    problem=make_problem(nodes, profiles=profiles, model=model, workload=make_workload(tokens)),
                )
                for name, weight, model, tokens in zip("xyz", (1.0, 2.0, 1.0), models, lengths, strict=True)
            )
        )
    )


def test_rules_that_promise_more_are_worth_no_more(search: FleetSearch) -> None:
    answers = {rule: search.share(rule) for rule in TenantRule}
    most = answers[TenantRule.EFFICIENCY]
    assert all(answer.value <= most.value * (1 + REL) for answer in answers.values())
    levels = {rule: answer.level for rule, answer in answers.items()}
    assert levels[TenantRule.EQUAL_THROUGHPUT] == pytest.approx(levels[TenantRule.MAX_MIN])
    assert all(level <= levels[TenantRule.MAX_MIN] * (1 + REL) for level in levels.values())
    assert answers[TenantRule.EQUAL_THROUGHPUT].value <= answers[TenantRule.MAX_MIN].value * (1 + REL)


def test_no_gpu_has_two_tenants_and_every_plan_stands_alone(search: FleetSearch) -> None:
    for rule in TenantRule:
        answer = search.share(rule)
        assert check_fleet_shares(search.tenancy, answer) == ()
        devices = [d for s in answer.shares if s.plan for r in s.plan.replicas for d in r.devices()]
        assert len(devices) == len(set(devices))


def test_nobody_is_below_its_part_under_the_sharing_incentive(search: FleetSearch) -> None:
    for share in search.share(TenantRule.SHARING_INCENTIVE).shares:
        assert share.rate >= share.part * (1 - REL)


def test_everybody_on_its_part_will_do_where_nothing_better_is_found(search: FleetSearch) -> None:
    priced = FleetSearch(search.tenancy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet_search, "choose_whole", lambda *_, **__: None)
        answer = priced.share(TenantRule.SHARING_INCENTIVE)
    assert check_fleet_shares(priced.tenancy, answer) == ()
    assert [share.rate for share in answer.shares] == pytest.approx([share.part for share in answer.shares])


def test_parts_of_every_claim_fit_together() -> None:
    limits = np.array([32, 7, 1, 3])
    parts = [part_of(limits, claim) for claim in (1 / 3, 1 / 3, 1 / 3)]
    assert np.all(sum(parts) <= limits)
    assert parts[0].tolist() == [10, 2, 0, 1]


def test_halves_of_requests_serve_what_the_scarcer_half_allows() -> None:
    unified, sent, received = 0, 1, 3  # sides of one zone
    columns = TenantColumns(
        rates=np.array([0.1, 0.2, 0.5]), uses=np.eye(3, dtype=np.int64), sides=np.array([unified, sent, received]),
        routes=Routes(zones=("here",), splits_roles=True, capacity=np.full((1, 1), np.inf)),
    )  # fmt: skip
    assert columns.served(np.array([1, 1, 1])) == pytest.approx(0.3)
    assert columns.served(np.array([0, 5, 1])) == pytest.approx(0.5)
    goal = TenantsGoal(np.ones(1), np.zeros(1))
    choice = choose_whole([columns], np.array([2, 4, 1]), goal, nodes=10_000, time_limit_s=np.inf, gap=0.0)
    assert choice is not None
    assert choice.counts[0].tolist() == [2, 3, 1] or choice.counts[0].tolist() == [2, 4, 1]
    assert choice.rates[0] == pytest.approx(0.7)


def test_tenants_whose_models_allow_other_tp_sizes_are_bound_to_the_gpus_they_were_given() -> None:
    nodes = [make_node("a", "A", gpus=4, nodes=2), make_node("b", "B", gpus=2)]
    narrow = make_problem(nodes, model=make_model(q_heads=2, kv_heads=1), family=UNIFIED)
    wide = make_problem(nodes, model=make_model(q_heads=8, kv_heads=8), family=UNIFIED)
    for first, second in ((narrow, wide), (wide, narrow)):
        search = FleetSearch(Tenancy(tenants=(Tenant(name="one", problem=first), Tenant(name="two", problem=second))))
        assert search.replicas[0].costs.ranks != search.replicas[1].costs.ranks
        for rule in TenantRule:
            assert check_fleet_shares(search.tenancy, search.share(rule)) == ()


def test_the_order_of_tenants_does_not_matter(search: FleetSearch) -> None:
    turned = FleetSearch(Tenancy(tenants=search.tenancy.tenants[::-1]))
    for rule in TenantRule:
        assert turned.share(rule).value == pytest.approx(search.share(rule).value, rel=REL)


# --- the checker detects errors


def changed(answer: FleetShares, what: str) -> FleetShares:
    first, second, *others = answer.shares
    assert first.plan is not None
    match what:
        case "device twice":
            thief = next(s for s in answer.shares[1:] if s.plan is not None)
            assert thief.plan is not None
            stolen = replace(thief, plan=replace(thief.plan, replicas=first.plan.replicas))
            return replace(answer, shares=tuple(stolen if s is thief else s for s in answer.shares))
        case "rate":
            return replace(answer, shares=(replace(first, rate=1.1 * first.rate), second, *others))
        case "part":
            return replace(answer, shares=(replace(first, part=2 * first.rate, part_bound=9e9), second, *others))
        case "value":
            return replace(answer, value=answer.value * 1.01)
        case "bound":
            return replace(answer, bound=answer.value * 0.99)
        case _:
            return replace(answer, level=answer.level * 1.01)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("device twice", "is given to"),
        ("rate", "its replicas serve"),
        ("part", "its part of the fleet would serve"),
        ("value", "the shares are worth"),
        ("bound", "is below the value"),
        ("level", "the least normalised rate per part is"),
    ],
)
def test_the_checker_names_what_is_wrong(search: FleetSearch, what: str, says: str) -> None:
    answer = search.share(TenantRule.SHARING_INCENTIVE)
    assert any(says in sentence for sentence in check_fleet_shares(search.tenancy, changed(answer, what)))


def test_the_checker_recomputes_the_bound_from_its_prices(search: FleetSearch) -> None:
    priced = FleetSearch(search.tenancy)
    answer = priced.share(TenantRule.SHARING_INCENTIVE)
    assert check_fleet_shares(priced.tenancy, answer) == ()
    assert answer.proof is not None
    half = replace(answer.proof, rows=tuple(replace(row, price=row.price / 2) for row in answer.proof.rows))
    found = check_fleet_shares(priced.tenancy, replace(answer, proof=half))
    assert any("pay" in sentence for sentence in found), "replicas beat prices cut in half"
    double = replace(answer.proof, rows=tuple(replace(row, price=row.price * 2) for row in answer.proof.rows))
    found = check_fleet_shares(priced.tenancy, replace(answer, proof=double))
    assert any("of the prices is" in sentence for sentence in found)
    more = tuple(replace(row, limit=row.limit + 1) for row in answer.proof.rows)
    found = check_fleet_shares(priced.tenancy, replace(answer, proof=replace(answer.proof, rows=more)))
    assert any("has room for" in sentence for sentence in found)


# --- failures


def one_tenant(**changes: object) -> Tenant:
    nodes = [make_node("a", "A", gpus=2)]
    return Tenant(name="one", problem=make_problem(nodes, **changes))  # type: ignore[arg-type]


def test_everything_wrong_with_a_tenancy_is_said_at_once() -> None:
    good = one_tenant()
    cheap = Objective(kind=ObjectiveKind.COST, demand_rps=1.0)
    costly = replace(good, problem=replace(good.problem, objective=cheap), weight=-1.0)
    with pytest.raises(InvalidProblemError) as caught:
        Tenancy(tenants=(good, costly))
    assert "tenant one appears twice" in str(caught.value)
    assert "weight is -1.0, must be > 0" in str(caught.value)
    assert "objective is cost, must be goodput or throughput to be shared" in str(caught.value)


def test_fleets_of_several_zones_are_refused() -> None:
    nodes = [make_node("a", "A", zone="east"), make_node("b", "A", zone="west")]
    network = Network(default=Link(bytes_per_s=5e8, latency_s=1e-5))
    with pytest.raises(InvalidProblemError, match="has 2 zones: tenants share a fleet of one zone"):
        Tenancy(tenants=(Tenant(name="one", problem=make_problem(nodes, network=network)),))


def test_a_tenant_that_fits_nowhere_is_named() -> None:
    small = {"A": make_profile("A", usable_bytes=2_000_000)}
    with pytest.raises(InfeasibleError) as caught:
        FleetSearch(Tenancy(tenants=(one_tenant(profiles=small),)))
    whom, why = caught.value.reasons
    assert whom == "tenant one can be served by no replica on this fleet, even alone"
    assert why == "tiny needs 7.7 MiB for weights alone; this fleet has 1.9 MiB usable"


def test_a_spent_budget_is_no_proof() -> None:
    from hetis.solver.budget import Budget

    budget = Budget()
    budget.cancelled.set()
    with pytest.raises(NoPlanFoundError):
        FleetSearch(Tenancy(tenants=(one_tenant(),)), budget=budget)


def test_published_heuristics_cannot_be_shared() -> None:
    with pytest.raises(InvalidProblemError, match="must be one of hetis, hexgen, hexgen2"):
        FleetSearch(Tenancy(tenants=(one_tenant(),)), strategy="hetis-paper")


def test_one_tenant_has_what_a_placement_gives_it() -> None:
    tenant = one_tenant()
    plan = solve_placement(tenant.problem)
    for rule in TenantRule:
        share = FleetSearch(Tenancy(tenants=(tenant,))).share(rule).shares[0]
        assert share.rate == pytest.approx(plan.result.value, rel=REL)
        assert share.normalised == pytest.approx(1.0)


def test_the_cluster_of_all_tenants_is_the_same() -> None:
    first = one_tenant()
    other: Cluster = replace(first.problem.cluster, name="elsewhere")
    second = replace(first, name="two", problem=replace(first.problem, cluster=other))
    with pytest.raises(InvalidProblemError, match="tenant two: cluster is not that of one"):
        Tenancy(tenants=(first, second))
