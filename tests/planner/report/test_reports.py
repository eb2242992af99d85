"""Reports fit 80 columns and show the plan's contents, however large it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from hetis.commands.terminal import _ASCII
from hetis.planner.report.alternatives import distinct_runners_up
from hetis.planner.report.explanation import memory_shares, render_explanation, time_shares
from hetis.planner.report.plan import MAX_SHAPES, render_plan
from hetis.planner.report.promises import beside_equal_stages, misses_demand, simple_setups, verdict
from hetis.planner.use_cases.grouping import group_replicas
from hetis.planner.use_cases.place import with_service_level
from hetis.planner.use_cases.record.forms import ClassLatency, KeptWithClasses
from hetis.planner.use_cases.record.parts import Classes
from hetis.planner.use_cases.service_level import ServiceLevel, Statistic
from hetis.planner.use_cases.sources import load_inputs
from hetis.solver.plan import OTHER_TENANTS, Objective, ObjectiveKind, Plan, Role, Status
from tests.planner import plans
from tests.planner.command_line import EXAMPLES

PLANS = {
    "paper": plans.plan(plans.paper_replica()),
    "optimal": plans.plan(plans.paper_replica(), status=Status.OPTIMAL),
    "interrupted": plans.plan(plans.paper_replica(), status=Status.INTERRUPTED),
    "cost": plans.plan(plans.paper_replica(), kind=ObjectiveKind.COST),
    "deep": plans.plan(plans.deep_replica(18)),
    "deepest": plans.plan(plans.deep_replica(80)),
    "large": plans.plan(*plans.large_replicas(2000), zones=tuple(f"zone-{i}" for i in range(20))),
    "roles": plans.split_plan(),
    "empty": plans.plan(),
    "bare": replace(plans.plan(plans.paper_replica()), inputs={}, prices=(), runners_up=(), notes=()),
}


def text_of(report: RenderableType, width: int = 80) -> str:
    console = Console(width=width, highlight=False, emoji=False, markup=False, force_terminal=False, record=True)
    with console.capture() as captured:
        console.print(report)
    return captured.get()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_no_line_of_a_report_is_wider_than_80_columns(plan: Plan) -> None:
    for report in (render_plan(plan), render_explanation(plan, plans.explanation(plan))):
        assert max(len(line) for line in text_of(report).splitlines()) <= 80


def test_a_plan_that_keeps_less_in_simulation_is_compared_by_what_the_model_alone_promises() -> None:
    """The plan's value is 1.35; the other setups were not simulated, so they may miss the limits, too."""
    plan = plans.plan(plans.paper_replica())
    inputs = {"equal_stages_value": 1.62, "simple_setups": {"2": 1.62}}
    first, then = replace(plan, inputs=inputs), replace(plan, inputs={**inputs, "model_value": 1.8})
    assert beside_equal_stages(first) == "1.620 requests/s by replicas of equal stages; this plan 17% less"
    assert beside_equal_stages(then) == (
        "1.620 requests/s by the model, by replicas of equal stages (not simulated, may keep more than this plan: "
        "--strategy uniform); this plan by the model 11% more"
    )
    worse = replace(then, inputs={**then.inputs, "equal_stages_value": 1.3})
    assert beside_equal_stages(worse) == (
        "1.300 requests/s by the model, by replicas of equal stages (not simulated); this plan by the model 38% more"
    )
    same = replace(then, inputs={**then.inputs, "equal_stages_value": 1.8})
    assert "may keep more" not in beside_equal_stages(same), "it is the same plan, or one as good"
    assert [simple_setups(one)[0].endswith("10.00% less by the model") for one in (first, then)] == [False, True]


@pytest.mark.parametrize(
    ("requested", "shape", "named"),
    [
        ("DeepSeek-R1", "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"),  # a tuning of this shape
        ("models/mine.json", "mine", "mine"),
    ],
)
def test_the_model_is_called_by_what_was_requested_and_is_launched(requested: str, shape: str, named: str) -> None:
    documents = {"model": {"name": shape}, "cluster": {"name": "c"}, "workload": {"name": "w"}}
    inputs = {"origins": {"model": requested}, "documents": documents}
    shown = text_of(render_plan(replace(plans.plan(plans.paper_replica()), inputs=inputs)))
    assert shown.lstrip().startswith(f"{named} on c")


def test_a_demand_above_the_promised_rate_is_marked_as_not_met() -> None:
    """The plan promises 1.35 requests/s, for least cost what is demanded."""
    plan, cheapest = PLANS["paper"], PLANS["cost"]
    for one, demand_rps, is_met in ((plan, 1.35, True), (plan, 5.0, False), (cheapest, 4.0, True)):
        asked = replace(one, objective=replace(one.objective, demand_rps=demand_rps))
        demand = next(line for line in text_of(render_plan(asked)).splitlines() if "Demand" in line).rstrip()
        assert demand.endswith("requests/s" if is_met else "requests/s  not met")
        assert misses_demand(asked) is not is_met


def test_the_price_of_tokens_names_the_demanded_rate_that_it_holds_for() -> None:
    inputs = load_inputs(cluster=str(EXAMPLES / "paper.yaml"), model="Llama-2-70B", workload="1024/256").inputs
    groups = tuple(
        replace(group, gpus=tuple(replace(slots, usd_per_hour=2.0) for slots in group.gpus))
        for group in inputs.cluster.node_groups
    )
    priced = replace(inputs, cluster=replace(inputs.cluster, node_groups=groups))
    plan = plans.plan(plans.paper_replica(), kind=ObjectiveKind.COST)
    cheap = replace(plan, inputs={"documents": priced.documents()})
    assert "USD per million output tokens at 4.000 requests/s" in text_of(render_plan(cheap), width=120)
    best = replace(cheap, objective=replace(plan.objective, kind=ObjectiveKind.GOODPUT, demand_rps=None))
    assert "USD per million output tokens at" not in text_of(render_plan(best), width=120)


def test_parts_of_a_chart_have_different_signs_in_ascii_too() -> None:
    explained = plans.explanation(plans.split_plan())
    for shares in (*map(memory_shares, explained.memory), *map(time_shares, explained.stage_times)):
        signs = "".join([*(share.glyph for share in shares), "·"]).translate(
            _ASCII
        )  # a dot is free memory or idle time
        assert signs.isascii()
        assert len(set(signs)) == len(shares) + 1


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_reports_survive_a_narrow_terminal(plan: Plan) -> None:
    for report in (render_plan(plan), render_explanation(plan, plans.explanation(plan))):
        assert text_of(report, width=20)


def test_a_plan_of_thousands_of_replicas_stays_short() -> None:
    text = text_of(render_plan(PLANS["large"]))
    assert len(text.splitlines()) < 250
    assert f"and {30 - MAX_SHAPES} more shapes" in text


def test_classes_show_who_gains_and_who_pays() -> None:
    record = Classes(
        cut="p90", worth=0.1, value=2.0, bound=2.1,
        kept=(KeptWithClasses(traffic="as planned", without_rps=1.0, with_rps=1.25),),
        ttft=(
            ClassLatency(name="short", share=0.9, rate_rps=1.0, without_s=1.0, with_s=0.5, limit_s=2.0,
                         max_prompt_tokens=2000),
            ClassLatency(name="long", share=0.1, rate_rps=1.0, without_s=1.5, with_s=None),
        ),
    )  # fmt: skip
    short = replace(plans.paper_replica(), classes=("short",))
    text = text_of(render_plan(record.on(plans.plan(short))))
    assert "for short requests" in text
    assert "used: cut at p90; by the model 2.000, no plan with them more than 2.100" in text
    assert [line.split() for line in text.splitlines() if line.startswith((" as planned", " short", " long"))] == [
        ["as", "planned", "1.000", "1.250", "+25.0%"],
        ["short", "2,000", "90%", "2.00", "s", "1.00", "s", "500", "ms", "gains"],
        ["long", "any", "10%", "none", "1.50", "s", "never"],
    ]
    refused = replace(record, why_not="no export target carries it")
    assert "not used: cut at p90; no export target carries it" in text_of(render_plan(refused.on(plans.plan(short))))


def test_a_latency_of_one_slow_replica_is_said_to_be_that() -> None:
    """Simulated means are over all requests, most of which a faster replica may serve."""
    fast, slow = (replace(plans.paper_replica(), tpot_s=tpot_s) for tpot_s in (0.04, 0.09))
    limited = Objective(ttft_limit_s=2.0, tpot_limit_s=0.1)
    for replicas, limit_s, words in (
        ((fast, slow), 0.1, "TPOT mean  90.0 ms of 100 ms   ██████████████████   90%, slowest replica"),
        ((fast, slow), None, "TPOT mean  90.0 ms, no limit, slowest replica"),
        ((slow, replace(slow, tpot_s=0.088)), 0.1, "TPOT mean  90.0 ms of 100 ms   ██████████████████   90%"),
        ((replace(fast, role=Role.PREFILL, tpot_s=0.0), replace(slow, role=Role.DECODE)), None,
         "TPOT mean  90.0 ms, no limit"),
    ):  # fmt: skip
        plan = replace(plans.plan(*replicas), objective=replace(limited, tpot_limit_s=limit_s))
        [line] = (line for line in text_of(render_plan(plan)).splitlines() if line.startswith("TPOT mean"))
        assert line.rstrip() == words


@pytest.mark.parametrize(
    ("level", "limit_of"),
    [
        (ServiceLevel(), ("", "")),
        (ServiceLevel(tpot=Statistic.P90), ("", ", limit for p90")),
        (ServiceLevel(ttft=Statistic.P90, tpot=Statistic.P90), (", limit for p90", ", limit for p90")),
        (ServiceLevel(attainment=0.9), (", limit for 90% of the requests",) * 2),
    ],
)
def test_a_bar_says_if_its_limit_is_for_another_statistic(level: ServiceLevel, limit_of: tuple[str, str]) -> None:
    plan = replace(PLANS["paper"], objective=Objective(ttft_limit_s=20.0, tpot_limit_s=2.0))
    lines = text_of(render_plan(with_service_level(plan, level)), width=120).splitlines()
    for name, words in zip(("TTFT p95", "TPOT mean"), limit_of, strict=True):
        [line] = (line.rstrip() for line in lines if line.startswith(name))
        assert line.partition("%")[2] == words


def test_the_explanation_shows_the_wire_of_replicas_that_have_one() -> None:
    text = " ".join(text_of(render_explanation(PLANS["roles"], plans.explanation(PLANS["roles"]))).split())
    assert "Replica 0 (prefill) and 2 like it" in text
    assert "wait (wire) stage 1 53.6 7.1 17.9 1.8 3.6 7.1 23.2" in text
    assert "Prefill to decode • Prefill replicas give 3 requests/s" in text
    unified = text_of(render_explanation(PLANS["paper"], plans.explanation(PLANS["paper"])))
    assert "wire" not in unified
    assert "Prefill to decode" not in unified


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optimal", "proven optimal: no plan of the family is better"),
        ("paper", "proven: no plan of the family is over 0.52% better"),
        ("interrupted", "interrupted; proven: no plan of the family is over 0.52% better"),
        ("cost", "proven: no plan of the family is over 0.52% cheaper"),
    ],
)
def test_the_verdict_claims_what_is_proven_and_no_more(name: str, words: str) -> None:
    assert verdict(PLANS[name]) == words


def test_the_bound_of_a_tenant_is_of_the_whole_fleet_to_itself() -> None:
    shared = replace(PLANS["paper"], inputs={**PLANS["paper"].inputs, OTHER_TENANTS: {"chat": ["l4-0/0"]}})
    words = "proven: even with the whole fleet to itself not over 0.52% better"
    assert verdict(shared) == words
    shown = " ".join(text_of(render_plan(shared)).split())
    assert words in shown
    assert "1 held by other tenants" in shown
    assert "with the whole fleet to itself gap 0.52%" in shown


def test_equal_replicas_are_grouped_and_none_is_lost() -> None:
    replicas = plans.large_replicas(65)
    groups = group_replicas(replicas)
    assert sorted(number for group in groups for number in group.numbers) == list(range(65))
    assert len(groups) == 30
    assert sum(group.rate for group in groups) == pytest.approx(sum(replica.rate for replica in replicas))


def test_layers_of_a_runner_up_are_those_of_the_plan_file() -> None:
    """Files have all layers of the model; those of earlier versions have the repeated ones, of which it has 89."""
    inputs = load_inputs(cluster=str(EXAMPLES / "paper.yaml"), model="zai-org/GLM-4.5", workload="1024/256").inputs
    plan = replace(PLANS["paper"], inputs={"documents": inputs.documents()})
    for shape in ("decode: L4 TP8 x1 L89", "L4 TP8 x1 L92"):
        runner = replace(plan.runners_up[0], shape=shape)
        assert [one.shape for one in distinct_runners_up(replace(plan, runners_up=(runner,)))] == [shape]
