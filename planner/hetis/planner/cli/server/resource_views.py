"""Resources of the planner as data, tables and lines."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Group, RenderableType
from rich.text import Text

from hetis.planner.convert.names import last_part, word_of
from hetis.planner.report.figures import bar, gigabytes, percent, plural, seconds, with_unit
from hetis.planner.report.tables import SimulationRemarks, facts, kept_words, missed_words, table, table_of
from hetis.planner.use_cases.verification.outcome import router_of
from hetis.v1 import (
    cluster_pb2,
    cluster_service_pb2,
    plan_pb2,
    plan_service_pb2,
    profile_pb2,
    redispatch_pb2,
    replica_pb2,
    report_pb2,
)

# --- data


UNKNOWN = "-"  # in tables


def resource_data(message: Message, *, of_standby: bool = False) -> dict[str, Any]:
    """Return a message as JSON values, as protobuf does: enums are names, times RFC 3339, and 64-bit numbers text.

    ``of_standby``: a standby answered, so that fields that only the leader knows are null.
    """
    found: dict[str, Any] = _readable(MessageToDict(message, preserving_proto_field_name=True))
    return {**dict.fromkeys(_only_leader_knows(message)), **found} if of_standby else found


def list_data(kind: str, messages: Iterable[Message], *, of_standby: bool = False) -> dict[str, Any]:
    """Return several resources as one value: ``items``, and a header with their kind."""
    items = [resource_data(message, of_standby=of_standby) for message in messages]
    return {"apiVersion": "hetis/v1", "kind": kind, "items": items}


def _only_leader_knows(message: Message) -> tuple[str, ...]:
    match message:
        case cluster_pb2.Cluster():
            return ("num_connected_nodes",)
        case replica_pb2.Replica():
            return ("report", "report_time")
        case plan_pb2.Plan() if is_searched(message):
            return ("progress",)
    return ()


def is_searched(plan: plan_pb2.Plan) -> bool:
    return plan.state in (plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING)


def _readable(value: Any) -> Any:
    """Return the value with the contents of documents as plain text or JSON; protobuf encodes bytes as base64."""
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if not isinstance(value, dict):
        return value
    readers = {"content": _content, "text": _text}
    return {key: readers.get(key, _readable)(item) for key, item in value.items()}


def _text(value: Any) -> Any:
    with suppress(TypeError, ValueError):  # includes UnicodeDecodeError
        return base64.b64decode(value, validate=True).decode("utf-8")
    return value


def _content(value: Any) -> Any:
    with suppress(TypeError, ValueError):
        return json.loads(_text(value))
    return _text(value)


# --- tables


_GOOD = {"READY", "ACTIVE", "SERVING", "DONE"}
_BAD = {"LOST", "FAILED", "ABORTED", "INFEASIBLE"}
_BAR_WIDTH = 14


class ResourceColumn(NamedTuple):
    """A column: its header, its cell for a resource, and whether only the wide form includes it.

    ``saved`` is the cell if a standby answered, which does not know all that the leader does; None: the same.
    """

    head: str
    cell: Callable[[Any], RenderableType]
    wide: bool = False
    saved: Callable[[Any], RenderableType] | None = None


def resource_table(kind: str, resources: Sequence[Message], *, wide: bool, of_standby: bool = False) -> RenderableType:
    if not resources:
        return Text(f"no {kind}", style="dim")
    columns = [column for column in COLUMNS[kind] if wide or not column.wide]
    cells = [(column.saved if of_standby else None) or column.cell for column in columns]
    rows = ((cell(resource) for cell in cells) for resource in resources)
    return table(*(column.head for column in columns), rows=rows)


def state(text: str) -> Text:
    return Text(text, style="green" if text in _GOOD else "red" if text in _BAD else "yellow" if text else "")


def ago(moment: Timestamp | None) -> str:
    """Return the age of a moment, as ``4 s ago``, or an empty string for None."""
    if moment is None or not (moment.seconds or moment.nanos):
        return ""
    passed_s = max(time.time() - moment.seconds - moment.nanos / 1e9, 0.0)
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


def value_of(plan: plan_pb2.Plan) -> Text:
    """Return the value of the plan's answer or, during the search, of the best plan so far: ``1.61 requests/s``.

    If simulated traffic misses the limits, that follows: ``1.61 requests/s, MISSED``.
    """
    if plan.HasField("result"):
        value = with_unit(plan.result.value, plan.result.unit)
        return Text.assemble(value, ", ", ("MISSED", "bold red")) if _misses(plan) else Text(value)
    if plan.progress.HasField("incumbent"):
        return Text(with_unit(plan.progress.incumbent, plan.progress.unit))
    return Text("")


def _misses(plan: plan_pb2.Plan) -> bool:
    """Return whether simulated traffic misses the limits at the rate that the plan promises."""
    return plan.result.HasField("verification") and not plan.result.verification.kept


def gap_of(plan: plan_pb2.Plan) -> str:
    found = plan.result if plan.HasField("result") else plan.progress
    return percent(found.gap) if found.HasField("gap") else ""


def _node_state(node: cluster_pb2.Node) -> str:
    return word_of(cluster_pb2.NodeState, node.state) + (" draining" if node.draining else "")


def _mode(mode: int) -> str:
    return word_of(cluster_pb2.ReactionMode, mode).lower() if mode else "default"


def _trouble(devices: Sequence[report_pb2.DeviceReport]) -> Text:
    ill = [str(device.index) for device in devices if device.unhealthy]
    idle = report_pb2.THROTTLE_REASON_IDLE
    slow = [str(device.index) for device in devices if set(device.throttle_reasons) - {idle} and not device.unhealthy]
    parts = [(f"GPU {', '.join(ill)} unhealthy", "red")] if ill else []
    if slow:
        parts.append((f"{'; ' if ill else ''}GPU {', '.join(slow)} throttled", "yellow"))
    return Text.assemble(*parts)


def _trigger(trigger: redispatch_pb2.RedispatchTrigger) -> str:
    kind = word_of(redispatch_pb2.TriggerKind, trigger.kind).lower().replace("_", " ")
    return f"{kind} {trigger.device}".strip()


COLUMNS: dict[str, tuple[ResourceColumn, ...]] = {
    "clusters": (
        ResourceColumn("'cluster", lambda c: last_part(c.name)),
        ResourceColumn(
            "nodes",
            lambda c: f"{c.num_connected_nodes:,}/{c.num_nodes:,}",
            saved=lambda c: f"{UNKNOWN}/{c.num_nodes:,}",
        ),
        ResourceColumn("GPUs", lambda c: f"{c.num_gpus:,}"),
        ResourceColumn("'active plan", lambda c: last_part(c.active_plan)),
        ResourceColumn("'earlier", lambda c: last_part(c.earlier_plan)),
        ResourceColumn("changed", lambda c: ago(c.update_time)),
        ResourceColumn("'etag", lambda c: c.etag, wide=True),
        ResourceColumn("'re-dispatch", lambda c: _mode(c.policy.redispatch), wide=True),
        ResourceColumn("'placement", lambda c: _mode(c.policy.placement), wide=True),
        ResourceColumn("'traffic", lambda c: _mode(c.policy.traffic), wide=True),
    ),
    "nodes": (
        ResourceColumn("'node", lambda n: last_part(n.name)),
        ResourceColumn("'state", lambda n: state(_node_state(n))),
        ResourceColumn("GPUs", lambda n: str(len(n.devices))),
        ResourceColumn("'KV of the fullest", lambda n: kv_bar(n.devices)),
        ResourceColumn("'trouble", lambda n: _trouble(n.devices)),
        ResourceColumn("heard", lambda n: ago(n.heard_time)),
        ResourceColumn("'replicas", lambda n: ", ".join(last_part(name) for name in n.replicas), wide=True),
        ResourceColumn("'agent", lambda n: n.agent_version, wide=True),
        ResourceColumn("'types", lambda n: ", ".join(sorted({d.gpu_type for d in n.inventory.devices})), wide=True),
    ),
    "plans": (
        ResourceColumn("'plan", lambda p: last_part(p.name)),
        ResourceColumn("'cluster", lambda p: last_part(p.cluster)),
        ResourceColumn("'state", lambda p: state(word_of(plan_pb2.PlanState, p.state))),
        ResourceColumn("value", value_of, saved=lambda p: UNKNOWN if is_searched(p) else value_of(p)),
        ResourceColumn("gap", gap_of, saved=lambda p: UNKNOWN if is_searched(p) else gap_of(p)),
        ResourceColumn("'activation", lambda p: state(word_of(plan_pb2.ActivationState, p.activation))),
        ResourceColumn("made", lambda p: ago(p.create_time)),
        ResourceColumn("GPUs", lambda p: f"{p.result.num_gpus:,}" if p.HasField("result") else "", wide=True),
        ResourceColumn("'origin", lambda p: word_of(plan_pb2.PlanOrigin, p.origin).lower(), wide=True),
        ResourceColumn("'why", lambda p: p.proposal_reason, wide=True),
        ResourceColumn("'etag", lambda p: p.etag, wide=True),
    ),
    "replicas": (
        ResourceColumn("'replica", lambda r: last_part(r.name)),
        ResourceColumn("'state", lambda r: state(word_of(replica_pb2.ReplicaState, r.state))),
        ResourceColumn("'role", lambda r: word_of(replica_pb2.ReplicaRole, r.role).lower() if r.role else "unified"),
        ResourceColumn("'plan", lambda r: last_part(r.plan)),
        ResourceColumn("generation", lambda r: str(r.generation)),
        ResourceColumn("running", lambda r: str(r.report.num_running) if r.HasField("report") else UNKNOWN),
        ResourceColumn("waiting", lambda r: str(r.report.num_waiting) if r.HasField("report") else UNKNOWN),
        ResourceColumn("'re-dispatch", lambda r: "under way" if r.redispatch else ""),
        ResourceColumn("'nodes", lambda r: ", ".join(r.nodes), wide=True),
        ResourceColumn("'primary", lambda r: r.primary_node, wide=True),
        ResourceColumn("'why", lambda r: r.failure.message, wide=True),
    ),
    "redispatches": (
        ResourceColumn("'re-dispatch", lambda r: last_part(r.name)[:8]),
        ResourceColumn("'replica", lambda r: last_part(r.replica)),
        ResourceColumn("'state", lambda r: state(word_of(redispatch_pb2.RedispatchState, r.state))),
        ResourceColumn("moves", lambda r: f"{r.num_moves:,}"),
        ResourceColumn("KV", lambda r: gigabytes(r.kv_bytes)),
        ResourceColumn("'slowest device", lambda r: f"{seconds(r.makespan_before_s)} → {seconds(r.makespan_after_s)}"),
        ResourceColumn("made", lambda r: ago(r.create_time)),
        ResourceColumn("'because", lambda r: ", ".join(_trigger(trigger) for trigger in r.triggers), wide=True),
        ResourceColumn("'why not", lambda r: r.failure.message, wide=True),
        ResourceColumn("'name", lambda r: r.name, wide=True),
    ),
    "profiles": (
        ResourceColumn("'profile", lambda p: last_part(p.name)),
        ResourceColumn("'GPU type", lambda p: p.gpu_type),
        ResourceColumn("usable", lambda p: gigabytes(p.usable_bytes)),
        ResourceColumn("'from", lambda p: ", ".join(word_of(profile_pb2.ProfileSource, s).lower() for s in p.sources)),
        ResourceColumn("error", lambda p: percent(p.held_out_mape) if p.HasField("held_out_mape") else ""),
        ResourceColumn("changed", lambda p: ago(p.update_time)),
        ResourceColumn("'etag", lambda p: p.etag, wide=True),
    ),
}


def plan_summary(plan: plan_pb2.Plan, steps: Sequence[plan_service_pb2.TransitionStep] = ()) -> RenderableType:
    """Return the plan's state, its answer with the proof, its activation, and the steps towards it if there are any."""
    made = facts(_summary(plan))
    if not steps:
        return made
    listed = table_of(
        steps,
        ("wave", lambda step: str(step.wave)),
        ("'step", lambda step: word_of(plan_service_pb2.TransitionKind, step.kind).lower()),
        ("'replica", lambda step: last_part(step.replica)),
        ("'GPUs", lambda step: ", ".join(step.devices)),
        ("loads", lambda step: f"{step.load_bytes / 2**30:,.0f} GiB" if step.load_bytes else ""),
    )
    return Group(made, listed)


def _summary(plan: plan_pb2.Plan) -> Iterator[tuple[str, RenderableType]]:
    yield "Plan", plan.name
    yield "Cluster", plan.cluster
    yield "State", state(word_of(plan_pb2.PlanState, plan.state))
    if plan.HasField("result"):
        found = plan.result
        yield "Value", value_of(plan)
        bound = with_unit(found.bound, found.unit) if found.HasField("bound") else "none was proved"
        yield "Bound", bound + (f"  gap {percent(found.gap)}" if found.HasField("gap") else "")
        workers = f", {found.num_attention_workers:,} of them attention workers" if found.num_attention_workers else ""
        yield "Uses", f"{plural(found.num_replicas, 'replica')} on {plural(found.num_gpus, 'GPU')}{workers}"
        if found.HasField("verification"):
            yield "Simulated", _simulated(found.verification, plan.spec)
        yield "Solved", f"{word_of(plan_pb2.SolveStatus, found.status).lower()} in {seconds(found.solve_s)}"
    for note in plan.result.notes:
        yield "Note", note
    if plan.proposal_reason:
        yield "Proposed", plan.proposal_reason
    yield "Activation", state(word_of(plan_pb2.ActivationState, plan.activation))


def _simulated(found: plan_pb2.Verification, spec: plan_pb2.PlanSpec) -> Text:
    kept_rps = found.kept_rps if found.HasField("kept_rps") else None
    share = found.share if found.HasField("share") else None
    remarks = SimulationRemarks(share, found.too_short, found.dispatched, router_of(spec.target))
    if not found.kept:
        return missed_words(found.rate_rps, found.misses, kept_rps, remarks).text()
    ttft_s = found.ttft_s if found.HasField("ttft_s") else found.ttft_p95_s
    tpot_s = found.tpot_s if found.HasField("tpot_s") else found.tpot_mean_s
    latencies = (
        f"TTFT {spec.ttft_statistic or 'p95'} {seconds(ttft_s)}",
        f"TPOT {spec.tpot_statistic or 'mean'} {seconds(tpot_s)}",
    )
    within = f"{percent(found.attainment)} of the requests within all limits"
    return kept_words(found.rate_rps, latencies, within, kept_rps, remarks).text()


def node_table(nodes: Sequence[cluster_pb2.Node]) -> RenderableType:
    """Return a table with one row per GPU and what its agent reports."""
    if not nodes:
        return Text("no nodes", style="dim")
    made = table("'node", "'state", "heard", "GPU", "<KV in use", "busy", "GHz", "°C", "'remark", fixed=True)

    def remark(device: report_pb2.DeviceReport) -> Text:
        if device.unhealthy:
            return Text(device.unhealthy, style="red")
        reasons = (reason for reason in device.throttle_reasons if reason != report_pb2.THROTTLE_REASON_IDLE)
        slowed = [word_of(report_pb2.ThrottleReason, reason).lower() for reason in reasons]
        return Text(f"throttled: {', '.join(slowed)}" if slowed else "", style="yellow")

    for node in nodes:
        first = (last_part(node.name), state(_node_state(node)), ago(node.heard_time))
        for device in node.devices:
            made.add_row(
                *first,
                str(device.index),
                kv_bar([device], 8),
                percent(device.busy_ratio) if device.busy_ratio else "",
                f"{device.clock_hz / 1e9:.2f}" if device.clock_hz else "",
                f"{device.temperature_c:.0f}" if device.HasField("temperature_c") else "",
                remark(device),
            )
            first = ("", Text(""), "")
        if not node.devices:
            made.add_row(*first, "", Text(""), "", "", "", Text(""))
    return made


def lines_of_event(event: cluster_service_pb2.WatchClusterResponse) -> list[str]:
    """Return the line of an event, if anything happened; a reset, which may carry a state, takes one more."""
    again = ["--- full list again, because the resume token was too old"] if event.reset else []
    return [*again, *filter(None, [_what_happened(event)])]


def _what_happened(event: cluster_service_pb2.WatchClusterResponse) -> str:
    at = event.event_time.ToDatetime().strftime("%H:%M:%S")
    match event.WhichOneof("event"):
        case "cluster":
            cluster = event.cluster
            far = f"{cluster.num_connected_nodes:,} of {plural(cluster.num_nodes, 'node')} connected"
            return (
                f"{at} cluster {last_part(cluster.name)}: {far}, active {last_part(cluster.active_plan) or 'no plan'}"
            )
        case "node":
            node = event.node
            kv = kv_ratio(node.devices)
            full = "" if kv is None else f", KV {percent(kv)}"
            return f"{at} node {last_part(node.name)}: {_node_state(node)}{full}"
        case "removed_node":
            return f"{at} node {last_part(event.removed_node)}: removed"
        case "replica":
            replica = event.replica
            report = replica.report
            load = f"{report.num_running} running, {report.num_waiting} waiting"
            state = word_of(replica_pb2.ReplicaState, replica.state)
            return f"{at} replica {last_part(replica.name)}: {state}, generation {replica.generation}, {load}"
        case "removed_replica":
            return f"{at} replica {last_part(event.removed_replica)}: removed"
        case "redispatch":
            moved = event.redispatch
            state = word_of(redispatch_pb2.RedispatchState, moved.state)
            gain = f"{seconds(moved.makespan_before_s)} → {seconds(moved.makespan_after_s)}"
            return f"{at} re-dispatch of {last_part(moved.replica)}: {state}, {plural(moved.num_moves, 'move')}, {gain}"
    return "--- now live" if event.caught_up else ""
