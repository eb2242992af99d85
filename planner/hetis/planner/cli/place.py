"""Verbs that place: ``place`` and ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetis.commands.terminal import Terminal
from hetis.planner.cli import outputs
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.failures import report_no_plan, say_failure
from hetis.planner.cli.parameters import options, requests, values
from hetis.planner.cli.parameters.options import group, panel, verb
from hetis.planner.cli.searching import Interruptible
from hetis.solver.budget import Report
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import DEFAULT_STRATEGY

if TYPE_CHECKING:
    from hetis.planner.use_cases.climbing import Climbed
    from hetis.planner.use_cases.comparing.compare import Compared
    from hetis.planner.use_cases.place import PosedPlacement
    from hetis.solver.plan import Objective, Plan

_search, _result = panel("Search"), panel("Result")


@group
class ResultOptions:
    out: Path | None = options.out_option()
    html: Path | None = options.html_option()
    strict: bool = _result(
        "--strict: Exit 5 if the gap, the demanded rate or (in simulation) a latency limit is missed or not decided.",
        False,
    )
    dry_run: bool = options.dry_run_option()


PLACE_EXAMPLES = """Examples:\n
  hetis-plan place -c examples/fleet-160.yaml -m Llama-2-70B -w 8000/300\n
  hetis-plan place -c fleet.yaml -m Qwen3-32B -w 4000/500 --rung node --for kubernetes"""
COMPARE_EXAMPLES = """Examples:\n
  hetis-plan compare -c examples/h100-l4.yaml -m Llama-2-70B -w 8000/300\n
  hetis-plan compare -c fleet.yaml -m Qwen3-32B -w 4000/500 --engine all"""


@verb(
    usual=(
        *("cluster", "model", "workload", "objective", "rate", "ttft", "tpot", "rung", "target", "survive", "engine"),
        "out",
    )
)
def place(
    terminal: Terminal,
    *,
    request: requests.PlaceOptions,
    results: ResultOptions,
) -> ExitCode:
    """Decide which GPUs form which replicas, with a proven bound on the optimum.

    The plan appears when it is proven. What simulated traffic makes of it follows below, within some seconds or, if
    a --time-limit is given, within that.

    Ctrl-C once prints and saves the best plan so far; Ctrl-C twice exits at once.
    """
    from hetis.planner.export.carrying import not_carried
    from hetis.planner.use_cases.place import pose

    outputs.refuse_unwritable(results.out)
    outputs.refuse_page(results.html, beside=results.out)
    posed = pose(request, not_carried)
    outputs.warn_of_cut_requests(terminal, posed.loaded.inputs)
    if results.dry_run:
        return outputs.say_what_would_be_solved(
            terminal, [(posed.loaded.inputs, posed.problem.objective)], strategies=[request.strategy],
            time_limit_s=request.time_limit_s, engine=posed.problem.family.engine,
        )  # fmt: skip
    return finish(terminal, posed, results)


def finish(terminal: Terminal, posed: PosedPlacement, results: ResultOptions) -> ExitCode:
    """Solve with progress and Ctrl-C, print, save, and return the exit code, whatever the outcome.

    Tables appear when the plan is proven; what the simulation and the studies of it show follows below.
    """
    from hetis.planner.report.plan import render_plan
    from hetis.planner.use_cases.verification.outcome import missed

    objective, settings, long = (
        posed.problem.objective,
        posed.settings,
        Interruptible(terminal, cancelled=posed.cancelled),
    )
    wait = partial(long.search, unit=objective.unit, so_far="the best plan")
    prints = results.out != outputs.STDOUT

    def page() -> str:
        from hetis.planner.report.page.pages import ShownPlan, plans_page

        return plans_page([ShownPlan(name="The plan", plan=answer.plan, problem=answer.problem)])

    try:
        made = wait(posed.prove)
    except InfeasibleError as error:
        if not terminal.prints_tables:
            document = _infeasible_document(error, settings.strategy, objective)
            terminal.emit(lambda: document, lambda: "")
        return say_failure(error, terminal)
    except NoPlanFoundError as error:
        return report_no_plan(error, terminal, interrupted=posed.cancelled.is_set())
    if prints and terminal.prints_tables:
        terminal.emit(dict, lambda: render_plan(made.plan, wide=terminal.is_wide))
    answer = wait(partial(posed.verify, made))
    saved = outputs.save_or_tell(terminal, answer.plan, results.out, html=results.html, page=page)
    if prints:
        _print(terminal, made.plan, answer)
    if not saved:
        return ExitCode.INTERNAL
    if posed.cancelled.is_set():
        return ExitCode.INTERRUPTED
    short = missed(answer.plan, settings.gap_target + settings.simplest_within) if results.strict else []
    for sentence in short:
        terminal.error(sentence)
    return ExitCode.MISSED if short else ExitCode.OK


def _print(terminal: Terminal, proven: Plan, answer: Climbed) -> None:
    """Print the plan as data, or what was added to the tables of the proven one since they were printed."""
    from hetis.formats.documents import to_data
    from hetis.planner.report.plan import render_verified

    terminal.emit(lambda: to_data(answer.plan), lambda: render_verified(proven, answer.plan, wide=terminal.is_wide))


def _infeasible_document(error: InfeasibleError, strategy: str, objective: Objective) -> dict[str, Any]:
    from hetis.planner.report.studies import infeasible_parts
    from hetis.planner.use_cases.json_values import document
    from hetis.solver.plan import Status

    result = {"status": Status.INFEASIBLE, "objective": objective.kind, "value": None, "bound": None, "gap": None}
    return document(
        "Plan", strategy=strategy, result={**result, "unit": objective.unit}, **infeasible_parts(error), replicas=[]
    )


# --- compare


@group
class ComparedOptions:
    strategies: values.Names | None = _search(
        "--strategies NAME,...: Families of plans to search, names of `catalog strategies`, or all.",
        parser=values.strategies,
        shown="all; hetis if engines are compared",
    )
    engine: values.Names | None = _search(
        "--engine NAME,...: Plan only what this engine can run; several (or all) are compared side by side.",
        parser=values.engines,
        shown="vllm-hetis",
    )


@group
class ComparisonOutputOptions:
    out: Path | None = _result("--out FOLDER: Also save every plan there, as STRATEGY.json; created if missing.")
    dry_run: bool = options.dry_run_option()


@verb()
def compare(
    terminal: Terminal,
    *,
    request: requests.CompareOptions,
    chosen: ComparedOptions,
    results: ComparisonOutputOptions,
) -> ExitCode:
    """Plan by several strategies, or for several engines, and show the plans side by side, checked and simulated alike.

    All are of the highest rung unless --rung names one; the plan that `place` shows is in a row of its own if it is of
    another.
    Each search has the full time limit. A strategy without a plan gets a row with the reason.

    Ctrl-C once stops the running strategy and shows the results so far; Ctrl-C twice exits at once.
    """
    from hetis.planner.export.carrying import not_carried
    from hetis.planner.report.comparison import comparison_document, render_comparison
    from hetis.planner.use_cases.climbing import HIGHEST
    from hetis.planner.use_cases.comparing.compare import Searches, compare_engines, simulate_plans
    from hetis.planner.use_cases.place import read_inputs
    from hetis.planner.use_cases.placement_settings import settings_of
    from hetis.planner.use_cases.sources import rules_of_engine
    from hetis.solver.placement.families import DEFAULT_ENGINE, STRATEGIES

    engines = (DEFAULT_ENGINE,) if chosen.engine is None else chosen.engine.names
    unless = DEFAULT_STRATEGY if len(engines) > 1 else values.ALL
    names = (chosen.strategies or values.strategies(unless)).names
    rules = {name: rules_of_engine(name, **request.limits) for name in engines}
    published = [name for name in names if STRATEGIES[name].is_published]
    searched = [name for name in names if name not in published]
    plans = names if chosen.engine is None else [*published, *(f"{name}-{one}" for name in searched for one in rules)]
    outputs.refuse_unwritable_plans(results.out, plans)
    level, loaded, objective = request.service_level, read_inputs(request), request.goal
    settings = replace(settings_of(request), engine=None, rung=request.rung or HIGHEST)
    outputs.warn_of_cut_requests(terminal, loaded.inputs)
    if results.dry_run:
        return outputs.say_what_would_be_solved(
            terminal, [(loaded.inputs, objective)], strategies=names, solves=len(plans),
            time_limit_s=request.time_limit_s,
        )  # fmt: skip
    long = Interruptible(terminal, time_limit_s=request.time_limit_s)

    def work(report: Report) -> tuple[Compared, ...]:
        searches = Searches(
            loaded=loaded, objective=objective, settings=settings, budget=long.budget, report=report,
            carriers=not_carried, has_default=not request.rung,
        )  # fmt: skip
        found = compare_engines(searches, names, rules)
        if request.verify:
            found = simulate_plans(found, searches, rules, level)
        return found if chosen.engine is not None else tuple(replace(outcome, is_only_engine=True) for outcome in found)

    compared = long.search(work, unit=objective.unit, so_far="the plans")
    if results.out is not None:
        outputs.save_plans(terminal, results.out, {one.name: one.plan for one in compared if one.plan is not None})
    terminal.emit(
        lambda: comparison_document(compared, loaded.inputs, objective),
        lambda: render_comparison(compared, loaded.inputs, objective),
    )
    return long.code(judge(compared))


def judge(compared: Sequence[Compared]) -> ExitCode:
    """Return success if there is a plan to choose and no result is broken."""
    from hetis.planner.use_cases.comparing.compare import FAILED
    from hetis.solver.plan import Status

    if any(outcome.status == FAILED for outcome in compared):
        return ExitCode.INTERNAL
    if any(outcome.plan is not None for outcome in compared):
        return ExitCode.OK
    every = {outcome.status for outcome in compared}
    return ExitCode.INFEASIBLE if every == {Status.INFEASIBLE.value} else ExitCode.NO_PLAN
