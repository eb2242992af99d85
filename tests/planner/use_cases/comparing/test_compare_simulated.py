"""Plans are compared by what simulated traffic keeps, and by engine."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.use_cases.climbing import Climbed
from hetis.planner.use_cases.comparing import compare as comparing
from hetis.planner.use_cases.comparing.compare import best_of
from hetis.planner.use_cases.comparing.plan_figures import kept_of
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.record.forms import RungFound
from hetis.planner.use_cases.record.parts import Requested, Rungs
from hetis.planner.use_cases.service_level import ServiceLevel
from hetis.planner.use_cases.verification.outcome import STOPPED_EARLY
from hetis.solver.budget import Budget
from hetis.solver.engine_rules import EngineRules
from hetis.solver.errors import BrokenProofError, UncheckedPlanError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import Objective, ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem
from tests.planner import plans
from tests.planner.use_cases.comparing.compared import COMMAND, SIMULATED, Solver, plan_of, searches


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
