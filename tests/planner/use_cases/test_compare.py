"""`compare` with a fake solver: order, bounds, figures, the table, and the exit for every outcome."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hetis.formats.documents import load_plan
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.report.comparison import model_words
from hetis.planner.use_cases import compare as comparing
from hetis.planner.use_cases.climbing import Climbed
from hetis.planner.use_cases.compare import Searches, best_of, compare_strategies, figures_of, kept_of
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.record.forms import RungFound
from hetis.planner.use_cases.record.parts import Requested, Rungs
from hetis.planner.use_cases.service_level import ServiceLevel
from hetis.planner.use_cases.sources import Inputs, load_inputs
from hetis.planner.use_cases.verification.outcome import STOPPED_EARLY
from hetis.solver.budget import Budget, silent
from hetis.solver.errors import BrokenProofError, InfeasibleError, NoPlanFoundError, UncheckedPlanError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import KvRoute, Objective, ObjectiveKind, Plan, Role
from hetis.solver.problem import EngineRules, PlacementProblem
from tests.planner import plans
from tests.planner.command_line import EXAMPLES

LOADED = load_inputs(cluster=str(EXAMPLES / "paper.yaml"), model="Llama-2-70B", workload="1024/256")
SIMULATED = ["compare", "--cluster", str(EXAMPLES / "paper.yaml"), "-m", "Llama-2-70B", "-w", "1024/256"]
COMMAND = [*SIMULATED, "--no-verify"]

UNLIMITED = Objective(ttft_limit_s=None, tpot_limit_s=None)
Outcome = tuple[float, float] | Exception  # value and bound
Solver = Callable[[Mapping[str, Outcome]], list[str]]


def plan_of(strategy: str, value: float, bound: float, objective: Objective) -> Plan:
    plan = plans.plan(plans.paper_replica())
    gap = abs(bound - value) / value
    result = replace(plan.result, value=value, bound=bound, gap=gap, objective=objective.kind, unit=objective.unit)
    return replace(plan, strategy=strategy, result=result, objective=objective)


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Solver:
    """Makes every strategy return a value and a bound, or raise; records the order in which they ran."""

    def answer_with(outcomes: Mapping[str, Outcome]) -> list[str]:
        asked: list[str] = []

        def make_plan(
            _loaded: object, problem: PlacementProblem, settings: PlacementSettings, **_options: object
        ) -> Climbed:
            asked.append(settings.strategy)
            outcome = outcomes[settings.strategy]
            if isinstance(outcome, Exception):
                raise outcome
            return Climbed(plan=plan_of(settings.strategy, *outcome, problem.objective), problem=problem)

        monkeypatch.setattr(comparing, "make_plan", make_plan)
        return asked

    return answer_with


def compared(
    strategies: list[str], budget: Budget | None = None, objective: Objective | None = None
) -> dict[str, comparing.Compared]:
    found = compare_strategies(searches(objective or UNLIMITED, lambda: budget or Budget()), strategies)
    return {outcome.strategy: outcome for outcome in found}


def searches(objective: Objective, budget: Callable[[], Budget] = Budget) -> Searches:
    settings = PlacementSettings(engine=EngineRules(name="vllm-hetis"))
    return Searches(loaded=LOADED, objective=objective, settings=settings, budget=budget, report=silent)


def test_contained_strategies_are_run_before_what_contains_them(solver: Solver) -> None:
    searched = [name for name, strategy in STRATEGIES.items() if not strategy.is_published]
    asked = solver(dict.fromkeys(searched, (1.0, 1.0)))
    found = compared(searched)
    assert list(found) == searched
    for inner, outer in comparing.CONTAINERS.items():
        assert asked.index(inner) < asked.index(outer)


def test_containers_are_strategies_that_have_every_plan_of_the_contained_one() -> None:
    from hetis.solver.problem import Family

    for inner, outer in comparing.CONTAINERS.items():
        small, large = STRATEGIES[inner].restrict(Family()), STRATEGIES[outer].restrict(Family())
        assert small.max_pool <= large.max_pool
        assert set(small.roles) <= set(large.roles)
        assert small.mixed_types <= large.mixed_types
        assert small.uneven_layers <= large.uneven_layers
        assert set(small.attention_dp) <= set(large.attention_dp)


def test_a_strategy_gets_the_bound_of_the_one_that_contains_it(solver: Solver) -> None:
    solver({"splitwise": (2.0, 9.0), "hexgen2": (2.4, 2.5), "hetis": (3.0, 3.0)})
    found = compared(["splitwise", "hexgen2", "hetis"])
    results = {name: outcome.plan.result for name, outcome in found.items() if outcome.plan is not None}
    assert (results["splitwise"].bound, results["splitwise"].gap) == (2.5, pytest.approx(0.25))
    plan = found["splitwise"].plan
    assert plan.notes[-1] == "the bound is that of strategy hexgen2, which has all plans of splitwise"


def test_a_bound_never_crosses_the_value(solver: Solver) -> None:
    """Value and bound are sums of rounded numbers."""
    solver({"splitwise": (2.0 * (1 + 1e-12), 9.0), "hexgen2": (2.0, 2.0)})
    plan = compared(["splitwise", "hexgen2"])["splitwise"].plan
    assert plan.result.bound == plan.result.value


def test_a_better_plan_of_a_contained_strategy_is_the_container_s_too(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container's search was cut short at 2.0; the heuristic found 2.2, the bound stays 2.5. `hetis` beats both."""
    monkeypatch.setattr(comparing, "check_plan", lambda *_: ())
    solver({"splitwise": (2.2, 9.0), "hexgen2": (2.0, 2.5), "hetis": (3.0, 3.0)})
    found = compared(["hetis", "hexgen2", "splitwise"])
    plan = found["hexgen2"].plan
    assert (plan.strategy, plan.result.value, plan.result.bound) == ("hexgen2", 2.2, 2.5)
    assert plan.notes[-1] == "the plan was found by strategy splitwise, whose plans are all of hexgen2"
    assert found["hetis"].plan.result.value == 3.0


def test_a_plan_that_the_checker_refuses_is_not_taken_over(solver: Solver) -> None:
    solver({"splitwise": (2.2, 9.0), "hexgen2": (2.0, 2.5)})  # handmade plans, whose numbers prove nothing
    plan = compared(["hexgen2", "splitwise"])["hexgen2"].plan
    assert plan.result.value == 2.0


def test_a_plan_beyond_a_proven_bound_is_a_broken_proof(solver: Solver) -> None:
    solver({"splitwise": (2.6, 9.0), "hexgen2": (2.0, 2.5)})
    with pytest.raises(BrokenProofError, match=r"contradicts the bound"):
        compared(["hexgen2", "splitwise"])


def test_once_cancelled_the_others_are_not_run(solver: Solver) -> None:
    cancelled = threading.Event()
    cancelled.set()
    asked = solver({"hetis": (1.0, 1.0)})
    found = compared(["hetis"], Budget(cancelled=cancelled))
    assert asked == []
    assert found["hetis"].reasons == ("interrupted before it ran",)


def at_two_dollars() -> Inputs:
    """Return the inputs with every GPU at 2 USD/h."""
    groups = tuple(
        replace(group, gpus=tuple(replace(slots, usd_per_hour=2.0) for slots in group.gpus))
        for group in LOADED.inputs.cluster.node_groups
    )
    return replace(LOADED.inputs, cluster=replace(LOADED.inputs.cluster, node_groups=groups))


def test_figures_of_a_plan() -> None:
    """Twelve GPUs at 2 USD/h and 1.5 requests/s, 90% of it planned, 256 output tokens each."""
    inputs = at_two_dollars()
    figures = figures_of(plans.plan(plans.paper_replica()), inputs)
    assert figures.rate_rps == pytest.approx(0.9 * 1.5)
    assert figures.usd_per_hour == pytest.approx(24.0)
    assert figures.usd_per_million_output_tokens == pytest.approx(1e6 * 24.0 / (0.9 * 1.5 * 256 * 3600))
    assert (figures.gpus_used, figures.gpus_idle, figures.kv_tokens) == (12, 0, 123_456)


def test_tokens_of_a_plan_of_least_cost_cost_what_they_do_at_the_demanded_rate() -> None:
    """A plan that survives a loss is sized for a larger demand, which is not what it is paid for."""
    inputs = at_two_dollars()
    plan = plans.plan(plans.paper_replica(), kind=ObjectiveKind.COST)
    plan = replace(plan, objective=replace(plan.objective, demand_rps=0.9))
    surviving = Requested(of_objective={"demand_rps": 0.6}).on(plan)
    for one, rate_rps in ((plan, 0.9), (surviving, 0.6)):
        figures = figures_of(one, inputs)
        assert figures.rate_rps == pytest.approx(0.9 * 1.5)
        assert figures.usd_per_million_output_tokens == pytest.approx(1e6 * 24.0 / (rate_rps * 256 * 3600))


def test_a_gpu_without_a_price_makes_the_plan_s_price_unknown() -> None:
    """The catalogue has no price for the P100."""
    figures = figures_of(plans.plan(plans.paper_replica()), LOADED.inputs)
    assert figures.usd_per_hour is None
    assert figures.usd_per_million_output_tokens is None


def test_prefill_replicas_have_no_room_for_requests_and_routes_are_the_rate() -> None:
    prefill = replace(plans.paper_replica(), role=Role.PREFILL, micro_batch=0, tpot_s=0.0, attention_workers=())
    decode = replace(plans.deep_replica(2), role=Role.DECODE, chunk_tokens=0, ttft_s=0.0)
    plan = replace(plans.plan(prefill, decode), kv_routes=(KvRoute(prefill=0, decode=1, rate=0.1),))
    figures = figures_of(plan, LOADED.inputs)
    assert figures.rate_rps == pytest.approx(0.09)
    assert figures.kv_tokens == decode.kv_tokens
    assert (figures.ttft_s, figures.tpot_s) == (prefill.ttft_s, decode.tpot_s)


def test_a_strategy_without_a_plan_is_a_row_with_its_reason(solver: Solver, capsys: pytest.CaptureFixture[str]) -> None:
    infeasible, late = InfeasibleError(("weights take 140 GB",)), NoPlanFoundError("no time")
    solver({"hetis": (1.35, 1.36), "uniform": infeasible, "hexgen": late})
    assert run([*COMMAND, "--strategies", "hetis,uniform,hexgen"]) == ExitCode.OK
    table, reasons = capsys.readouterr().out.split("Without a plan")
    assert "1.35" in next(line for line in table.splitlines() if line.startswith("hetis"))
    assert " - " in next(line for line in table.splitlines() if line.startswith("uniform"))
    words = " ".join(reasons.split())
    assert words == "uniform infeasible: weights take 140 GB hexgen no plan: no time"
    assert model_words(Objective(kind=ObjectiveKind.GOODPUT)) in " ".join(table.split())


@pytest.mark.parametrize(
    ("engines", "said"),
    [((), "for engine vllm-hetis"), (("--engine", "vllm"), "for engine vllm")],
)
def test_the_engine_of_all_plans_is_in_the_header(
    solver: Solver, tmp_path: Path, capsys: pytest.CaptureFixture[str], engines: tuple[str, ...], said: str
) -> None:
    solver(dict.fromkeys(("hetis", "uniform"), InfeasibleError(("weights take 140 GB",))))
    page = tmp_path / "page.html"
    asked = ["--strategies", "hetis,uniform", *engines, "--html", str(page)]
    assert run([*COMMAND, *asked]) == ExitCode.INFEASIBLE
    assert capsys.readouterr().out.splitlines()[2].startswith(said)
    assert f"; {said}" in page.read_text(encoding="utf-8")


def test_the_table_fits_80_columns(
    solver: Solver, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcomes: dict[str, Outcome] = dict.fromkeys(STRATEGIES, (0.1234, 17.23))
    solver(outcomes | {"splitwise": InfeasibleError(("no " * 60,))})
    assert run(COMMAND) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    row = next(line for line in lines if line.startswith("hexgen2-paper"))
    for cell in ("1.35", "17.2", ">999%", "12 (0)", "123k"):
        assert cell in row


@pytest.mark.parametrize(
    ("columns", "missing"), [(76, "KV tokens"), (60, "USD/M tokens, KV tokens, solved s"), (80, None)]
)
def test_a_narrow_table_leaves_out_columns_and_cuts_off_no_number(
    columns: int,
    missing: str | None,
    solver: Solver,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ellipses in numbers, as in `TTFT 1.…`, are worse than a missing column."""
    monkeypatch.setenv("COLUMNS", str(columns))
    solver({"hetis": (123.45, 123456.0), "splitwise-paper": (123.45, 123456.0)})
    assert run([*COMMAND, "--strategies", "hetis,splitwise-paper"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(len(line) <= columns for line in out.splitlines() if line.startswith(("hetis", "splitwise")))
    told = re.findall(r"not shown, for lack of width: (.*?) \(-o json has all\)", " ".join(out.split()))
    assert told == ([] if missing is None else [missing])


def test_json_holds_every_plan_and_its_figures(solver: Solver, capsys: pytest.CaptureFixture[str]) -> None:
    solver({"hetis": (1.35, 1.36), "uniform": InfeasibleError(("weights take 140 GB",))})
    assert run([*COMMAND, "--strategies", "hetis,uniform", "-o", "json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    hetis, uniform = document["strategies"]
    assert document["kind"] == "Comparison"
    assert hetis["plan"]["strategy"] == "hetis"
    assert hetis["figures"]["gpus_used"] == 12
    assert hetis["result"]["bound"] == 1.36
    assert (uniform["status"], uniform["plan"], uniform["reasons"]) == ("infeasible", None, ["weights take 140 GB"])


def test_an_internal_error_in_one_strategy_costs_no_other_its_plan(
    solver: Solver, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    solver({"hetis": (1.35, 1.36), "uniform": IndexError("index 1 is out of bounds")})
    run([*COMMAND, "--strategies", "hetis,uniform", "-o", "json"])
    hetis, uniform = json.loads(capsys.readouterr().out)["strategies"]
    assert hetis["plan"]["strategy"] == "hetis"
    assert uniform["status"] == "failed"
    assert uniform["reasons"][0].startswith("internal error: IndexError: index 1 is out of bounds (")
    monkeypatch.setenv("HETIS_DEBUG", "1")
    with pytest.raises(IndexError):
        run([*COMMAND, "--strategies", "hetis,uniform"])


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ({"hetis": InfeasibleError(("no",)), "uniform": InfeasibleError(("no",))}, ExitCode.INFEASIBLE),
        ({"hetis": InfeasibleError(("no",)), "uniform": NoPlanFoundError("late")}, ExitCode.NO_PLAN),
        ({"hetis": (1.0, 1.0), "uniform": UncheckedPlanError(("replica 0: no device",))}, ExitCode.INTERNAL),
    ],
)
def test_exit_codes(
    outcomes: Mapping[str, Outcome], code: ExitCode, solver: Solver, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(outcomes)
    assert run([*COMMAND, "--strategies", ",".join(outcomes)]) == code
    assert "Without a plan" in capsys.readouterr().out


def test_plans_are_saved_by_strategy(solver: Solver, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver({"hetis": (1.35, 1.36), "uniform": InfeasibleError(("no",))})
    assert run([*COMMAND, "--strategies", "hetis,uniform", "--out", str(tmp_path)]) == ExitCode.OK
    assert [path.name for path in tmp_path.iterdir()] == ["hetis.json"]
    assert load_plan(tmp_path / "hetis.json").result.value == 1.35


def test_a_folder_that_cannot_be_written_is_refused_before_the_solve(
    solver: Solver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = solver({})
    (tmp_path / "file").write_text("")
    for out, said in (("missing/deeper", "no folder"), ("file", "no folder"), ("-", "--out needs a folder")):
        where = out if out == "-" else str(tmp_path / out)
        assert run([*COMMAND, "--strategies", "hetis", "--out", where]) == ExitCode.INVALID
        assert said in capsys.readouterr().err
    assert asked == []


def test_a_missing_folder_is_created_with_the_plans(solver: Solver, tmp_path: Path) -> None:
    solver({"hetis": (1.35, 1.36)})
    call = [*COMMAND, "--strategies", "hetis", "--out", str(tmp_path / "new")]
    assert run([*call, "--dry-run"]) == ExitCode.OK
    assert not (tmp_path / "new").exists()
    assert run(call) == ExitCode.OK
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hetis.json"]


def test_an_unknown_strategy_is_named_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND, "--strategies", "hetis,hexgem"]) == ExitCode.INVALID
    assert "did you mean hexgen?" in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_least_cost_is_compared_by_cost(solver: Solver, capsys: pytest.CaptureFixture[str]) -> None:
    solver({"hexgen": (9.0, 8.0), "hetis": (8.5, 8.5)})
    command = [str(EXAMPLES / "h100-l4.yaml") if one.endswith("paper.yaml") else one for one in COMMAND]  # with prices
    goal = ["--objective", "cost", "--rate", "1", "--strategies", "hexgen,hetis"]
    assert run([*command, *goal, "-o", "json"]) == ExitCode.OK
    hexgen, hetis = json.loads(capsys.readouterr().out)["strategies"]
    assert hexgen["result"]["objective"] == ObjectiveKind.COST.value
    assert hexgen["result"]["bound"] == 8.5  # no plan of hexgen costs less than the least cost of hetis
    assert hetis["result"]["bound"] == 8.5


def test_all_strategies_are_not_given_beside_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND, "--strategies", "all,uniform"]) == ExitCode.INVALID
    assert "combines all with names" in " ".join(capsys.readouterr().err.split())


def test_engines_are_compared_with_what_each_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own search; heuristics, which know no engine's rules, are run once."""
    values = {None: 2.0, "vllm": 2.4, "vllm-hetis": 3.0}

    def make_plan(
        _loaded: object, problem: PlacementProblem, settings: PlacementSettings, **_options: object
    ) -> Climbed:
        assert problem.family.engine == settings.engine
        name = None if settings.engine is None else settings.engine.name
        return Climbed(plan=plan_of(settings.strategy, values[name], 3.5, problem.objective), problem=problem)

    monkeypatch.setattr(comparing, "make_plan", make_plan)
    engines = {name: EngineRules(name=name) for name in ("vllm", "vllm-hetis")}
    found = comparing.compare_engines(searches(Objective()), ["hetis", "hexgen-paper"], engines)
    rows = [(o.strategy, o.engine, o.plan.result.value if o.plan is not None else o.reasons) for o in found]
    assert rows == [("hetis", "vllm", 2.4), ("hetis", "vllm-hetis", 3.0), ("hexgen-paper", None, 2.0)]


@pytest.mark.parametrize("verb", ["compare", "place"])
def test_plans_for_any_engine_are_gone_and_the_error_says_what_to_use(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([verb, *COMMAND[1:], "--engine", "any"]) == ExitCode.INVALID
    said = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "--engine any is gone, because no engine ran its plans: plan for vllm-hetis (the default), vllm or" in said


def test_compare_of_engines_has_a_row_and_a_file_for_each(
    solver: Solver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver({"hetis": (1.0, 1.0), "hexgen-paper": (0.5, 1.0)})
    assert run([*COMMAND, "--engine", "vllm,sglang", "--max-gpus", "4", "--out", str(tmp_path)]) == ExitCode.OK
    printed = capsys.readouterr().out
    rows = [line.split()[0] for line in printed.splitlines() if line.strip()]
    assert {"engine", "vllm", "sglang"} <= set(rows)
    assert {path.name for path in tmp_path.iterdir()} == {"hetis-vllm.json", "hetis-sglang.json"}
    run([*COMMAND, "--engine", "vllm", "--strategies", "hetis,hexgen-paper", "-o", "json"])
    entries = json.loads(capsys.readouterr().out)["strategies"]
    assert [(entry["strategy"], entry["engine"], entry["status"]) for entry in entries] == [
        ("hetis", "vllm", "feasible"),
        ("hexgen-paper", None, "feasible"),
    ]


# --- simulated


def verification(*, kept: bool, kept_rps: float | None) -> dict[str, object]:
    return {
        "rate_rps": 1.35, "num_requests": 4000, "kept": kept, "steady": True, "ttft_p95_s": 1.0, "tpot_mean_s": 0.05,
        "attainment": 0.9, "kept_rps": kept_rps,
    }  # fmt: skip


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, dict[str, object] | Exception]], list[str]]:
    """Makes the simulation of a strategy's plan return something, or raise; records the limits that it was given."""

    def answer_with(outcomes: Mapping[str, dict[str, object] | Exception]) -> list[str]:
        asked: list[str] = []

        def simulated_plan(
            made: Climbed, _loaded: object, settings: PlacementSettings, *, level: ServiceLevel, **_options: object
        ) -> Climbed:
            plan = made.plan
            asked.append(f"{settings.strategy}: {level}")
            assert made.problem.objective == plan.objective
            outcome = outcomes[settings.strategy]
            if isinstance(outcome, Exception):
                raise outcome
            result = replace(plan.result, solve_s=plan.result.solve_s + 2.0)  # a second search took place
            return replace(made, plan=replace(plan, result=result, inputs={**plan.inputs, "verification": outcome}))

        monkeypatch.setattr(comparing, "simulated_plan", simulated_plan)
        return asked

    return answer_with


Simulator = Callable[[Mapping[str, dict[str, object] | Exception]], list[str]]


def bold_rows(capsys: pytest.CaptureFixture[str], command: list[str]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        run(command)
    bold = re.findall(r"^\x1b\[1m([\w-]+)", capsys.readouterr().out, re.MULTILINE)
    return [word for word in bold if word in STRATEGIES]


def test_plans_are_compared_by_what_simulated_traffic_keeps(
    solver: Solver, simulator: Simulator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    values = {"hetis": (1.5, 1.5), "hexgen": (1.4, 1.4), "uniform": (1.3, 1.3), "hexgen2": (1.2, 1.2)}
    solver(values)
    asked = simulator({
        "hetis": verification(kept=False, kept_rps=0.9), "hexgen": verification(kept=True, kept_rps=1.42),
        "uniform": verification(kept=False, kept_rps=None), "hexgen2": UncheckedPlanError(("replica 0: no device",)),
    })  # fmt: skip
    command = [*SIMULATED, "--strategies", "hetis,hexgen,uniform,hexgen2", "--attainment", "95%"]
    assert run(command) == ExitCode.INTERNAL
    assert [line.split(":")[0] for line in asked] == ["hetis", "hexgen", "uniform", "hexgen2"]
    assert all("95%" in line for line in asked)
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert bold_rows(capsys, command) == ["hexgen"]
    kept = {cells[0]: cells[2] for line in out.splitlines() if len(cells := line.split()) > 10}
    assert (kept["hetis"], kept["hexgen"], kept["uniform"]) == ("0.900", "1.40", "none")
    assert "hexgen2 failed: " in " ".join(out.split("another search failed")[1].split())
    assert run([*command[:-2], "-o", "json"]) == ExitCode.INTERNAL
    hetis, _, uniform, hexgen2 = json.loads(capsys.readouterr().out)["strategies"]
    assert (hetis["simulated"]["kept_rps"], hetis["simulated"]["kept"]) == (0.9, False)
    assert (uniform["simulated"]["kept_rps"], hexgen2["status"], hexgen2["simulated"]) == (None, "failed", None)
    assert hexgen2["plan"]["result"]["value"] == 1.2, "the first plan was checked"


@pytest.mark.parametrize("error", [BrokenProofError("bound 1 of 2"), UncheckedPlanError(("replica 0: no device",))])
def test_another_search_that_fails_costs_no_plan(
    error: Exception, solver: Solver, simulator: Simulator, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    solver({"hetis": (1.5, 1.5), "uniform": (1.3, 1.3)})
    simulator({"hetis": verification(kept=True, kept_rps=1.35), "uniform": error})
    assert run([*SIMULATED, "--strategies", "hetis,uniform", "--out", str(tmp_path)]) == ExitCode.INTERNAL
    assert {path.name for path in tmp_path.iterdir()} == {"hetis.json", "uniform.json"}
    assert "uniform failed: " in " ".join(capsys.readouterr().out.split("another search failed")[1].split())


def test_the_bound_of_a_container_is_named_after_another_search_too(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver({"hexgen": (1.4, 1.9), "hetis": (1.5, 1.6)})

    def simulated(made: Climbed, *_: object, **__: object) -> Climbed:
        return replace(made, plan=replace(made.plan, notes=("another",)))

    monkeypatch.setattr(comparing, "simulated_plan", simulated)
    engines = {"vllm": EngineRules(name="vllm")}
    found = comparing.compare_engines(searches(Objective()), ["hexgen", "hetis"], engines)
    hexgen, hetis = comparing.simulate_plans(found, searches(Objective()), engines, ServiceLevel())
    assert hexgen.plan.notes == ("another", "the bound is that of strategy hetis, which has all plans of hexgen")
    assert hetis.plan.notes == ("another",)


def test_once_cancelled_plans_remain_as_they_are(solver: Solver) -> None:
    cancelled = threading.Event()
    asked = searches(Objective(), partial(Budget, cancelled=cancelled))
    solver({"hetis": (1.5, 1.5)})
    found = comparing.compare_engines(asked, ["hetis"], {"vllm": EngineRules(name="vllm")})
    cancelled.set()
    [again] = comparing.simulate_plans(found, asked, {"vllm": EngineRules(name="vllm")}, ServiceLevel())
    assert again.plan == replace(found[0].plan, notes=(*found[0].plan.notes, STOPPED_EARLY))


def test_throughput_is_not_set_beside_the_rate_that_is_simulated(
    solver: Solver, simulator: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    solver({"hetis": (1.5, 1.5), "uniform": (1.3, 1.3)})
    simulator({name: verification(kept=True, kept_rps=1.35) for name in ("hetis", "uniform")})
    goal = ["--objective", "throughput", "--ttft", "20s", "--strategies", "hetis,uniform"]
    assert run([*SIMULATED, *goal]) == ExitCode.OK
    assert "kept" not in capsys.readouterr().out


def test_the_best_plan_is_the_one_that_keeps_most_or_costs_least() -> None:
    def simulated(objective: Objective, value: float, *, kept: bool, kept_rps: float | None) -> Plan:
        plan = plan_of("hetis", value, value, objective)
        return replace(plan, inputs={**plan.inputs, "verification": verification(kept=kept, kept_rps=kept_rps)})

    most, least = Objective(), Objective(kind=ObjectiveKind.COST, demand_rps=1.0)
    assert best_of([plan_of("hetis", 1.0, 2.0, most), plan_of("uniform", 1.5, 2.0, most)]) == 1
    rates = [(1.5, False, 0.9), (1.4, True, 1.42), (1.6, False, None)]
    assert best_of([simulated(most, value, kept=kept, kept_rps=rps) for value, kept, rps in rates]) == 1
    costs = [(5.0, False, 0.9), (9.0, True, 1.0), (7.0, True, 1.0)]
    assert best_of([simulated(least, value, kept=kept, kept_rps=rps) for value, kept, rps in costs]) == 2
    missing = [(5.0, False, 0.5), (9.0, False, 0.9)]
    assert best_of([simulated(least, value, kept=kept, kept_rps=rps) for value, kept, rps in missing]) == 1
    known = simulated(most, 1.5, kept=False, kept_rps=0.9)
    assert best_of([plan_of("hetis", 0.95, 2.0, most), known]) == 1, "nothing is known of what the other keeps"


def test_a_market_beside_a_simulated_plan_gives_both_of_its_values() -> None:
    """Its rate by the model alone would contradict the one that the plan itself shows first."""
    plan = plan_of("hetis", 3.927, 3.927, Objective())
    simulated = replace(plan, inputs={"verification": verification(kept=False, kept_rps=3.387)})
    assert model_words(plan.objective, simulated).endswith(
        "The present plan has 3.927 requests/s by the model and keeps its limits up to 3.387 in simulation."
    )
    assert model_words(plan.objective, plan) == model_words(plan.objective)
    throughput = Objective(kind=ObjectiveKind.THROUGHPUT)
    assert model_words(throughput).endswith("not simulated."), "`place` shows no other value of it, either"


@pytest.mark.parametrize(
    ("value", "rate_rps", "kept", "kept_rps", "expected"),
    [
        (12.0, 5.0, True, 5.0, (5.0, True)),  # the demand is 5
        (10.0, 20.0, False, 10.5, (10.0, True)),  # the demand is 20, and 10 were planned
        (10.0, 20.0, False, 7.0, (7.0, False)),
        (10.0, 10.0, True, 11.0, (10.0, True)),
        (10.0, 10.0, False, None, (0.0, False)),
    ],
)
def test_what_is_kept_is_of_the_planned_rate_whatever_is_demanded(
    value: float, rate_rps: float, *, kept: bool, kept_rps: float | None, expected: tuple[float, bool]
) -> None:
    plan = plan_of("hetis", value, value, Objective(demand_rps=rate_rps))
    said = verification(kept=kept, kept_rps=kept_rps) | {"rate_rps": rate_rps}
    simulated = replace(plan, inputs={**plan.inputs, "verification": said})
    assert kept_of(simulated) == expected
    if kept:
        other = replace(simulated, result=replace(plan.result, value=value + 1.0))
        assert best_of([simulated, other]) == 1, "of two that keep what is demanded, the one that serves more"


def test_statistics_of_a_simulation_that_is_not_run_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND, "--attainment", "95%"]) == ExitCode.INVALID
    assert "--attainment can only be checked in the simulation" in " ".join(capsys.readouterr().err.split())


def test_the_plan_that_place_shows_is_a_row_beside_that_of_the_highest_rung(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tuple(
        RungFound(name=name, value=value, bound=value, rate_rps=value, gpus=4, left_rps=0.5, shapes=1, of=name,
                  is_chosen=name == "node")
        for name, value in (("node", 1.2), ("apart", 1.35))
    )  # fmt: skip

    def make_plan(_loaded: object, problem: PlacementProblem, settings: PlacementSettings, **_: object) -> Climbed:
        plan = plan_of(settings.strategy, 1.2 if not settings.rung else 1.35, 1.4, problem.objective)
        if not settings.rung:
            plan = Requested(rung="node").on(Rungs(found=found).on(replace(plan, replicas=(plans.deep_replica(2),))))
        return Climbed(plan=plan, problem=problem)

    monkeypatch.setattr(comparing, "make_plan", make_plan)
    assert run([*COMMAND, "--strategies", "hetis"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert out.index("\nplace (node) ") < out.index("\nhetis ") < out.index("Rungs of complexity")
    assert "▸ node" in out
    assert run([*COMMAND, "--strategies", "hetis", "--rung", "workers"]) == ExitCode.OK
    assert "place (node)" not in capsys.readouterr().out
    assert run([*COMMAND, "--strategies", "hetis", "-o", "json"]) == ExitCode.OK
    names = [one["name"] for one in json.loads(capsys.readouterr().out)["strategies"]]
    assert names == ["place", "hetis"]
