"""The change from one plan to another: the fate of every replica, the cost, and the steps of a re-planning in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hetis.formats.documents import to_data
from hetis.planner.report.blocks import Grid
from hetis.planner.report.figures import digits, gigabytes, percent, percent_of_gap, plural, seconds, with_unit
from hetis.planner.report.goals import changed_values, goal_line, problem_title
from hetis.planner.report.promises import demand_words, kept_cell, simulated_words
from hetis.planner.report.tables import as_group, drawn, facts, first_rows, section, table, table_of
from hetis.planner.use_cases.comparing.plan_differences import PlanDiff
from hetis.planner.use_cases.comparing.plan_figures import kept_of
from hetis.planner.use_cases.json_values import document, fields_of
from hetis.planner.use_cases.other_fleets.replan import PosedReplan, survival_of
from hetis.solver.plan import ObjectiveKind, Plan, ReplicaPlan, Role
from hetis.solver.replanning.change import ChangeCosts, Fate, PlanChange, ReplicaChange
from hetis.solver.replanning.replanner import Replanning
from hetis.solver.replanning.transition import Action, Step

MAX_ROWS = 40  # replicas listed as changing; -o json has all
MAX_LOADS = 16  # GPUs listed as loading

_WORDS = {Fate.KEPT: "kept", Fate.RESET: "other settings", Fate.CHANGED: "changed", Fate.NEW: "new", Fate.GONE: "gone"}


@as_group
def render_diff(diff: PlanDiff) -> Iterator[RenderableType]:
    yield _figures(diff)
    for warning in diff.warnings:
        yield Text(warning, style="yellow")
    if changed := changed_values(diff.before.problem, diff.after.problem):
        yield section("Problems", facts((f" {subject}", " → ".join(values)) for subject, values in changed.items()))
    yield from _change_sections(diff.change, diff.before.plan, diff.after.plan)


def _change_sections(change: PlanChange, before: Plan, after: Plan) -> Iterator[RenderableType]:
    yield section("Replicas", Text(change_counts(change)))
    yield from _changed_replicas(change, before, after)
    if change.loads:
        yield section("Weights to load", _load_table(change))
    yield section("KV dropped", Text(_dropped_words(change)))


def _figures(diff: PlanDiff) -> Table:
    plans, figures = (diff.before.plan, diff.after.plan), diff.figures
    made = table("'", "before", "after")
    made.add_row("objective", *(plan.result.objective.value for plan in plans))
    made.add_row("rate /s", *(digits(of.rate_rps, 4) for of in figures), style="bold")
    if any(kept_of(plan) is not None for plan in plans):
        made.add_row("kept in simulation /s", *(kept_cell(plan, unknown="-") for plan in plans))
    made.add_row("value", *(with_unit(plan.result.value, plan.result.unit) for plan in plans))
    made.add_row("gap", *(percent(plan.result.gap) for plan in plans))
    made.add_row("used USD/h", *("-" if of.usd_per_hour is None else f"{of.usd_per_hour:,.2f}" for of in figures))
    made.add_row("GPUs (idle)", *(f"{of.gpus_used:,} ({of.gpus_idle:,})" for of in figures))
    made.add_row("TTFT ms", *(digits(1e3 * of.ttft_s) if of.gpus_used else "-" for of in figures))
    made.add_row("TPOT ms", *(digits(1e3 * of.tpot_s) if of.gpus_used else "-" for of in figures))
    return made


def change_counts(change: PlanChange) -> str:
    """Return the counts as ``2 kept, 1 changed, 1 new, 1 gone; 12 GPUs with different work``."""
    counts = ", ".join(f"{change.count(fate):,} {_WORDS[fate]}" for fate in Fate if change.count(fate))
    moved = plural(len(change.moved), "GPU")
    load = f", {gigabytes(change.load_bytes)} of weights to load" if change.loads else ""
    return f"{counts or 'none'}; {moved} with different work{load}"


def _dropped_words(change: PlanChange) -> str:
    """Return the KV that is dropped with replicas that do not stay, on the assumption that they are full."""
    if not change.dropped_requests:
        return "none: every old replica continues"
    return (
        f"{gigabytes(change.dropped_kv_bytes)} of {plural(change.dropped_requests, 'request')} in flight where "
        "replicas are full; they start again"
    )


def _changed_replicas(change: PlanChange, before: Plan, after: Plan) -> Iterator[RenderableType]:
    """Yield a row for every replica that does not continue unchanged."""

    def sides(change: ReplicaChange) -> list[ReplicaPlan]:
        given = ((before, change.before), (after, change.after))
        return [plan.replicas[number] for plan, number in given if number is not None]

    def served(change: ReplicaChange) -> str:
        """Return the classes of requests that a replica serves, if there are any or were before."""
        served = [side.classes for side in sides(change)]
        words = [" and ".join(classes) or "all" for classes in dict.fromkeys(served)]
        return f", {' → '.join(words)} requests" if any(served) else ""

    changed = [
        one for one in change.replicas if one.fate is not Fate.KEPT or len({side.classes for side in sides(one)}) > 1
    ]
    if not changed:
        return

    yield table_of(
        changed,
        ("'before", lambda one: "-" if one.before is None else f"#{one.before}"),
        ("'after", lambda one: "-" if one.after is None else f"#{one.after}"),
        ("'", lambda one: _WORDS[one.fate] + served(one)),
        ("'shape", lambda one: _shape_of(sides(one)[-1])),
        ("rate /s", lambda one: " → ".join(digits(side.rate) for side in sides(one))),
        ("load", lambda one: gigabytes(one.load_bytes) if one.load_bytes else "-"),
        most=MAX_ROWS,
        noun="replica",
    )


def _shape_of(replica: ReplicaPlan) -> str:
    """Return a replica's shape as ``prefill: A100 TP4 L40 | L4 TP1 ×4 L40 + 2 workers``."""
    stages = []
    for i, stage in enumerate(replica.stages):
        workers = sum(len(pool.devices) for pool in replica.attention_workers if pool.stage == i)
        pool = f" + {plural(workers, 'worker')}" if workers else ""
        stages.append(f"{stage.gpu} {replica.parallel_sizes(stage)} L{stage.num_layers}{pool}")
    role = "" if replica.role is Role.UNIFIED else f"{replica.role}: "
    return role + " | ".join(stages)


def _load_table(change: PlanChange) -> RenderableType:
    by_size = defaultdict[int, list[str]](list)
    for device, size in change.loads.items():
        by_size[round(size)].append(device)
    return table_of(
        sorted(by_size.items(), reverse=True),
        ("each", lambda one: gigabytes(one[0])),
        ("GPUs", lambda one: f"{len(one[1]):,}"),
        ("'devices", lambda one: ", ".join(one[1][:8]) + (f", … {len(one[1]) - 8:,} more" if one[1][8:] else "")),
        most=MAX_LOADS,
        noun="size",
    )


def diff_document(diff: PlanDiff) -> dict[str, Any]:
    return document(
        "PlanDiff",
        before={"result": diff.before.plan.result, "figures": diff.figures[0]},
        after={"result": diff.after.plan.result, "figures": diff.figures[1]},
        same_model=diff.same_model,
        warnings=diff.warnings,
        differences={
            subject.replace(" ", "_"): {"before": before, "after": after}
            for subject, (before, after) in changed_values(diff.before.problem, diff.after.problem).items()
        },
        change=change_fields(diff.change),
    )


def change_fields(change: PlanChange) -> dict[str, Any]:
    """Return the fields of a change for documents: counts, every replica, every GPU that loads."""
    counts = {fate.value: change.count(fate) for fate in Fate}
    names = ("load_bytes", "dropped_requests", "dropped_kv_tokens", "dropped_kv_bytes", "replicas", "loads")
    return {"counts": counts, "moved_gpus": change.moved, **fields_of(change, *names)}


MAX_STEPS = 40  # steps listed; -o json has all


@as_group
def render_replan(found: Replanning, posed: PosedReplan, costs: ChangeCosts) -> Iterator[RenderableType]:
    yield problem_title(posed.loaded.inputs)
    yield goal_line(posed.problem.objective)
    yield facts(_facts(found, posed, costs))
    yield from _change_sections(found.change, posed.running, found.plan)
    steps = steps_grid(found, posed)
    shown = first_rows(drawn(steps), len(found.transition.steps), MAX_STEPS, "step")
    yield section("Steps", shown if steps.rows else Text("none: everything continues unchanged"))
    yield Padding(Text(steps.note), (0, 0, 0, 1))


def _unit(posed: PosedReplan) -> str:
    kind = posed.problem.objective.kind
    return "requests/s" if kind is ObjectiveKind.THROUGHPUT else "requests/s of goodput"


def _facts(found: Replanning, posed: PosedReplan, costs: ChangeCosts) -> list[tuple[str, RenderableType]]:
    result, unit, survival = found.plan.result, found.plan.result.unit, survival_of(found.plan, posed)
    lost = f", {plural(len(found.lost), 'replica')} lost GPUs" if found.lost else ""
    proof = "proven best" if found.gap <= 1e-6 else f"proven: no plan is over {percent_of_gap(found.gap)} better"
    fresh = None if found.fresh_value is None else f"{with_unit(found.fresh_value, unit)}, if nothing had been running"
    simulated, survives = simulated_words(found.plan), None
    if survival is not None:
        survives = Text.assemble(("yes", "green") if survival.survives else ("NO", "bold red"), f": {survival}")
    every: list[tuple[str, str | Text | None]] = [
        ("Now", f"{with_unit(found.transition.before, _unit(posed))}{lost}"),
        ("Then", Text.assemble((with_unit(result.value, unit), "bold green"), "  the plan itself")),
        ("Net", f"{with_unit(found.value, unit)}  change counted, over {_seconds_or_hours(costs.horizon_s)}"),
        ("Bound", f"{with_unit(found.bound, unit)}  gap {percent(found.gap)}, {proof}"),
        ("From scratch", fresh),
        ("Demand", demand_words(found.plan, posed.requested.demand_rps)),
        ("Survives", survives),
        ("Simulated", None if simulated is None else simulated.text()),
        ("Costs", change_cost_words(costs)),
    ]
    return [(name, fact) for name, fact in every if fact]


def _seconds_or_hours(value_s: float) -> str:
    """Return a duration as ``1 h``, ``90 min``, ``45 s``."""
    for size, unit in ((3600, "h"), (60, "min")):
        if value_s >= size and value_s % size == 0:
            return f"{value_s / size:,.0f} {unit}"
    return seconds(value_s)


def change_cost_words(costs: ChangeCosts) -> str:
    """Return the assumed costs of a change in words."""
    return (
        f"a start takes {seconds(costs.restart_s)} and the weights of its fullest GPU at "
        f"{digits(costs.load_bytes_per_s / 1e9)} GB/s; requests in flight lose half their service"
    )


def steps_grid(found: Replanning, posed: PosedReplan) -> Grid:
    """Return the first steps in their order."""

    def row(number: int, step: Step) -> tuple[str, ...]:
        starts = step.action is Action.START
        plan = found.plan if starts else posed.running
        names = "\n".join(f"#{i} {_shape_of(plan.replicas[i])}" for i in step.replicas)
        loads = sum(one.load_bytes for one in found.change.replicas if one.after in step.replicas) if starts else 0.0
        flow = f"{digits(step.capacity)} → {digits(step.capacity_after)}"
        takes = seconds(step.seconds) if step.seconds else "-"
        return f"{number}", step.action.value, names, gigabytes(loads) if loads else "-", takes, flow

    return Grid(
        title="Steps, in this order",
        columns=("", "'", "'what", "load", "takes up to", "capacity"),
        rows=[row(*each) for each in enumerate(found.transition.steps[:MAX_STEPS], start=1)],
        note=_lowest_words(found, posed),
    )


def _lowest_words(found: Replanning, posed: PosedReplan) -> str:
    """Return the lowest capacity during the change, and whether another order would keep more; empty without steps."""
    transition = found.transition
    if not transition.steps:
        return ""
    lowest = f"Lowest on the way: {with_unit(transition.lowest, _unit(posed))}"
    more = transition.best_lowest > transition.lowest * (1.0 + 1e-9)
    proof = f"no order keeps more{f' than {digits(transition.best_lowest, 4)}' if more else ''}"
    return f"{lowest}; {proof}. All steps take {seconds(transition.seconds)} one after another."


def replan_document(found: Replanning, posed: PosedReplan, costs: ChangeCosts) -> dict[str, Any]:
    """Return the answer as plain data, including the whole plan."""
    survival = survival_of(found.plan, posed)
    return document(
        "Replanning",
        result={**fields_of(found, "value", "bound", "gap"), "unit": found.plan.result.unit},
        fresh_value=found.fresh_value,
        change_costs=costs,
        survival=survival and fields_of(survival, "place", "demand_rps", "left_rps", "survives"),
        lost_replicas=found.lost,
        replicas=found.continued,
        change=change_fields(found.change),
        transition=found.transition,
        plan=to_data(found.plan),
    )
