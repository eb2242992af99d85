"""The reasons why no plan exists are true, minimal, and name values that a plan can keep, as brute force confirms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.budget import Budget, SearchSettings
from hetis.solver.cluster import Link, Network
from hetis.solver.cost import plain_memory, rank_shape
from hetis.solver.engine_rules import EngineRules
from hetis.solver.errors import InfeasibleError
from hetis.solver.placement import search, solve
from hetis.solver.placement.families import run_by
from hetis.solver.placement.infeasible import trials, why_infeasible
from hetis.solver.placement.infeasible.relaxations import PRECISION
from hetis.solver.placement.infeasible.trials import MAX_TRIALS
from hetis.solver.placement.wording import in_bytes
from hetis.solver.plan import Objective, ObjectiveKind, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.rank_memory import RankKind
from tests.models import replace, shape_of
from tests.solver.instances import NO_LIMITS, SMALL_FAMILY, make_model, make_node, make_problem, make_profile, problems
from tests.solver.oracle import best_plan_value

EXAMPLES = max(5, settings().max_examples // 3)
GIVEN = {"demand": "demand_rps", "mean TPOT limit": "tpot_limit_s", "p95 TTFT limit": "ttft_limit_s"}
OPTIONS = {"demand": "rate", "mean TPOT limit": "tpot", "p95 TTFT limit": "ttft"}


def reasons(problem: PlacementProblem) -> tuple[str, ...]:
    with pytest.raises(InfeasibleError) as caught:
        solve_placement(problem)
    return caught.value.reasons


def two_cards(**objective: object) -> PlacementProblem:
    return make_problem([make_node("a", "A", nodes=2)], objective=replace(NO_LIMITS, **objective))  # type: ignore[arg-type]


# --- brute force


def best_goodput(problem: PlacementProblem, **limits: float | None) -> float:
    """Return the best goodput under these limits by brute force; 0 if nothing meets them."""
    objective = Objective(
        ttft_limit_s=limits.get("ttft_limit_s"), tpot_limit_s=limits.get("tpot_limit_s"), demand_rps=None
    )
    return best_plan_value(replace(problem, objective=objective))


def can_keep(problem: PlacementProblem, constraints: dict[str, float]) -> bool:
    """Return, by brute force, whether a plan keeps these limits, keyed by the fields of `Objective`."""
    limits = {name: value for name, value in constraints.items() if name != "demand_rps"}
    best = best_goodput(problem, **limits)
    return best > 0 and best >= constraints.get("demand_rps", 0.0) * (1 - 1e-9)


def given_constraints(objective: Objective) -> dict[str, float]:
    values = {name: getattr(objective, name) for name in GIVEN.values()}
    return {
        name: value
        for name, value in values.items()
        if value is not None and not (name == "demand_rps" and objective.maximises)
    }


def members(found: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Return the field and the sentence of every constraint that is blamed."""
    for sentence in found:
        for words, name in GIVEN.items():
            if sentence.startswith(words):
                yield name, sentence


def suggested(sentence: str) -> float:
    """Return the value that can be kept according to a sentence, in seconds or requests/s."""
    match = re.search(r"\(--(rate|tpot|ttft) ([0-9.e+-]+)(ms|s|)\)$", sentence)
    assert match, sentence
    return float(match[2]) * (1e-3 if match[3] == "ms" else 1.0)


def out_of_reach(sentence: str) -> float:
    match = re.search(r": by the model, ([0-9.e+-]+) (ms|s) cannot be kept", sentence)
    assert match, sentence
    return float(match[1]) * (1e-3 if match[2] == "ms" else 1.0)


@st.composite
def tight_problems(draw: st.DrawFn) -> PlacementProblem:
    """Draw problems that often require too much."""
    problem = draw(problems(max_gpus=3, kinds=tuple(ObjectiveKind), family=SMALL_FAMILY, num_zones=1))
    objective = replace(
        problem.objective,
        tpot_limit_s=draw(st.sampled_from((None, 1e-4, 1e-3, 3e-3))),
        ttft_limit_s=draw(st.sampled_from((None, 1e-3, 5e-3, 0.02))),
        demand_rps=None if problem.objective.maximises else draw(st.sampled_from((5.0, 60.0, 300.0, 1e4))),
    )
    return replace(problem, objective=objective)


@settings(max_examples=EXAMPLES)
@given(tight_problems())
def test_reasons_agree_with_brute_force(problem: PlacementProblem) -> None:
    try:
        solve_placement(problem)
    except InfeasibleError as error:
        found = error.reasons
    else:
        return
    constraints = given_constraints(problem.objective)
    if not can_keep(problem, {}):
        assert not list(members(found))
        return
    assert not can_keep(problem, constraints)
    conflict = dict(members(found))
    assert conflict
    if found[0].startswith("several"):
        return  # the sentences are about problems without the other conflicts
    for size in range(len(conflict)):
        for part in combinations(conflict, size):
            assert can_keep(problem, {name: constraints[name] for name in part}), "not a smallest conflict"
    assert not can_keep(problem, {name: constraints[name] for name in conflict})
    for name, sentence in conflict.items():
        others = {other: value for other, value in constraints.items() if other != name}
        if "not the only obstacle" in sentence:
            assert not can_keep(problem, others)
            continue
        assert can_keep(problem, others | {name: suggested(sentence)})
        if name == "demand_rps":
            best = best_goodput(problem, **others)
            assert suggested(sentence) == pytest.approx(best, rel=0.01)
        else:
            assert not can_keep(problem, others | {name: out_of_reach(sentence)})
            assert suggested(sentence) <= out_of_reach(sentence) * PRECISION * 1.02  # both are rounded to three digits


# --- sentences


def test_demand_alone_is_blamed_when_replicas_fit_and_meet_the_limits() -> None:
    problem = two_cards(kind=ObjectiveKind.GPUS, demand_rps=1e5, tpot_limit_s=5.0, ttft_limit_s=5.0)
    best = best_goodput(problem, tpot_limit_s=5.0, ttft_limit_s=5.0)
    (reason,) = reasons(problem)
    assert reason.startswith(
        "demand 100000 requests/s is above what this fleet serves within mean TPOT limit 5000 ms and p95 TTFT limit 5 "
        f"s: {best:.4g} requests/s (--rate "
    )


def test_limit_that_nothing_meets_is_blamed_and_the_demand_beside_it() -> None:
    problem = two_cards(kind=ObjectiveKind.GPUS, demand_rps=1e5, tpot_limit_s=1e-6)
    header, *both = reasons(problem)
    assert header.startswith("several conflicts exist")
    assert [name for name, _ in members(tuple(both))] == ["tpot_limit_s", "demand_rps"]
    assert can_keep(problem, {"tpot_limit_s": suggested(both[0])})


def test_demand_and_limit_that_exclude_one_another_are_both_named() -> None:
    problem = two_cards()
    best = best_goodput(problem)
    tight_s = 1.1 * suggested(reasons(two_cards(tpot_limit_s=1e-6))[0])
    assert best_goodput(problem, tpot_limit_s=tight_s) < 0.9 * best
    header, demand, limit = reasons(
        two_cards(kind=ObjectiveKind.GPUS, demand_rps=0.95 * best, tpot_limit_s=tight_s, ttft_limit_s=50.0)
    )
    assert header.startswith("each can be kept, but not together: demand ")
    assert demand.startswith("demand ")
    assert limit.startswith("mean TPOT limit ")
    assert " given demand " in limit
    assert " and p95 TTFT limit 50 s: " in limit


def test_ttft_of_prefill_replicas_is_out_of_reach_at_their_planned_rate_only() -> None:
    roles = replace(SMALL_FAMILY, roles=(Role.PREFILL, Role.DECODE))
    for family, condition in (
        (roles, ", at 90% of a prefill replica's rate (lower rates may keep it)"),
        (SMALL_FAMILY, ""),
    ):
        problem = replace(two_cards(ttft_limit_s=1e-4), family=family)
        [limit] = (one for one in reasons(problem) if " cannot be kept, " in one)
        assert limit.startswith("p95 TTFT limit 0.1 ms is out of reach")
        assert f": by the model{condition}, " in limit
        assert suggested(limit) > 1e-4


def test_weights_and_kv_that_exceed_the_fleet_are_added_up() -> None:
    model = make_model()
    weights = int(model.params() * model.weight_bytes)
    for spare, words in ((-500_000, "for weights alone; this fleet has "), (50_000, "for the KV of 1 request, ")):
        profile = make_profile("A", usable_bytes=1_000_000 + weights + spare)
        problem = make_problem([make_node("a", "A")], profiles={"A": profile})
        reason, *_ = reasons(problem)  # the others suggest remedies
        assert words in reason


def test_gpus_with_less_memory_than_an_engine_reserves_are_named() -> None:
    profiles = {gpu: make_profile(gpu, usable_bytes=500_000) for gpu in "AB"}
    reason, *_ = reasons(make_problem([make_node("a", "A"), make_node("b", "B")], profiles=profiles))
    assert reason == (
        "the memory of every GPU is smaller than what an engine reserves: A has 0.5 MiB, the engine's reserve is 1.0 "
        "MiB and B has 0.5 MiB, the engine's reserve is 1.0 MiB"
    )


@pytest.mark.parametrize("reported", [2.0, 1.2])
def test_a_larger_share_of_the_memory_is_named_if_a_plan_exists_with_it(reported: float) -> None:
    """The engine takes half of what a plan needs; 95% of twice as much is enough, of 1.2 times it is not."""
    problem = make_problem([make_node("a", "A")])
    profile, shape = problem.profiles["A"], rank_shape(problem.model, 1)
    assert shape is not None
    memory = plain_memory(profile, problem.model, shape)
    least = memory.fixed_bytes + 1.1 * problem.model.params() * problem.model.weight_bytes
    memory = replace(memory, usable_bytes=least / 2, reported_bytes=reported * least / 1.2)
    found = reasons(replace(problem, memories={RankKind("A", 1): memory}))
    assert any("(--gpu-memory-utilization 0.95)" in one for one in found) == (reported == 2.0)


def test_memory_that_others_hold_is_named_if_a_plan_exists_without_it() -> None:
    problem = make_problem([make_node("a", "A")])
    (group,), weights = problem.cluster.node_groups, problem.model.params() * problem.model.weight_bytes
    held = problem.profiles["A"].room_bytes - int(weights)  # activations and KV have no room
    slots = tuple(replace(slots, reserved_bytes=held) for slots in group.gpus)
    beside = replace(problem, cluster=replace(problem.cluster, node_groups=(replace(group, gpus=slots),)))
    wanted = f"without the memory that others hold of GPUs, up to {in_bytes(held)}, a plan exists (`reserved`)"
    assert wanted in reasons(beside)


def test_gpus_with_less_memory_than_an_engine_reserves_take_nothing_from_the_others() -> None:
    weights = int(make_model().params() * make_model().weight_bytes)
    profiles = {"A": make_profile("A", usable_bytes=1), "B": make_profile("B", usable_bytes=1_000_000 + weights // 4)}
    reason, *_ = reasons(make_problem([make_node("a", "A"), make_node("b", "B", nodes=2)], profiles=profiles))
    assert reason.endswith(f"for weights alone; this fleet has {in_bytes(weights / 2)} usable")


def test_replicas_that_prefill_and_that_decode_each_need_the_weights() -> None:
    model = replace(make_model(), weight_bytes=20_000.0)
    weights = model.params() * model.weight_bytes
    profile = make_profile("A", usable_bytes=int(1_000_000 + 0.75 * weights))
    problem = make_problem([make_node("a", "A", nodes=2)], profiles={"A": profile}, model=model)
    with pytest.raises(InfeasibleError) as caught:
        solve_placement(problem, strategy="hexgen2")
    copies, room = (f"{share * weights / 2**30:.1f} GiB" for share in (2.0, 1.5))
    assert f"tiny needs {copies} for two copies of the weights, to prefill and to decode; this fleet has {room}" in str(
        caught.value
    )


def test_states_are_among_what_requests_keep() -> None:
    linear = shape_of(layers=1, params=1, state_bytes=3e8)
    model = replace(make_model(), linear=linear)
    weights = int(model.params() * model.weight_bytes)
    profile = make_profile("A", usable_bytes=1_000_000 + weights + 200_000_000)
    reason, *_ = reasons(make_problem([make_node("a", "A")], profiles={"A": profile}, model=model))
    assert re.match(r"tiny needs .*: .* for weights and 0.3 GiB for the KV of 1 request", reason)


def test_layer_that_fits_no_card_is_named() -> None:
    profile = make_profile("A", usable_bytes=1_900_000)
    problem = make_problem([make_node("a", "A", nodes=40)], profiles={"A": profile})
    reason, *_ = reasons(problem)  # the others suggest remedies
    assert re.match(r"a layer of tiny needs .* on each of 1 GPUs?, activations included; A has .* usable$", reason)


def test_layers_that_cards_cannot_share_are_counted() -> None:
    model = make_model(num_layers=6)
    layer = model.layer_params() * model.weight_bytes
    profile = make_profile("A", usable_bytes=int(1_000_000 + 1.8 * layer))
    problem = make_problem([make_node("a", "A", nodes=5)], profiles={"A": profile}, model=model)
    reason, *_ = reasons(problem)  # the others suggest remedies
    assert reason.startswith("the GPUs that a replica may use hold at most 5 of 6 layers of tiny, without KV: ")


def test_replica_of_one_type_is_measured_by_one_type() -> None:
    """Both types together would suffice."""
    profiles = {name: make_profile(name, usable_bytes=4_800_000) for name in "AB"}
    problem = make_problem([make_node("a", "A", nodes=2), make_node("b", "B", nodes=1)], profiles=profiles)
    assert solve_placement(problem).replicas
    with pytest.raises(InfeasibleError) as caught:
        solve_placement(problem, strategy="uniform")
    assert "; a replica of one device class, at most 2 A, has " in str(caught.value)


@pytest.mark.parametrize(
    ("min_layers", "said"),
    [
        (7, r"tiny has 6 layers, fewer than the 7 that every stage is to have$"),
        (4, r"tiny needs .*, but no replica of one stage of at least 4 layers keeps every GPU within its memory$"),
        (1, r"$"),
    ],
)
def test_stages_that_must_be_longer_than_the_cards_allow_are_named(min_layers: int, said: str) -> None:
    """Three cards hold the model, three layers each at most, and no card holds four."""
    model = make_model(num_layers=6)
    layer = model.layer_params() * model.weight_bytes
    profile = make_profile("A", usable_bytes=int(1_000_000 + 3.6 * layer))
    family = run_by(SMALL_FAMILY, EngineRules(name="vllm-hetis", min_layers=min_layers))
    problem = make_problem([make_node("a", "A", nodes=3)], profiles={"A": profile}, model=model, family=family)
    if min_layers == 1:
        assert solve_placement(problem).replicas
        return
    reason, *_ = reasons(problem)
    assert re.match(said, reason)


# --- effort


class StoppedClock:
    """A clock that stands still for the given number of readings, and then exceeds any limit."""

    def __init__(self, readings: int) -> None:
        self.left = readings

    def __call__(self) -> float:
        self.left -= 1
        return 0.0 if self.left >= 0 else 1e9


def test_reasons_that_nobody_had_time_for_are_not_made_up() -> None:
    problem = two_cards(kind=ObjectiveKind.GPUS, demand_rps=1e5, tpot_limit_s=1e-6)
    whole = why_infeasible(problem, SearchSettings()).reasons
    for readings in (1, 2, 5, 10, 20, 40, 80, 160, 320):
        budget = Budget(time_limit_s=1.0, clock=StoppedClock(readings))
        found = why_infeasible(problem, SearchSettings(budget=budget)).reasons
        assert found
        assert all(found)
        if found != whole:
            assert any("no time was left" in reason or "cannot be kept" in reason for reason in found)
    spent = Budget()
    spent.cancelled.set()
    limit, demand, reason = why_infeasible(problem, SearchSettings(budget=spent)).reasons
    assert limit.startswith("mean TPOT limit 0.001 ms cannot be kept: dense work alone takes longer")
    assert demand.startswith("demand 100000 requests/s is above ")
    assert reason == (
        "no time was left to determine the cause: memory, or demand 100000 requests/s and mean TPOT limit 0.001 ms"
    )


def test_few_searches_suffice() -> None:
    problem = two_cards(kind=ObjectiveKind.GPUS, demand_rps=1e5, tpot_limit_s=1e-7, ttft_limit_s=1e-7)
    count = 0

    def counting(*arguments: object, **named: object) -> object:
        nonlocal count
        count += 1
        return search.search(*arguments, **named)  # type: ignore[arg-type]

    with (
        patch.object(solve, "search", counting),
        patch.object(trials, "search", counting),
    ):
        assert len(reasons(problem)) == 4
    assert count <= 1 + MAX_TRIALS


def test_a_fleet_of_one_node_has_no_links_between_nodes_to_blame() -> None:
    """A limit below what stages over the network reach, on two GPUs of one node which hold half the model each."""
    model = make_model()
    half = int(0.7 * model.params() * model.weight_bytes) + 1_000_000
    for node, blamed in (
        (make_node("a", "A", gpus=2), "links of the network (also charged between stages of one node)"),
        (make_node("a", "A", nodes=2), "links between nodes"),
    ):
        alone = replace(SMALL_FAMILY, tp_sizes=(1,))  # a stage on one GPU each
        slow = Network(default=Link(bytes_per_s=5e8, latency_s=1e-2))
        profiles = {"A": make_profile("A", usable_bytes=half)}
        objective = replace(NO_LIMITS, tpot_limit_s=8e-3)
        header, limit, links, *_ = reasons(
            make_problem([node], profiles=profiles, network=slow, objective=objective, family=alone)
        )
        assert header == (
            f"mean TPOT limit 8 ms cannot be kept with {blamed} and GPU memory as given; relaxing any one of "
            "them is enough"
        )
        assert limit.startswith("mean TPOT limit 8 ms is out of reach: ")
        assert links.startswith(f"{blamed} are too slow given mean TPOT limit 8 ms: ")
