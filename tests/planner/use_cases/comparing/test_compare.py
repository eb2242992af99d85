"""`compare` with a fake solver: order, bounds, figures, the table, and the exit for every outcome."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from hetis.formats.documents import load_plan
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.report.comparison import model_words
from hetis.planner.use_cases.comparing import compare as comparing
from hetis.planner.use_cases.comparing.plan_figures import figures_of
from hetis.planner.use_cases.record.parts import Requested
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.budget import Budget
from hetis.solver.errors import BrokenProofError, InfeasibleError, NoPlanFoundError, UncheckedPlanError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import KvRoute, Objective, ObjectiveKind, Role
from tests.planner import plans
from tests.planner.command_line import EXAMPLES
from tests.planner.use_cases.comparing.compared import COMMAND, LOADED, Outcome, Solver, compared


def test_contained_strategies_are_run_before_what_contains_them(solver: Solver) -> None:
    searched = [name for name, strategy in STRATEGIES.items() if not strategy.is_published]
    asked = solver(dict.fromkeys(searched, (1.0, 1.0)))
    found = compared(searched)
    assert list(found) == searched
    for inner, outer in comparing.CONTAINERS.items():
        assert asked.index(inner) < asked.index(outer)


def test_containers_are_strategies_that_have_every_plan_of_the_contained_one() -> None:
    from hetis.solver.engine_rules import Family

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
    solver: Solver, capsys: pytest.CaptureFixture[str], engines: tuple[str, ...], said: str
) -> None:
    solver(dict.fromkeys(("hetis", "uniform"), InfeasibleError(("weights take 140 GB",))))
    assert run([*COMMAND, "--strategies", "hetis,uniform", *engines]) == ExitCode.INFEASIBLE
    assert capsys.readouterr().out.splitlines()[2].startswith(said)


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


# --- simulated
