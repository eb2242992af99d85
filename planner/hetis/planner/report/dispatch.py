"""Dispatch and re-dispatch of one stage, as tables and as JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from hetis.planner.report.figures import bar, digits, percent, percent_of_gap, plural, seconds
from hetis.planner.report.tables import as_group, bullets, facts, first_rows, section, table, table_of
from hetis.planner.use_cases.dispatch.answers import Dispatched, Redispatched
from hetis.planner.use_cases.dispatch.stages import CostedStage, expected_blocks
from hetis.planner.use_cases.json_values import document, fields_of
from hetis.profiler.defaults import MODELLED
from hetis.solver.dispatch.dispatch_problem import IntArray, Path
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.solver.redispatch.redispatch_problem import Move, RedispatchPlan, Refused

# --- sentences that explain where head groups went


PATHS = {
    Path.CHAIN: "the relaxation was solved exactly, as a chain by comparative advantage",
    Path.MIXED: "two constraints bind at once for some devices; the chain was solved on mixtures of them",
    Path.LP: "HiGHS solved the relaxation",
}


def costs_sentence(stage: CostedStage) -> str | None:
    """Return a sentence about the devices with modelled costs, or None if all costs are specified or measured."""
    modelled = [device for device in stage.saved.devices if stage.origins[device.name] == MODELLED]
    if not modelled:
        return None
    gpus = ", ".join(dict.fromkeys(device.gpu or "" for device in modelled))
    return f"modelled, not measured: attention costs of {gpus} ({plural(len(modelled), 'device')})"


def _copying_s(plan: RedispatchPlan) -> float:
    return sum(move.seconds for move in plan.moves)


def could_fall(plan: RedispatchPlan) -> str:
    """Return by what share of the objective the best plan could be lower; at most 100%."""
    return percent(1.0 - plan.bound_s / plan.objective_s)


# --- dispatch as tables


MAX_ROWS = 40  # requests, moves or devices shown; -o json has all
BAR_WIDTH = 8


@as_group
def render_dispatch(found: Dispatched) -> Iterator[RenderableType]:
    plan, stage = found.plan, found.stage
    num, placed = len(found.requests.requests), len(found.requests.requests) - len(plan.unplaced)
    used = np.count_nonzero(plan.groups.any(axis=0))
    on = f"{used} of {plural(len(stage.saved.devices), 'device')}"
    yield Text.assemble((stage.saved.name, "bold"), f": {placed} of {plural(num, 'new request')} placed on {on}")
    yield facts(_facts(found))
    if num:
        yield section("Head groups", _requests(found))
    if plan.unplaced:
        yield section("Waiting", bullets(str(one) for one in plan.unplaced[:MAX_ROWS]))
    expected = [int(blocks) for blocks in expected_blocks(found.reached)]
    worth = [f"≤ {digits(price_s * 1e9)} ns" if price_s > 0 else "0" for price_s in map(float, plan.prices.block_s)]
    title = ("a block saves", worth) if any(plan.prices.block_s > 0) else None
    table = device_table(found, blocks=expected, last=title)
    yield section("Devices (KV blocks per layer, expected growth included)", table)
    yield from _costs(stage)


def device_table(
    found: Dispatched | Redispatched, *, blocks: Sequence[int], last: tuple[str, Sequence[str]] | None = None
) -> RenderableType:
    """Return times before and after with a bar, each device's KV blocks, and optionally another column."""
    before, after, devices = found.before, found.after, found.stage.saved.devices

    def times(before_s: float, after_s: float) -> list[RenderableType]:
        drawn = bar(after_s / after.makespan_s if after.makespan_s else 0.0, BAR_WIDTH)
        return [seconds(before_s), seconds(after_s), Text(drawn, style="green")]

    rows = list[list[RenderableType]]()
    for i, device in enumerate(devices[:MAX_ROWS]):
        total, status = device.total_blocks, "" if device.status is DeviceStatus.OK else f" {device.status.value}"
        share = f" {blocks[i] / total:>4.0%}" if total else ""
        name = Text.assemble(device.name, (status, "yellow"))
        more = [last[1][i]] if last else []
        of_device = times(before.devices[i].seconds, after.devices[i].seconds)
        rows.append([name, *of_device, f"{blocks[i]:,}/{total:,}{share}", *more])
    if after.card_s:
        rows.append([Text("network card", style="dim"), *times(before.card_s, after.card_s)])
    made = table("'device", "before", "after", "'", "KV blocks", *([last[0]] if last else []), rows=rows)
    return first_rows(made, len(devices), MAX_ROWS, "device")


def _costs(stage: CostedStage) -> Iterator[RenderableType]:
    if (costs := costs_sentence(stage)) is not None:
        yield Text(f"\n{costs}", style="dim")


def per_layer(value_s: float, stage: CostedStage) -> str:
    """Return the time of one layer, and that of a decode step through all layers of the stage."""
    layers = stage.saved.num_layers
    return f"{seconds(value_s)} per layer, {seconds(value_s * layers)} per step of {plural(layers, 'layer')}"


def _facts(found: Dispatched) -> Iterator[tuple[str, Text | str]]:
    plan = found.plan
    yield "Makespan", Text(per_layer(plan.makespan_s, found.stage), style="bold green")
    yield "Before", per_layer(found.before.makespan_s, found.stage)
    proof = "nothing is faster" if plan.gap <= 1e-9 else f"proven: nothing is over {percent_of_gap(plan.gap)} faster"
    yield "Bound", f"{seconds(plan.bound_s)}  gap {percent(plan.gap)}, {proof}"
    yield "Path", f"{plan.path.value}: {PATHS[plan.path]}"


def _requests(found: Dispatched) -> RenderableType:
    names = found.stage.snapshot.stage.devices

    def placed(row: IntArray) -> Text:
        where = " · ".join(f"{names[i]} {row[i]}" for i in row.nonzero()[0])
        return Text(where) if where else Text("waits", style="yellow")

    return table_of(
        zip(found.requests.requests, found.plan.groups, strict=True),
        ("'request", lambda one: Text(one[0].id)),
        ("context", lambda one: f"{one[0].context_tokens:,}"),
        ("output", lambda one: f"{one[0].output_tokens:,}"),
        ("'groups on", lambda one: placed(one[1])),
        most=MAX_ROWS,
        noun="request",
    )


# --- re-dispatch as tables


@as_group
def render_redispatch(found: Redispatched) -> Iterator[RenderableType]:
    plan, stage = found.plan, found.stage
    moving = plural(len(plan.moves), "move") if plan.moves else "nothing moves"
    requests, devices = plural(len(stage.saved.requests), "running request"), plural(len(stage.saved.devices), "device")
    yield Text.assemble((stage.saved.name, "bold"), f": {moving} among {requests} on {devices}")
    yield facts(_redispatch_facts(found))
    fired = tuple(str(trigger) for trigger in found.triggers) or ("none: a running stage would not search for moves",)
    yield section("Triggers", bullets(fired))
    if plan.moves:
        yield section("Moves, in order", _moves(found))
    if plan.refused:
        yield section("Helpful moves that cannot be made", _refused(found))
    used = [int(count) for count in found.reached.used_blocks()]
    yield section("Devices (KV blocks per layer, in use now)", device_table(found, blocks=used))
    yield from _costs(stage)


def _redispatch_facts(found: Redispatched) -> Iterator[tuple[str, Text | str]]:
    plan, stage = found.plan, found.stage
    yield "Makespan", Text(per_layer(plan.makespan_after_s, stage), style="bold green")
    yield "Before", per_layer(plan.makespan_before_s, stage)
    proof = "nothing is better" if plan.gap <= 1e-9 else f"proven: the best is at most {could_fall(plan)} lower"
    yield "Objective", f"{seconds(plan.objective_s)}, the makespan plus the cost of moving and of memory shortage"
    yield "Bound", f"{seconds(plan.bound_s)}  gap {percent(plan.gap)}, {proof}"
    if plan.moves:
        yield "Copied", f"{_size(plan.num_bytes)} of KV, {seconds(_copying_s(plan))} of link time"
    if max(plan.short_before, plan.short_after) >= 1:
        yield "Short", f"{plan.short_after:,.0f} KV blocks expected or draining, {plan.short_before:,.0f} before"


def _moves(found: Redispatched) -> RenderableType:
    names = found.stage.snapshot.stage.devices
    return table_of(
        found.plan.moves,
        ("wave", lambda move: str(move.wave + 1)),
        ("'request", lambda move: Text(move.request)),
        ("groups", lambda move: str(move.groups)),
        ("'from → to", lambda move: Text(f"{names[move.source]} → {names[move.target]}")),
        ("size", lambda move: _size(move.num_bytes)),
        ("copy", lambda move: seconds(move.seconds)),
        ("pays after", lambda move: "" if (steps := move.payback_steps) is None else f"{digits(steps, 2)} steps"),
        ("'why", lambda move: move.reason.value),
        most=MAX_ROWS,
        noun="move",
    )


def _refused(found: Redispatched) -> RenderableType:
    names, refused = found.stage.snapshot.stage.devices, found.plan.refused
    shown = bullets(
        f"{one.request}, {plural(one.groups, 'group')} {names[one.source]} → {names[one.target]}: {one.why}"
        for one in refused[:MAX_ROWS]
    )
    return first_rows(shown, len(refused), MAX_ROWS, "move")


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


# --- documents: devices are referred to by name; times are in seconds per layer


def dispatch_document(found: Dispatched) -> dict[str, Any]:
    plan, names = found.plan, found.stage.snapshot.stage.devices
    devices = _devices(found)
    for i, device in enumerate(devices):
        device["new_groups"] = int(plan.groups[:, i].sum())
        device["bound_weight"] = float(plan.prices.piece[i].sum())
        device["block_price_s"] = float(plan.prices.block_s[i])
    result = {"path": plan.path, "makespan_before_s": found.before.makespan_s}
    return document(
        "Dispatch",
        state=_state(found.stage),
        result=result | fields_of(plan, "makespan_s", "bound_s", "gap", "relaxed_s"),
        requests=[
            {
                **fields_of(request, "id", "context_tokens", "output_tokens"),
                "groups": {names[i]: int(plan.groups[j, i]) for i in np.flatnonzero(plan.groups[j])},
                "group_price_s": float(plan.prices.request_s[j]),
            }
            for j, request in enumerate(found.requests.requests)
        ],
        unplaced=[
            {**fields_of(one, "id", "resource", "missing", "proved"), "message": str(one)} for one in plan.unplaced
        ],
        devices=devices,
        network_card={**_card(found), "bound_weight": plan.prices.nic},
    )


def redispatch_document(found: Redispatched) -> dict[str, Any]:
    plan, names = found.plan, found.stage.snapshot.stage.devices
    settings = ("budget_bytes", "least_gain", "patience", "ahead_steps", "refill_token_s")
    how = ("seconds", "payback_steps", "reason", "wave", "together")
    return document(
        "Redispatch",
        state=_state(found.stage),
        settings=fields_of(found.problem, *settings),
        triggers=[
            {**fields_of(trigger, "kind", "device", "value", "limit"), "message": str(trigger)}
            for trigger in found.triggers
        ],
        result={
            "makespan_before_s": plan.makespan_before_s,
            "makespan_s": plan.makespan_after_s,
            "short_blocks_before": float(plan.short_before),
            "short_blocks": float(plan.short_after),
            "objective_before_s": float(plan.stay_s),
            "objective_s": float(plan.objective_s),
            "bound_s": float(plan.bound_s),
            "gap": float(plan.gap),
            "moved_bytes": plan.num_bytes,
            "move_s": _copying_s(plan),
        },
        moves=[_move(move, names) | {"bytes": move.num_bytes, **fields_of(move, *how)} for move in plan.moves],
        refused=[_move(refused, names) | {"why": refused.why} for refused in plan.refused],
        devices=_devices(found),
        network_card=_card(found),
    )


def _card(found: Dispatched | Redispatched) -> dict[str, float]:
    return {"before_s": found.before.card_s, "after_s": found.after.card_s}


def _state(stage: CostedStage) -> dict[str, Any]:
    return {"name": stage.saved.name, "num_layers": stage.saved.num_layers, "origin": stage.file}


def _devices(found: Dispatched | Redispatched) -> list[dict[str, Any]]:
    stage, first, reached = found.stage, found.stage.snapshot, found.reached
    used = (first.used_blocks(), reached.used_blocks())
    expected = (expected_blocks(first), expected_blocks(reached))
    return [
        {
            **fields_of(saved, "name", "role", "tp", "gpu"),
            "costs": stage.origins[saved.name],
            "status": saved.status,
            "before_s": found.before.devices[i].seconds,
            "after_s": found.after.devices[i].seconds,
            "is_bottleneck": found.after.bottleneck == i,
            **fields_of(saved, "total_blocks", "high_water"),
            "used_blocks_before": int(used[0][i]),
            "used_blocks": int(used[1][i]),
            "expected_blocks_before": int(expected[0][i]),
            "expected_blocks": int(expected[1][i]),
        }
        for i, saved in enumerate(stage.saved.devices)
    ]


def _move(move: Move | Refused, names: tuple[str, ...]) -> dict[str, Any]:
    return {"request": move.request, "groups": move.groups, "from": names[move.source], "to": names[move.target]}
