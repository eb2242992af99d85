"""A short summary of a plan of the service and of the steps of its activation."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from hetis.planner.cli.resource_names import last
from hetis.planner.cli.resource_tables import state
from hetis.planner.cli.words_of_enums import word
from hetis.planner.report.figures import digits, percent, plural, seconds
from hetis.v1 import plan_pb2, plan_service_pb2


def plan_summary(plan: plan_pb2.Plan, steps: Sequence[plan_service_pb2.TransitionStep] = ()) -> RenderableType:
    """Return state, answer with its proof, activation, and the steps to it if there are any."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("Plan", plan.name)
    table.add_row("Cluster", plan.cluster)
    table.add_row("State", state(word(plan_pb2.PlanState, plan.state)))
    if plan.HasField("result"):
        found = plan.result
        table.add_row("Value", f"{digits(found.value, 4)} {found.unit}")
        bound = f"{digits(found.bound, 4)} {found.unit}" if found.HasField("bound") else "none was proved"
        table.add_row("Bound", bound + (f"  gap {percent(found.gap)}" if found.HasField("gap") else ""))
        workers = f", {found.num_attention_workers:,} of them attention workers" if found.num_attention_workers else ""
        table.add_row("Uses", f"{plural(found.num_replicas, 'replica')} on {plural(found.num_gpus, 'GPU')}{workers}")
        table.add_row("Solved", f"{word(plan_pb2.SolveStatus, found.status).lower()} in {seconds(found.solve_s)}")
    for note in plan.result.notes:
        table.add_row("Note", note)
    if plan.proposal_reason:
        table.add_row("Proposed", plan.proposal_reason)
    table.add_row("Activation", state(word(plan_pb2.ActivationState, plan.activation)))
    return Group(table, _steps(steps)) if steps else table


def _steps(steps: Sequence[plan_service_pb2.TransitionStep]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False, title_justify="left")
    for head in ("wave", "step", "replica", "GPUs", "loads"):
        table.add_column(head, justify="right" if head in ("wave", "loads") else "left", overflow="fold")
    for step in steps:
        kind = word(plan_service_pb2.TransitionKind, step.kind).lower()
        loads = f"{step.load_bytes / 2**30:,.0f} GiB" if step.load_bytes else ""
        table.add_row(str(step.wave), kind, last(step.replica), ", ".join(step.devices), loads)
    return table
