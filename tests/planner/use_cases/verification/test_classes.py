"""Classes of requests in `place`: where they are cut, and when pools of classes are used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.documents import load_plan
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.use_cases.record.parts import Classes, Surviving
from hetis.planner.use_cases.saved_plans import load_plan_and_problem
from hetis.planner.use_cases.surviving import check_recorded_losses
from hetis.planner.use_cases.verification import classes
from hetis.planner.use_cases.verification.outcome import router_of
from hetis.solver.budget import Budget, silent
from hetis.solver.check import check_plan
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.plan import ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import LengthBin, Workload
from tests.fleets import fleet
from tests.simulator import small_plans

LENGTHS = ((100, 50), (1_000, 30), (8_000, 15), (20_000, 5))
TRAFFIC = Workload(
    name="tail",
    bins=tuple(LengthBin(prompt_tokens=p, output_tokens=100, weight=w) for p, w in LENGTHS),
)
FLEET = fleet("mixed", "h: 1 H100-SXM-80GB", "l: 4 L4")


def bounds(text: str, workload: Workload = TRAFFIC) -> dict[str, list[int | None]]:
    cuts = classes.cuts_of(text, workload)
    return {name: [one.max_prompt_tokens for one in found] for name, found in cuts.items()}


def test_cuts_are_the_shortest_prompts_that_have_their_share() -> None:
    assert bounds("p90") == {"p90": [8_000, None]}
    assert bounds("p50,p90") == {"p50,p90": [100, 8_000, None]}
    assert bounds("") == bounds("none") == {}
    assert bounds("auto") == {name: found for text in classes.TRIED for name, found in bounds(text).items()}
    own = replace(TRAFFIC, classes=classes.cuts_of("p75", TRAFFIC)["p75"])
    assert bounds("", own) == {"the workload's": [1_000, None]}
    assert bounds("none", own) == {}


@pytest.mark.parametrize("text", ["p", "p0", "p100", "90", "p90,p50", "p50,p50", "p10,p20,p30,p40", "p90,", "all"])
def test_what_is_no_cut_is_refused(text: str) -> None:
    with pytest.raises(InvalidProblemError, match="must be auto, none, or 1 to 3 ascending percentiles"):
        bounds(text)


def test_prompts_that_differ_too_little_are_not_cut() -> None:
    equal = replace(TRAFFIC, bins=TRAFFIC.bins[:1])
    with pytest.raises(InvalidProblemError, match="a class would have no requests"):
        bounds("p50", equal)
    assert bounds("auto", equal) == {}


def test_drift_is_to_longer_prompts() -> None:
    weights = [one.weight for one in classes.drifted(TRAFFIC).bins]
    assert weights == [0.75 * 50, 30, 15, 1.5 * 5]


WORKLOAD = """
apiVersion: hetis/v1
kind: Workload
name: own limits
classes:
  - {name: short, max_prompt_tokens: 3000, ttft: 1s}
  - {name: long}
histogram:
  - {prompt_tokens: 200, output_tokens: 200, weight: 40}
  - {prompt_tokens: 800, output_tokens: 150, weight: 30}
  - {prompt_tokens: 3000, output_tokens: 100, weight: 15}
  - {prompt_tokens: 12000, output_tokens: 300, weight: 10}
  - {prompt_tokens: 30000, output_tokens: 200, weight: 5}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    (folder / "fleet.yaml").write_text(FLEET)
    (folder / "traffic.yaml").write_text(WORKLOAD)
    return folder


def placed(folder: Path, *options: str, traffic: str = "traffic", exits: ExitCode = ExitCode.OK) -> dict[str, Any]:
    out = folder / "plan.json"
    out.unlink(missing_ok=True)
    workload = folder / f"{traffic}.yaml"
    traffic = str(workload) if workload.exists() else traffic
    asked = ["-c", str(folder / "fleet.yaml"), "-m", "llama-3.1-8b", "-w", traffic, "--ttft", "5s"]
    assert run(["place", *asked, "--no-verify", *options, "--out", str(out), "-q"]) == exits
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return found


def test_a_plan_with_classes_is_taken_where_it_is_worth_them(files: Path) -> None:
    options = "--rung", "node"  # higher ones take longer and are not worth it
    without = placed(files, *options, "--classes", "none")
    assert without["classes"] == []
    assert without["objective"]["ttft_limit_s"] == 1.0, "without classes the strictest limit is that of all"
    plan = placed(files, *options)
    assert plan["objective"]["ttft_limit_s"] == 5.0
    assert plan["result"]["value"] >= 1.1 * without["result"]["value"]
    assert [one["name"] for one in plan["classes"]] == ["short", "long"]
    assert {tuple(one["classes"]) for one in plan["replicas"]} & {("short",), ("long",)}
    found = load_plan_and_problem(str(files / "plan.json"))
    assert check_plan(found.plan, found.problem) == ()
    assert found.plan == load_plan(files / "plan.json")
    dear = placed(files, *options, "--worth", "99%")
    assert dear["classes"] == []
    assert dear["result"]["value"] == without["result"]["value"]
    assert "99% more is worth" in dear["inputs"]["classes_why_not"]
    plain = placed(files, *options, "--for", "kubernetes")
    assert plain["classes"] == []
    assert plain["inputs"]["classes_why_not"] == (
        "export target kubernetes cannot route by prompt length, so none were searched"
    )
    assert placed(files, *options, "--for", "llm-d")["classes"]


@pytest.mark.parametrize("goal", [(), ("--keep", "40%")])
def test_what_is_left_after_a_loss_is_left_of_every_class(goal: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(fleet("twice", "2 h: 1 H100-SXM-80GB", "4 t: 2 RTX-3090"))
    options = "--survive", "node", "--rung", "node", *goal
    without = placed(tmp_path, *options, "--classes", "none", traffic="longbench_lengths")["inputs"]
    plan = placed(tmp_path, *options, "--classes", "p50", "--worth", "0", traffic="longbench_lengths")
    found = load_plan_and_problem(str(tmp_path / "plan.json"))
    assert check_plan(found.plan, found.problem) == ()
    assert check_recorded_losses(found.plan, found.problem) == ()
    assert plan["classes"], plan["inputs"]["classes_why_not"]
    if not goal:
        assert plan["inputs"]["survives_rps"] > without["survives_rps"]


def test_a_strategy_that_knows_no_classes_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    placed(files, "--classes", "p50", "--strategy", "hexgen-paper", exits=ExitCode.INVALID)
    assert "--classes p50" in capsys.readouterr().err


def test_limits_of_classes_are_not_dropped_by_other_cuts(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    placed(files, "--classes", "p75", exits=ExitCode.INVALID)
    assert "class short of own limits has limits of its own" in capsys.readouterr().err


def chosen(
    without: Plan, candidates: Sequence[Plan], keeps: dict[float, tuple[float, float]], worth: float,
    monkeypatch: pytest.MonkeyPatch, simulated: list[Any] | None = None, target: str = "",
) -> Plan:  # fmt: skip
    """Return what is chosen if plans keep these rates, in planned and in drifted traffic, by their values.

    What is ``simulated``, and the plan that is verified, are noted there.
    """
    simulated = [] if simulated is None else simulated

    def run(self: Any, found: classes.WithClasses, traffic: Any, rate: float) -> tuple[bool, None]:
        assert self._settings.router == router_of(target)
        simulated.append((found.plan.result.value, traffic.name, rate))
        return rate <= keeps[found.plan.result.value][traffic.is_drifted], None

    def verified(candidate: classes.WithClasses) -> Plan:
        simulated.append(candidate.plan.result.value)
        return candidate.plan

    monkeypatch.setattr(classes._Compared, "_simulated", run)
    monkeypatch.setattr(classes._Compared, "_keeps", lambda _self, is_steady, _run: is_steady)
    monkeypatch.setattr(classes, "_latencies", lambda *_: (1.0, 0.1))
    return classes.choose(
        classes.WithClasses(plan=without, problem=small_plans.small_problem(workload=TRAFFIC)), without.objective,
        classes.cuts_of("p75", TRAFFIC), lambda _: iter(candidates), worth=worth, seed=0, budget=Budget(),
        report=silent, verified=verified, target=target,
    ).plan  # fmt: skip


def without_and_with_pools(**objective: Any) -> tuple[Plan, Plan]:
    problem = small_plans.small_problem(workload=TRAFFIC)
    one = small_plans.pipeline(problem, problem.model.num_layers)
    pools = replace(one, rate=4.0, classes=("short",)), replace(one, rate=6.0, classes=("long",))
    plans = small_plans.plan_of(replace(one, rate=10.0)), small_plans.plan_of(*pools)
    without, having = (replace(plan, objective=replace(plan.objective, **objective)) for plan in plans)
    return without, having


def valued(plan: Plan, value: float) -> Plan:
    """Return a plan with this value, whose replicas are as fast."""
    replicas = tuple(replace(one, rate=value * one.rate / plan.served_rate()) for one in plan.replicas)
    return replace(plan, replicas=replicas, result=replace(plan.result, value=value))


@pytest.mark.parametrize(("worth", "target"), [(0.1, ""), (0.3, "ray")])
def test_the_first_plan_by_value_that_keeps_enough_is_used(
    worth: float, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 plans with pools that keep 10% and 25% more, the first in planned traffic only, the second is found."""
    without, having = without_and_with_pools()
    keeps = {10.0: (10.0, 8.0), 13.0: (11.0, 6.0), 12.0: (12.5, 10.0)}
    robust, promising = valued(having, 12.0), valued(having, 13.0)
    found = chosen(valued(without, 10.0), (robust, promising), keeps, worth, monkeypatch, target=target)
    told = Classes.of(found)
    assert found.result.value == (12.0 if worth == 0.1 else 10.0)
    assert bool(told.why_not) == (worth == 0.3)
    if worth == 0.1:
        assert (told.cut, told.value) == ("p75", 12.0)
        for (before, after), kept in zip(((10.0, 12.5), (8.0, 10.0)), told.kept[:2], strict=True):
            assert kept.without_rps == pytest.approx(before, rel=classes.PRECISE)
            assert kept.with_rps == pytest.approx(after, rel=classes.PRECISE)
            assert kept.with_rps >= (1.0 + worth) * kept.without_rps


def test_of_many_cuts_those_of_the_best_plans_that_are_found_quickly_are_searched() -> None:
    without, having = without_and_with_pools()
    cuts, searched = classes.cuts_of(classes.AUTO, TRAFFIC), list[str]()
    names = {found: name for name, found in cuts.items()}
    promised = dict(zip(cuts, (9.0, 12.0, None, 11.0), strict=False))

    def promise(posed: PlacementProblem) -> Plan:
        value = promised[names[posed.workload.classes]]
        if value is None:
            raise NoPlanFoundError("none was found")
        return valued(having, value)

    def find(posed: PlacementProblem) -> Iterator[Plan]:
        searched.append(names[posed.workload.classes])
        return iter(())

    classes.choose(
        classes.WithClasses(plan=without, problem=small_plans.small_problem(workload=TRAFFIC)), without.objective,
        cuts, find, worth=0.1, seed=0, budget=Budget(), report=silent, promise=promise,
    )  # fmt: skip
    assert searched == ["p75", "p50,p90"]


def test_plans_that_run_the_same_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    without, having = without_and_with_pools()
    tried = list[float]()
    slower = replace(having, replicas=tuple(replace(one, ttft_s=2.0 * one.ttft_s) for one in having.replicas))

    def keeps_more(_self: object, found: classes.WithClasses, _worth: float) -> bool:
        tried.append(found.plan.result.value)
        return False

    monkeypatch.setattr(classes._Compared, "keeps_more", keeps_more)
    keeps = dict.fromkeys((10.0, 11.0, 12.0), (10.0, 10.0))
    worse = replace(slower, result=replace(having.result, value=11.0))
    better = replace(having, result=replace(having.result, value=12.0))
    chosen(valued(without, 10.0), (worse, better), keeps, 0.1, monkeypatch)
    assert tried == [12.0]


@pytest.mark.parametrize(("worth", "last"), [(0.1, "bursts"), (0.15, "longer prompts"), (0.3, "as planned")])
def test_simulations_end_with_the_traffic_that_decides(
    worth: float, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a plan that keeps 20% more, of longer prompts 12%; only what is used is verified, and nothing is run twice."""
    without, having = without_and_with_pools()
    simulated, keeps = list[Any](), {10.0: (10.0, 10.0), 12.0: (12.4, 11.5)}
    found = chosen(valued(without, 10.0), [valued(having, 12.0)], keeps, worth, monkeypatch, simulated)
    assert Classes.of(found).kept[-1].traffic == last
    assert len(simulated) == len(set(simulated))
    assert (12.0 in simulated) == (found.result.value == 12.0) == (last == "bursts")
    names = [traffic.name for traffic in classes.TRAFFIC]
    assert {name for one in simulated if isinstance(one, tuple) for name in one[1:2]} == {
        *names[: names.index(last) + 1]
    }


def test_rates_that_decide_nothing_take_fewer_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    without, having = without_and_with_pools()
    simulated, keeps = list[Any](), {10.0: (8.75, 8.75), 12.0: (12.5, 12.5)}
    chosen(valued(without, 10.0), [valued(having, 12.0)], keeps, 0.1, monkeypatch, simulated)
    of_bursts = [rate for _, name, rate in (one for one in simulated if isinstance(one, tuple)) if name == "bursts"]
    assert len(of_bursts) == 7


def test_of_plans_that_leave_most_after_a_loss_what_is_left_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 requests/s 4 are left, of 9 with pools 6."""
    without, having = (
        Surviving(left_rps=left_rps, bound_rps=left_rps).on(valued(plan, value))
        for plan, value, left_rps in zip(without_and_with_pools(), (10.0, 9.0), (4.0, 6.0), strict=True)
    )
    found = chosen(without, [having], {10.0: (10.0, 10.0), 9.0: (9.0, 9.0)}, 0.3, monkeypatch)
    assert found.result.value == 9.0
    kept = Classes.of(found).kept[0]
    assert (kept.without_rps, kept.with_rps) == pytest.approx((4.0, 6.0), rel=classes.PRECISE)


@pytest.mark.parametrize(("worth", "value"), [(0.1, 85.0), (0.2, 100.0)])
def test_of_a_demand_the_first_plan_by_value_that_keeps_enough_of_it_for_its_cost_is_used(
    worth: float, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of plans for 70 and 85 GPUs in place of 100, the first keeps half of the demand."""
    without, having = without_and_with_pools(kind=ObjectiveKind.GPUS, demand_rps=10.0)
    keeps = {100.0: (12.0, 10.5), 70.0: (5.0, 5.0), 85.0: (11.0, 10.0)}
    candidates = valued(having, 70.0), valued(having, 85.0)
    assert chosen(valued(without, 100.0), candidates, keeps, worth, monkeypatch).result.value == value


def test_the_highest_rate_that_is_tried_is_kept_if_all_are(monkeypatch: pytest.MonkeyPatch) -> None:
    without, having = without_and_with_pools()
    most = 10.0 * classes.STEP ** (2 ** (classes.MOST_STEPS - 1))
    keeps = {10.0: (10.0, 10.0), 12.0: (2.0 * most, 2.0 * most)}
    told = Classes.of(chosen(valued(without, 10.0), [valued(having, 12.0)], keeps, 0.1, monkeypatch))
    assert told.kept[0].with_rps >= most
