"""Resources as tables of 80 columns, of which the wide form has more, and the summary of a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.cli.resource_names import last, word
from hetis.planner.report.figures import bar, digits, gigabytes, percent, plural, seconds
from hetis.v1 import cluster_pb2, plan_pb2, plan_service_pb2, profile_pb2, redispatch_pb2, replica_pb2, report_pb2

_GOOD = {"READY", "ACTIVE", "SERVING", "DONE"}
_BAD = {"LOST", "FAILED", "ABORTED", "INFEASIBLE"}
_BAR_WIDTH = 14


class Column(NamedTuple):
    """A column: its head, its cell for a resource, its alignment, and whether only the wide form has it."""

    head: str
    cell: Callable[[Any], RenderableType]
    right: bool = False
    wide: bool = False


def resource_table(kind: str, resources: Sequence[Message], *, wide: bool) -> RenderableType:
    """Return one row per resource of this kind."""
    if not resources:
        return Text(f"no {kind}", style="dim")
    columns = [column for column in COLUMNS[kind] if wide or not column.wide]
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column.head, justify="right" if column.right else "left", overflow="fold")
    for resource in resources:
        table.add_row(*(column.cell(resource) for column in columns))
    return table


def state(text: str) -> Text:
    """Return a state in its colour."""
    return Text(text, style="green" if text in _GOOD else "red" if text in _BAD else "yellow" if text else "")


def ago(moment: Timestamp | None, now_s: float | None = None) -> str:
    """Return ``4 s ago``; empty for never."""
    if moment is None or not (moment.seconds or moment.nanos):
        return ""
    passed_s = max((time.time() if now_s is None else now_s) - moment.seconds - moment.nanos / 1e9, 0.0)
    for limit_s, unit_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if passed_s < limit_s:
            return f"{passed_s / unit_s:.0f} {unit} ago"
    return f"{passed_s / 86_400:.0f} days ago"


def kv_ratio(devices: Sequence[report_pb2.DeviceReport]) -> float | None:
    """Return the share of KV blocks that cannot be dropped on the fullest device, or None if no device reports any."""
    return max((device.used_blocks / device.total_blocks for device in devices if device.total_blocks), default=None)


def kv_bar(devices: Sequence[report_pb2.DeviceReport], width: int = _BAR_WIDTH) -> Text:
    """Return the KV use of the fullest device as a bar."""
    ratio = kv_ratio(devices)
    if ratio is None:
        return Text("")
    style = "red" if ratio >= 0.9 else "yellow" if ratio >= 0.75 else "green"
    return Text.assemble((bar(ratio, width), style), f" {ratio:4.0%}")


def value_of(plan: plan_pb2.Plan) -> str:
    """Return the value of the answer or of the best plan so far: ``1.61 requests/s``."""
    if plan.HasField("result"):
        return f"{digits(plan.result.value, 4)} {plan.result.unit}"
    if plan.progress.HasField("incumbent"):
        return f"{digits(plan.progress.incumbent, 4)} {plan.progress.unit}"
    return ""


def gap_of(plan: plan_pb2.Plan) -> str:
    found = plan.result if plan.HasField("result") else plan.progress
    return percent(found.gap) if found.HasField("gap") else ""


def _clusters() -> list[Column]:
    return [
        Column("cluster", lambda c: last(c.name)),
        Column("nodes", lambda c: f"{c.num_connected_nodes:,}/{c.num_nodes:,}", right=True),
        Column("GPUs", lambda c: f"{c.num_gpus:,}", right=True),
        Column("active plan", lambda c: last(c.active_plan)),
        Column("earlier", lambda c: last(c.earlier_plan)),
        Column("changed", lambda c: ago(c.update_time), right=True),
        Column("etag", lambda c: c.etag, wide=True),
        Column("re-dispatch", lambda c: _mode(c.policy.redispatch), wide=True),
        Column("placement", lambda c: _mode(c.policy.placement), wide=True),
    ]


def _mode(mode: int) -> str:
    return word(cluster_pb2.ReactionMode, mode).lower() if mode else "default"


def _nodes() -> list[Column]:
    return [
        Column("node", lambda n: last(n.name)),
        Column("state", lambda n: state(word(cluster_pb2.NodeState, n.state) + (" draining" if n.draining else ""))),
        Column("GPUs", lambda n: str(len(n.devices)), right=True),
        Column("KV of the fullest", lambda n: kv_bar(n.devices)),
        Column("trouble", lambda n: _trouble(n.devices)),
        Column("heard", lambda n: ago(n.heard_time), right=True),
        Column("replicas", lambda n: ", ".join(last(name) for name in n.replicas), wide=True),
        Column("agent", lambda n: n.agent_version, wide=True),
        Column("types", lambda n: ", ".join(sorted({d.gpu_type for d in n.inventory.devices})), wide=True),
    ]


def _trouble(devices: Sequence[report_pb2.DeviceReport]) -> Text:
    ill = [str(device.index) for device in devices if device.unhealthy]
    idle = report_pb2.THROTTLE_REASON_IDLE
    slow = [str(device.index) for device in devices if set(device.throttle_reasons) - {idle} and not device.unhealthy]
    parts = [(f"GPU {', '.join(ill)} unhealthy", "red")] if ill else []
    if slow:
        parts.append((f"{'; ' if ill else ''}GPU {', '.join(slow)} throttled", "yellow"))
    return Text.assemble(*parts)


def _plans() -> list[Column]:
    return [
        Column("plan", lambda p: last(p.name)),
        Column("cluster", lambda p: last(p.cluster)),
        Column("state", lambda p: state(word(plan_pb2.PlanState, p.state))),
        Column("value", value_of, right=True),
        Column("gap", gap_of, right=True),
        Column("activation", lambda p: state(word(plan_pb2.ActivationState, p.activation))),
        Column("made", lambda p: ago(p.create_time), right=True),
        Column("GPUs", lambda p: f"{p.result.num_gpus:,}" if p.HasField("result") else "", right=True, wide=True),
        Column("origin", lambda p: word(plan_pb2.PlanOrigin, p.origin).lower(), wide=True),
        Column("why", lambda p: p.proposal_reason, wide=True),
        Column("etag", lambda p: p.etag, wide=True),
    ]


def _replicas() -> list[Column]:
    return [
        Column("replica", lambda r: last(r.name)),
        Column("state", lambda r: state(word(replica_pb2.ReplicaState, r.state))),
        Column("role", lambda r: word(replica_pb2.ReplicaRole, r.role).lower() if r.role else "unified"),
        Column("plan", lambda r: last(r.plan)),
        Column("generation", lambda r: str(r.generation), right=True),
        Column("running", lambda r: str(r.report.num_running), right=True),
        Column("waiting", lambda r: str(r.report.num_waiting), right=True),
        Column("re-dispatch", lambda r: "under way" if r.redispatch else ""),
        Column("nodes", lambda r: ", ".join(r.nodes), wide=True),
        Column("primary", lambda r: r.primary_node, wide=True),
        Column("authority", lambda r: word(replica_pb2.HeadMapAuthority, r.authority).lower(), wide=True),
        Column("why", lambda r: r.failure.message, wide=True),
    ]


def _redispatches() -> list[Column]:
    return [
        Column("re-dispatch", lambda r: last(r.name)[:8]),
        Column("replica", lambda r: last(r.replica)),
        Column("state", lambda r: state(word(redispatch_pb2.RedispatchState, r.state))),
        Column("moves", lambda r: f"{r.num_moves:,}", right=True),
        Column("KV", lambda r: gigabytes(r.kv_bytes), right=True),
        Column("slowest device", lambda r: f"{seconds(r.makespan_before_s)} → {seconds(r.makespan_after_s)}"),
        Column("made", lambda r: ago(r.create_time), right=True),
        Column("because", lambda r: ", ".join(_trigger(trigger) for trigger in r.triggers), wide=True),
        Column("why not", lambda r: r.failure.message, wide=True),
        Column("name", lambda r: r.name, wide=True),
    ]


def _trigger(trigger: redispatch_pb2.RedispatchTrigger) -> str:
    kind = word(redispatch_pb2.TriggerKind, trigger.kind).lower().replace("_", " ")
    return f"{kind} {trigger.device}".strip()


def _profiles() -> list[Column]:
    return [
        Column("profile", lambda p: last(p.name)),
        Column("GPU type", lambda p: p.gpu_type),
        Column("usable", lambda p: gigabytes(p.usable_bytes), right=True),
        Column("from", lambda p: ", ".join(word(profile_pb2.ProfileSource, s).lower() for s in p.sources)),
        Column("error", lambda p: percent(p.held_out_mape) if p.HasField("held_out_mape") else "", right=True),
        Column("changed", lambda p: ago(p.update_time), right=True),
        Column("etag", lambda p: p.etag, wide=True),
    ]


COLUMNS: dict[str, list[Column]] = {
    "clusters": _clusters(),
    "nodes": _nodes(),
    "plans": _plans(),
    "replicas": _replicas(),
    "redispatches": _redispatches(),
    "profiles": _profiles(),
}


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
