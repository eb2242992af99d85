"""The change from one plan to another: the fate of every replica, the cost, and the steps of a re-planning in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hetis.formats.documents import to_data
from hetis.planner.report.differences import changed_values
from hetis.planner.report.figures import digits, gigabytes, percent, percent_of_gap, plural, seconds, with_unit
from hetis.planner.report.goals import goal_line, problem_title
from hetis.planner.report.promises import demand_words, kept_cell, simulated_words
from hetis.planner.report.tables import as_group, facts, section, table, table_of
from hetis.planner.use_cases.compare import PlanDiff, kept_of
from hetis.planner.use_cases.json_values import document, fields_of
from hetis.planner.use_cases.other_fleets.replan import PosedReplan, survival_of
from hetis.solver.plan import ObjectiveKind, Plan, ReplicaPlan, Role
from hetis.solver.replanning.change import ChangeCosts, Fate, PlanChange, ReplicaChange
from hetis.solver.replanning.replanner import Replanning
from hetis.solver.replanning.transition import Action

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
    yield from changed_replicas(change, before, after)
    if change.loads:
        yield section("Weights to load", load_table(change))
    yield section("KV dropped", Text(dropped_words(change)))


def _figures(diff: PlanDiff) -> Table:
    plans, figures = (diff.before.plan, diff.after.plan), diff.figures
    results = [plan.result for plan in plans]
    made = table("'", "before", "after")
    made.add_row("objective", *(result.objective.value for result in results))
    made.add_row("rate /s", *(digits(f.rate_rps, 4) for f in figures), style="bold")
    if any(kept_of(plan) is not None for plan in plans):
        made.add_row("kept in simulation /s", *(kept_cell(plan, unknown="-") for plan in plans))
    made.add_row("value", *(with_unit(result.value, result.unit) for result in results))
    made.add_row("gap", *(percent(result.gap) for result in results))
    made.add_row("used USD/h", *("-" if f.usd_per_hour is None else f"{f.usd_per_hour:,.2f}" for f in figures))
    made.add_row("GPUs (idle)", *(f"{f.gpus_used:,} ({f.gpus_idle:,})" for f in figures))
    made.add_row("TTFT ms", *(digits(1e3 * f.ttft_s) if f.gpus_used else "-" for f in figures))
    made.add_row("TPOT ms", *(digits(1e3 * f.tpot_s) if f.gpus_used else "-" for f in figures))
    return made


def change_counts(change: PlanChange) -> str:
    """Return the counts as ``2 kept, 1 changed, 1 new, 1 gone; 12 GPUs with different work``."""
    counts = ", ".join(f"{change.count(fate):,} {_WORDS[fate]}" for fate in Fate if change.count(fate))
    moved = plural(len(change.moved), "GPU")
    load = f", {gigabytes(change.load_bytes)} of weights to load" if change.loads else ""
    return f"{counts or 'none'}; {moved} with different work{load}"


def dropped_words(change: PlanChange) -> str:
    """Return the KV that is dropped with replicas that do not stay, on the assumption that they are full."""
    if not change.dropped_requests:
        return "none: every old replica continues"
    return (
        f"{gigabytes(change.dropped_kv_bytes)} of {plural(change.dropped_requests, 'request')} in flight where "
        "replicas are full; they start again"
    )


def changed_replicas(change: PlanChange, before: Plan, after: Plan) -> Iterator[RenderableType]:
    """Yield a row for every replica that does not continue unchanged."""
    changed = [c for c in change.replicas if c.fate is not Fate.KEPT]
    if not changed:
        return

    def sides(change: ReplicaChange) -> list[ReplicaPlan]:
        given = ((before, change.before), (after, change.after))
        return [plan.replicas[number] for plan, number in given if number is not None]

    yield table_of(
        changed[:MAX_ROWS],
        ("'before", lambda one: "-" if one.before is None else f"#{one.before}"),
        ("'after", lambda one: "-" if one.after is None else f"#{one.after}"),
        ("'", lambda one: _WORDS[one.fate]),
        ("'shape", lambda one: shape_of(sides(one)[-1])),
        ("rate /s", lambda one: " → ".join(digits(side.rate) for side in sides(one))),
        ("load", lambda one: gigabytes(one.load_bytes) if one.load_bytes else "-"),
    )
    if len(changed) > MAX_ROWS:
        yield Text(f" … and {len(changed) - MAX_ROWS:,} more (-o json lists all)", style="dim")


def shape_of(replica: ReplicaPlan) -> str:
    """Return a replica's shape as ``prefill: A100 TP4 L40 | L4 TP1 ×4 L40 + 2 workers``."""
    stages = []
    for i, stage in enumerate(replica.stages):
        workers = sum(len(pool.devices) for pool in replica.attention_workers if pool.stage == i)
        pool = f" + {plural(workers, 'worker')}" if workers else ""
        stages.append(f"{stage.gpu} {replica.parallel_sizes(stage)} L{stage.num_layers}{pool}")
    role = "" if replica.role is Role.UNIFIED else f"{replica.role}: "
    return role + " | ".join(stages)


def load_table(change: PlanChange) -> Table:
    by_size: dict[int, list[str]] = {}
    for device, size in change.loads.items():
        by_size.setdefault(round(size), []).append(device)
    made = table("each", "GPUs", "'devices")
    sizes = sorted(by_size, reverse=True)
    for size in sizes[:MAX_LOADS]:
        names = by_size[size]
        shown = ", ".join(names[:8]) + (f", … {len(names) - 8:,} more" if len(names) > 8 else "")
        made.add_row(gigabytes(size), f"{len(names):,}", shown)
    if len(sizes) > MAX_LOADS:
        made.add_row("…", f"{sum(len(by_size[s]) for s in sizes[MAX_LOADS:]):,}", "(-o json lists all)")
    return made


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
    yield section("Steps", _steps(found, posed))
    yield Padding(Text(lowest_words(found, posed)), (0, 0, 0, 1))


def _unit(posed: PosedReplan) -> str:
    kind = posed.problem.objective.kind
    return "requests/s" if kind is ObjectiveKind.THROUGHPUT else "requests/s of goodput"


def _facts(found: Replanning, posed: PosedReplan, costs: ChangeCosts) -> Iterator[tuple[str, RenderableType]]:
    result, unit, transition = found.plan.result, found.plan.result.unit, found.transition
    lost = f", {plural(len(found.lost), 'replica')} lost GPUs" if found.lost else ""
    yield "Now", f"{with_unit(transition.before, _unit(posed))}{lost}"
    yield "Then", Text.assemble((with_unit(result.value, unit), "bold green"), "  the plan itself")
    yield "Net", f"{with_unit(found.value, unit)}  change counted, over {seconds_or_hours(costs.horizon_s)}"
    proof = "proven best" if found.gap <= 1e-6 else f"proven: no plan is over {percent_of_gap(found.gap)} better"
    yield "Bound", f"{with_unit(found.bound, unit)}  gap {percent(found.gap)}, {proof}"
    if found.fresh_value is not None:
        yield "From scratch", f"{with_unit(found.fresh_value, unit)}, if nothing had been running"
    if (demand_rps := posed.asked.demand_rps) is not None:
        yield "Demand", demand_words(found.plan, demand_rps)
    if (survival := survival_of(found.plan, posed)) is not None:
        yield "Survives", Text.assemble(("yes", "green") if survival.survives else ("NO", "bold red"), f": {survival}")
    if (simulated := simulated_words(found.plan)) is not None:
        yield "Simulated", simulated
    yield "Costs", change_cost_words(costs)


def seconds_or_hours(value_s: float) -> str:
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


def _steps(found: Replanning, posed: PosedReplan) -> RenderableType:
    if not found.transition.steps:
        return Text("none: everything continues unchanged")
    steps = enumerate(itertools.islice(step_rows(found, posed), MAX_STEPS), start=1)
    rows = ((str(number), *row) for number, row in steps)
    made = table("", "'", "'what", "load", "takes up to", "capacity", rows=rows)
    if len(found.transition.steps) > MAX_STEPS:
        made.add_row("…", "", f"{len(found.transition.steps) - MAX_STEPS:,} more (-o json lists all)", "", "", "")
    return made


def step_rows(found: Replanning, posed: PosedReplan) -> Iterator[list[str]]:
    for step in found.transition.steps:
        starting = step.action is Action.START
        plan = found.plan if starting else posed.running
        names = "\n".join(f"#{i} {shape_of(plan.replicas[i])}" for i in step.replicas)
        loads = sum(one.load_bytes for one in found.change.replicas if one.after in step.replicas) if starting else 0.0
        flow = f"{digits(step.capacity)} → {digits(step.capacity_after)}"
        takes = seconds(step.seconds) if step.seconds else "-"
        yield [step.action.value, names, gigabytes(loads) if loads else "-", takes, flow]


def lowest_words(found: Replanning, posed: PosedReplan) -> str:
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
