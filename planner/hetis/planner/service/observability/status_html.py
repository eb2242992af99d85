"""The status page for browsers: replicas, KV use over time, and re-dispatches, in the style of the reports.

Everything shown comes from the planner's memory; if the store is unavailable, that is shown on a complete page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import numpy as np

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
    Strip,
    Strips,
    Tick,
    Tile,
    Tiles,
    ZoneMap,
    grid_of,
)
from hetis.planner.report.figures import digits, gigabytes, plural, seconds
from hetis.planner.report.page.fleet_map import IDLE, replica_duties
from hetis.planner.report.page.rendering import render_page
from hetis.planner.service.observability.overview import (
    NUM_SAMPLES,
    SAMPLE_S,
    ClusterNow,
    ClusterOverview,
    KvRecord,
    Overview,
    natural_order,
)
from hetis.planner.service.observability.traffic_blocks import traffic_blocks
from hetis.solver.cluster import node_of
from hetis.v1 import cluster_pb2, redispatch_pb2, replica_pb2, report_pb2

MAX_CLUSTERS = 4  # shown in full on the first page; the others have pages of their own
MAX_NODES = 36  # drawn per cluster
MAX_STRIPS = 32
MAX_REPLICAS = 40
MAX_REDISPATCHES = 15
FULL = 0.9  # share of KV in use from which a device is highlighted
STORE_AWAY_S = 10.0  # time without an answer after which the store is shown as unavailable
_WIDTH, _HEIGHT = 600, 28
_LEAST_SPAN_S = 60.0  # shortest time axis
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
    records = cluster.kv.records(MAX_STRIPS)
    blocks: list[Block] = [Tiles(tiles=tuple(_cluster_tiles(cluster, records))), _map(cluster, colors)]
    if cluster.replicas:
        blocks.append(_replicas(cluster))
    blocks += traffic_blocks(cluster.traffic)
    if records:
        blocks.append(_pressure(cluster, colors, records))
    blocks.append(_redispatches(cluster))
    plan = counted.active_plan if counted is not None else ""
    lead = f"{last_part(plan)} is in force" if plan else "No plan is in force."
    name = last_part(cluster.name)
    return Section(anchor=f"cluster-{name}", heading=f"Cluster {name}", lead=lead, blocks=tuple(blocks))


def _cluster_tiles(cluster: ClusterNow, records: Sequence[KvRecord]) -> Iterator[Tile]:
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
    fullest = max((one for one in records if not math.isnan(one.now)), key=lambda one: one.now, default=None)
    if fullest is not None:
        tone = "bad" if fullest.now >= (cluster.high_water or FULL) else ""
        yield Tile("KV of the fullest device", _whole(fullest.now), note=fullest.device, tone=tone)
    ends = Counter(_state(one) for one in cluster.redispatches)
    under_way = sum(ends[state] for state in _UNDER_WAY)
    note = f"{under_way:,} in progress, {ends['ABORTED']:,} aborted, in this term"
    yield Tile("Re-dispatches", f"{ends['DONE']:,}", "done", note)


# --- the map


def _map(cluster: ClusterNow, colors: Mapping[str, int]) -> FleetMap:
    duties = dict[str, GpuCell]()
    for number, replica in enumerate(cluster.replicas):
        duties.update(replica_duties(replica_from_proto(replica.shape), f"R{number}", colors[replica.name]))
    full = cluster.kv.now()
    busy = {node_of(device) for device in duties}
    nodes = sorted(cluster.nodes.items(), key=lambda item: (last_part(item[0]) not in busy, natural_order(item[0])))
    rest = len(nodes) - MAX_NODES
    cards = [_card(last_part(name), node, duties, full) for name, node in nodes[:MAX_NODES]]
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


# --- KV over time


def _pressure(cluster: ClusterNow, colors: Mapping[str, int], records: Sequence[KvRecord]) -> Strips:
    owners = dict[str, int]()
    for replica in cluster.replicas:
        owners |= dict.fromkeys(devices_of(replica.shape), colors[replica.name])
    times_s = np.asarray(records[0].times_s)
    last_s = float(times_s[-1])
    span_s = max(_LEAST_SPAN_S, last_s - float(times_s[0]))
    xs = _WIDTH * (1.0 - (last_s - times_s) / span_s)
    rows = []
    for record in records:
        now = "no report" if math.isnan(record.now) else f"{_whole(record.now)} now"
        tone = "bad" if record.now >= (cluster.high_water or FULL) else ""
        color, text = owners.get(record.device, PLAIN), f"{now}, peak {_whole(record.peak)}"
        rows.append(Strip(record.device, text, color, *_paths(xs, record.shares), tone))
    moments = [
        round(_WIDTH * (1.0 - (last_s - one.create_time.ToMicroseconds() / 1e6) / span_s), 1)
        for one in cluster.redispatches
    ]
    rest = cluster.kv.num_devices - len(records)
    notes = ["Each vertical line marks a re-dispatch."] if any(0 <= at <= _WIDTH for at in moments) else []
    if cluster.high_water is not None:
        notes.append("The dashed line is the share above which head groups are moved away.")
    if rest > 0:
        notes.append(f"Only the {len(records)} fullest devices are shown; {rest:,} others are less full.")
    return Strips(
        title="KV in use, by device",
        intro=f"Share of the KV blocks that cannot be dropped, every {SAMPLE_S:g} s; the planner keeps the last "
        f"{NUM_SAMPLES * SAMPLE_S / 60:.0f} minutes of its term.",
        rows=rows,
        width=_WIDTH,
        height=_HEIGHT,
        ticks=list(_ticks(span_s)),
        limit=None if cluster.high_water is None else round(_y_of(cluster.high_water), 1),
        moments=[at for at in moments if 0 <= at <= _WIDTH],
        note=" ".join(notes),
    )


def _paths(xs: np.ndarray, shares: np.ndarray) -> tuple[str, str]:
    """Return a line and the area below it, with gaps where nothing was reported."""
    lines, areas = list[str](), list[str]()
    known = np.flatnonzero(~np.isnan(shares))
    for run in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
        if not len(run):
            continue
        points = [f"{xs[i]:.1f} {_y_of(float(shares[i])):.1f}" for i in run]
        if len(run) == 1:  # a line needs two points, so repeat the only one
            points.append(f"{min(xs[run[0]] + 1.5, _WIDTH):.1f} {_y_of(float(shares[run[0]])):.1f}")
        lines.append("M" + "L".join(points))
        areas.append(f"M{xs[run[0]]:.1f} {_HEIGHT}L{'L'.join(points)}L{xs[run[-1]]:.1f} {_HEIGHT}Z")
    return "".join(lines), "".join(areas)


def _y_of(share: float) -> float:
    return (_HEIGHT - 2) * (1.0 - min(max(share, 0.0), 1.0)) + 1


def _ticks(span_s: float) -> Iterator[Tick]:
    for part in (0.0, 0.5, 1.0):
        ago_s = span_s * (1.0 - part)
        text = "now" if not ago_s else f"{ago_s / 60:.1f} min ago" if ago_s >= 60 else f"{ago_s:.0f} s ago"
        yield Tick(_WIDTH * part, text)


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
