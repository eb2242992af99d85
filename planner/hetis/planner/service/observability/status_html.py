"""The status page for browsers: replicas, KV in use, and re-dispatches, in the style of the reports.

Everything shown comes from the planner's memory; if the store is unavailable, that is shown on a complete page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from hetis.planner.convert.names import last_part, word_of
from hetis.planner.convert.plans import replica_from_proto
from hetis.planner.convert.stages import trigger_from_proto
from hetis.planner.fleet.replica import devices_of
from hetis.planner.fleet.views import LiveNode, LiveReplica
from hetis.planner.report.blocks import (
    COLORS,
    PLAIN,
    Block,
    Column,
    FleetMap,
    GpuCell,
    Grid,
    LinksBlock,
    NodeCard,
    Page,
    Section,
    Sentences,
    Tile,
    Tiles,
    ZoneMap,
    grid_of,
)
from hetis.planner.report.figures import digits, gigabytes, plural, seconds
from hetis.planner.report.page.fleet_map import IDLE, replica_duties
from hetis.planner.report.page.rendering import render_page
from hetis.planner.service.observability.overview import (
    ClusterNow,
    ClusterOverview,
    Overview,
    natural_order,
)
from hetis.planner.service.observability.traffic_blocks import traffic_blocks
from hetis.solver.cluster import node_of
from hetis.v1 import cluster_pb2, redispatch_pb2, replica_pb2, report_pb2

MAX_CLUSTERS = 4  # shown in full on the first page; the others have pages of their own
MAX_NODES = 36  # drawn per cluster
MAX_REPLICAS = 40
MAX_REDISPATCHES = 15
FULL = 0.9  # share of KV in use from which a device is highlighted
STORE_AWAY_S = 10.0  # time without an answer after which the store is shown as unavailable
_UNDER_WAY = ("PREPARING", "COMMITTING", "RELEASING", "ABORTING")


def status_html(
    overview: Overview, clusters: Sequence[ClusterNow], *, version: str, is_ready: bool, only: str = ""
) -> str:
    """Return the page of the cluster ``only`` or, if that is empty, of the planner and all clusters."""
    counted = {one.name: one for one in overview.clusters}
    shown = [one for one in clusters if one.name == only] if only else clusters[:MAX_CLUSTERS]
    sections = [] if only else [_planner_section(overview, clusters, version=version, is_ready=is_ready)]
    sections += [_cluster_section(one, counted.get(one.name)) for one in shown]
    title = f"Cluster {last_part(only)}" if only else "hetis planner"
    footer = (
        f"hetis-planner {version}, {_clock(overview, clusters)}. This page refreshes itself. For JSON, "
        "curl this address; for Prometheus, see /metrics."
    )
    return render_page(Page(title=title, sections=tuple(sections), footer=footer, is_live=True))


def _clock(overview: Overview, clusters: Sequence[ClusterNow]) -> str:
    """Return the time to the minute, so that the page stays the same while nothing happens."""
    now_s = max((one.now_s for one in clusters), default=overview.leader_since_s)
    return _minute(now_s)


def _minute(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


# --- the planner


def _planner_section(overview: Overview, clusters: Sequence[ClusterNow], *, version: str, is_ready: bool) -> Section:
    blocks: list[Block] = [Tiles(tiles=tuple(_planner_tiles(overview, is_ready=is_ready)))]
    others = clusters[MAX_CLUSTERS:]
    if others:
        links = tuple((last_part(one.name), f"/{one.name}") for one in others)
        blocks.append(LinksBlock(title="More clusters", links=links))
    if not clusters:
        known = ", ".join(last_part(one.name) for one in overview.clusters)
        if not overview.leads:
            where = f" ({overview.leader})" if overview.leader else ""
            lines = [f"This planner is on standby. The page of the leader{where} shows what is running."]
        elif known:
            lines = [f"Clusters being loaded: {known}."]
        else:
            lines = ["There is no cluster yet: hetis-plan apply cluster.yaml"]
        blocks.append(Sentences(title="Clusters", lines=tuple(lines)))
    role = "leads" if overview.leads else "is on standby"
    return Section(anchor="planner", heading="Planner", lead=f"hetis-planner {version} {role}", blocks=tuple(blocks))


def _planner_tiles(overview: Overview, *, is_ready: bool) -> Iterator[Tile]:
    since = f"epoch {overview.epoch}"
    if overview.leads and overview.leader_since_s:
        since += f", since {_minute(overview.leader_since_s)}"
    yield Tile("This planner", "ready" if is_ready else "not ready", note=since, tone="good" if is_ready else "bad")
    if (ago_s := overview.store_answered_s_ago) >= STORE_AWAY_S:
        yield Tile("Store", "not responding", note=f"last response {seconds(ago_s)} ago", tone="bad")
    else:
        yield Tile("Store", "responding", tone="good")
    at_a_time, queued = f"of {overview.solver_processes:,} at a time", f"{overview.queued:,} waiting"
    yield Tile("Searches", f"{overview.searching:,}", at_a_time, queued)
    plans = ", ".join(f"{count:,} {_lower(state)}" for state, count in overview.num_plans.items())
    yield Tile("Plans", f"{sum(overview.num_plans.values()):,}", note=plans)


# --- a cluster


def _cluster_section(cluster: ClusterNow, counted: ClusterOverview | None) -> Section:
    colors = {replica.name: number % COLORS for number, replica in enumerate(cluster.replicas)}
    blocks: list[Block] = [Tiles(tiles=tuple(_cluster_tiles(cluster))), _map(cluster, colors)]
    if cluster.replicas:
        blocks.append(_replicas(cluster))
    blocks += traffic_blocks(cluster.traffic)
    blocks.append(_redispatches(cluster))
    plan = counted.active_plan if counted is not None else ""
    lead = f"{last_part(plan)} is in force" if plan else "No plan is in force."
    name = last_part(cluster.name)
    return Section(anchor=f"cluster-{name}", heading=f"Cluster {name}", lead=lead, blocks=tuple(blocks))


def _cluster_tiles(cluster: ClusterNow) -> Iterator[Tile]:
    nodes = Counter(word_of(cluster_pb2.NodeState, node.state) for node in cluster.nodes.values())
    other = ", ".join(f"{count:,} {_lower(state)}" for state, count in nodes.items() if state != "READY")
    tone = "bad" if nodes["LOST"] + nodes["SUSPECT"] else ""
    yield Tile("Nodes ready", f"{nodes['READY']:,}", f"of {sum(nodes.values()):,}", other, tone)
    states = Counter(word_of(replica_pb2.ReplicaState, replica.state) for replica in cluster.replicas)
    notes = [f"{count:,} {_lower(state)}" for state, count in states.items() if state not in ("SERVING", "DEGRADED")]
    if states["DEGRADED"]:
        notes.insert(0, f"{states['DEGRADED']:,} of them degraded by a lost attention worker")
    serving, tone = states["SERVING"] + states["DEGRADED"], "bad" if states["DEGRADED"] or states["FAILED"] else ""
    yield Tile("Replicas serving", f"{serving:,}", f"of {len(cluster.replicas):,}", ", ".join(notes), tone)
    reports = [replica.report for replica in cluster.replicas if replica.report is not None]
    running, waiting, finished = (
        sum(getattr(report, name) for report in reports) for name in ("num_running", "num_waiting", "num_finished")
    )
    yield Tile("Requests", f"{running:,}", "running", f"{waiting:,} waiting, {finished:,} finished")
    if cluster.kv:
        fullest, share = max(cluster.kv.items(), key=lambda item: item[1])
        yield Tile(
            "KV of the fullest device",
            _whole(share),
            fullest,
            tone="bad" if share >= (cluster.high_water or FULL) else "",
        )
    ends = Counter(_state(one) for one in cluster.redispatches)
    under_way = sum(ends[state] for state in _UNDER_WAY)
    note = f"{under_way:,} in progress, {ends['ABORTED']:,} aborted, in this term"
    yield Tile("Re-dispatches", f"{ends['DONE']:,}", "done", note)


# --- the map


def _map(cluster: ClusterNow, colors: Mapping[str, int]) -> FleetMap:
    duties = dict[str, GpuCell]()
    for number, replica in enumerate(cluster.replicas):
        duties.update(replica_duties(replica_from_proto(replica.shape), f"R{number}", colors[replica.name]))
    busy = {node_of(device) for device in duties}
    nodes = sorted(cluster.nodes.items(), key=lambda item: (last_part(item[0]) not in busy, natural_order(item[0])))
    rest = len(nodes) - MAX_NODES
    cards = [_card(last_part(name), node, duties, cluster.kv) for name, node in nodes[:MAX_NODES]]
    legend = [
        (f"R{number}: {_lower(word_of(replica_pb2.ReplicaState, replica.state))}", colors[replica.name])
        for number, replica in enumerate(cluster.replicas[:COLORS])
    ]
    zone = ZoneMap(name="", nodes=tuple(cards), rest=f"and {plural(rest, 'more node')}" if rest > 0 else "")
    note = "Solid: holds layers. Dashed: attention worker. Dotted: not in a replica."
    return FleetMap(title="The fleet now", zones=(zone,), legend=tuple(legend), note=note)


def _card(name: str, node: LiveNode, duties: Mapping[str, GpuCell], full: Mapping[str, float]) -> NodeCard:
    found = [] if node.inventory is None else list(node.inventory.devices)
    planned = {int(device.rpartition("/")[2]) for device in duties if node_of(device) == name}
    known = planned | {device.index for device in found} | {device.index for device in node.devices}
    types = Counter(device.gpu_type for device in found if device.gpu_type)
    held = ", ".join(f"{count:,} × {gpu}" for gpu, count in types.items())
    state = word_of(cluster_pb2.NodeState, node.state)
    cells = tuple(_cell(f"{name}/{index}", index, duties, full, state) for index in sorted(known))
    gpus = " · ".join(part for part in (held, "" if state == "READY" else state) if part)
    return NodeCard(name=name, gpus=gpus, cells=cells)


def _cell(device: str, index: int, duties: Mapping[str, GpuCell], full: Mapping[str, float], state: str) -> GpuCell:
    duty = duties.get(device, IDLE)
    share = full.get(device, math.nan)
    lines = duty.lines if duty is not IDLE else ("no replica",)
    if state == "LOST":
        return GpuCell(index=str(index), role="idle", color=PLAIN, lines=(*lines, "lost"))
    is_known = not math.isnan(share)
    if is_known:
        lines = (*lines, f"KV {_whole(share)}")
    return GpuCell(index=str(index), role=duty.role, color=duty.color, lines=lines, filled=share if is_known else None)


# --- replicas


def _replicas(cluster: ClusterNow) -> Grid:
    states = [word_of(replica_pb2.ReplicaState, replica.state) for replica in cluster.replicas]
    rest = len(cluster.replicas) - MAX_REPLICAS

    def reported(head: str, cell: Callable[[report_pb2.ReplicaReport], str]) -> Column[tuple[int, LiveReplica]]:
        return head, lambda one: "" if one[1].report is None else cell(one[1].report)

    return grid_of(
        list(enumerate(cluster.replicas))[:MAX_REPLICAS],
        ("'", lambda one: f"R{one[0]}"),
        ("'replica", lambda one: last_part(one[1].name)),
        ("'plan", lambda one: last_part(one[1].plan)),
        ("'state", lambda one: _lower(states[one[0]]) + (", moving heads" if one[1].redispatch else "")),
        ("GPUs", lambda one: f"{len(devices_of(one[1].shape)):,}"),
        reported("running", lambda report: f"{report.num_running:,}"),
        reported("waiting", lambda report: f"{report.num_waiting:,}"),
        reported("TTFT", lambda report: seconds(report.ttft_s) if report.ttft_s else ""),
        reported("TPOT", lambda report: seconds(report.tpot_s) if report.tpot_s else ""),
        reported("preempted", lambda report: f"{report.num_preempted:,}"),
        ("generation", lambda one: f"{one[1].generation:,}"),
        title="Replicas",
        bad=[number for number, state in enumerate(states) if state in ("DEGRADED", "FAILED")],
        note=f"and {plural(rest, 'more replica')}" if rest > 0 else "",
    )


# --- re-dispatches


def _redispatches(cluster: ClusterNow) -> Block:
    if not cluster.redispatches:
        return Sentences(title="Re-dispatches", lines=("None yet in this term.",))
    numbers = {replica.name: f"R{number}" for number, replica in enumerate(cluster.replicas)}
    newest = sorted(cluster.redispatches, key=lambda one: one.create_time.ToMicroseconds(), reverse=True)
    shown, rest = newest[:MAX_REDISPATCHES], len(newest) - MAX_REDISPATCHES
    return grid_of(
        shown,
        ("'at", lambda one: one.create_time.ToDatetime().strftime("%H:%M:%S")),
        ("'replica", lambda one: numbers.get(one.replica, last_part(one.replica))),
        ("'because", lambda one: ", ".join(map(_trigger, one.triggers))),
        ("moves", lambda one: f"{one.num_moves:,}"),
        ("KV", lambda one: gigabytes(one.kv_bytes)),
        ("time per layer", lambda one: f"{seconds(one.makespan_before_s)} → {seconds(one.makespan_after_s)}"),
        ("'state", _ended),
        title="Re-dispatches",
        intro="Head groups moved while requests were running, latest first; times are in UTC.",
        bad=[number for number, one in enumerate(shown) if _state(one) == "ABORTED"],
        strong=next((number for number, one in enumerate(shown) if _state(one) in _UNDER_WAY), None),
        note=f"and {plural(rest, 'earlier one')}" if rest > 0 else "",
    )


def _trigger(message: redispatch_pb2.RedispatchTrigger) -> str:
    trigger = trigger_from_proto(message)
    return "for an unknown reason" if trigger is None else str(trigger)


def _ended(one: redispatch_pb2.Redispatch) -> str:
    state = _lower(_state(one))
    if one.HasField("failure"):
        return f"{state}: {one.failure.message}"
    if not one.HasField("end_time"):
        return state
    took_s = (one.end_time.ToMicroseconds() - one.create_time.ToMicroseconds()) / 1e6
    return f"{state} in {digits(took_s, 2)}\N{NO-BREAK SPACE}s"


def _state(one: redispatch_pb2.Redispatch) -> str:
    return word_of(redispatch_pb2.RedispatchState, one.state)


def _whole(share: float) -> str:
    """Return a share without decimals, since it changes every few seconds."""
    return f"{share:.0%}"


def _lower(word: str) -> str:
    return word.lower().replace("_", " ")
