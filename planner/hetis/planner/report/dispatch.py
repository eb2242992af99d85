"""Dispatch and re-dispatch of one stage, as tables, as sentences that explain them, and as JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from hetis.planner.report.figures import bar, digits, percent, percent_of_gap, plural, seconds
from hetis.planner.report.tables import as_group, bullets, facts, first_rows, section, table, table_of
from hetis.planner.use_cases.dispatch.answers import Dispatched, Redispatched
from hetis.planner.use_cases.dispatch.stages import CostedStage, StepTimes, expected_blocks
from hetis.planner.use_cases.json_values import document, fields_of
from hetis.profiler.defaults import MODELLED
from hetis.solver.dispatch.dispatch_problem import IntArray, Path, Resource, Unplaced
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.solver.redispatch.redispatch_problem import Move, MoveReason, RedispatchPlan, Refused

# --- sentences that explain where head groups went


MOST_NAMED = 8  # devices in a sentence, or sentences about devices
PATHS = {
    Path.CHAIN: "the relaxation was solved exactly, as a chain by comparative advantage",
    Path.MIXED: "two constraints bind at once for some devices; the chain was solved on mixtures of them",
    Path.LP: "HiGHS solved the relaxation",
    Path.MILP: "HiGHS searched whole head groups",
}


def costs_sentence(stage: CostedStage) -> str | None:
    """Return a sentence about the devices with modelled costs, or None if all costs are specified or measured."""
    modelled = [device for device in stage.saved.devices if stage.origins[device.name] == MODELLED]
    if not modelled:
        return None
    gpus = ", ".join(dict.fromkeys(device.gpu or "" for device in modelled))
    return f"modelled, not measured: attention costs of {gpus} ({plural(len(modelled), 'device')})"


def bottleneck_sentence(stage: CostedStage, times: StepTimes) -> str:
    """Return a sentence about the slowest device and where its time is spent."""
    if times.makespan_s == 0:
        return "Nothing runs."
    if times.bottleneck is None:
        card = f"the exchange with the attention workers takes {seconds(times.card_s)} per layer."
        return f"The primary's network card is the bottleneck: {card}"
    name, time = stage.saved.devices[times.bottleneck].name, times.devices[times.bottleneck]
    return (
        f"{name} is the slowest with {seconds(time.seconds)} per layer: {seconds(time.kv_s)} for reading "
        f"{digits(time.kv_bytes / 1e6)} MB of KV, {seconds(time.heads_s)} for {plural(time.heads, 'query head')}, "
        f"{seconds(time.call_s)} per call."
    )


def explain_dispatch(found: Dispatched) -> Iterator[str]:
    """Explain what limits the placement, its bound, the value of more memory, and why requests wait."""
    stage, plan = found.stage, found.plan
    devices = stage.saved.devices
    yield bottleneck_sentence(stage, found.after)
    if found.after.makespan_s == found.before.makespan_s > 0:
        yield "It was already that slow: the new requests fit beside the running ones and cost no time."
    if plan.gap <= 1e-9:
        yield "No placement of these requests is faster: the plan reaches the bound."
    else:
        yield f"No placement of these requests is over {percent_of_gap(plan.gap)} faster, proved by weak duality."
    # Idle devices have prices, too: what using them would have to save.
    weights = {
        device.name: float(plan.prices.piece[i].sum())
        for i, device in enumerate(devices)
        if found.after.devices[i].heads > 0
    }
    weights["the primary's network card"] = plan.prices.nic
    rests_on = sorted(((name, weight) for name, weight in weights.items() if weight > 0.005), key=lambda one: -one[1])
    if rests_on:
        shares = ", ".join(f"{name} {weight:.0%}" for name, weight in rests_on[:MOST_NAMED])
        yield f"The bound rests on the time of {shares}: only less work there would make the stage faster."
    elif plan.groups.any():
        yield "The bound is the time of the running requests."
    yield from _memory_sentences(found)
    yield from (_unplaced_sentence(found, one) for one in plan.unplaced)


def _memory_sentences(found: Dispatched) -> Iterator[str]:
    saved = found.stage.saved
    block_bytes = saved.heads.kv_bytes_per_token * saved.heads.block_tokens * saved.num_layers
    names = [device.name for device in saved.devices]
    binding = [one for one in zip(names, map(float, found.plan.prices.block_s), strict=True) if one[1] > 0]
    if not binding and found.plan.groups.any():
        if found.plan.unplaced:
            yield "No memory limit binds for the placed requests: one more KV block would not speed them up."
        else:
            yield "No memory limit binds: one more KV block on any device would save no time."
    for name, price_s in sorted(binding, key=lambda one: -one[1])[:MOST_NAMED]:
        # In nanoseconds where `seconds` would show leading zeros.
        worth = f"{digits(price_s * 1e9)} ns" if price_s < 1e-7 else seconds(price_s)
        block = f"one more block there ({block_bytes / 2**20:.3g} MiB in all layers)"
        yield f"KV memory of {name} binds: {block} would save at most {worth} per layer."


def _unplaced_sentence(found: Dispatched, waiting: Unplaced) -> str:
    request = found.requests.requests[waiting.request]
    heads = found.stage.saved.heads
    blocks = -(-(request.context_tokens + request.output_tokens) // heads.block_tokens)
    needs = f"Request {waiting.id} waits: it needs {heads.head_groups} x {blocks:,} KV blocks per layer"
    missing, groups = waiting.missing, plural(waiting.missing, "head group")
    if waiting.resource is Resource.KV_BLOCKS:
        return f"{needs}, {missing:,} more than all devices together have free."
    if waiting.proved:
        return f"{needs}, which are free, but fragmented over devices: {groups} fit on no single device."
    return (
        f"{needs}, which are free, but no way was found to fit {groups} whole beside the requests before it. "
        "That is not proved: --exact settles it, given the time."
    )


_REASONS = {
    MoveReason.BALANCE: "to make the slowest device faster",
    MoveReason.MEMORY: "because their device is or will be short of KV blocks, or another move needs the room",
    MoveReason.DRAIN: "to empty a draining device",
    MoveReason.DETOUR: "via a third device, until their target has room",
}


def explain_redispatch(found: Redispatched) -> Iterator[str]:
    """Explain what limits the stage, why anything moves, when that pays off, and what remains."""
    plan, stage = found.plan, found.stage
    names = stage.snapshot.stage.devices
    yield bottleneck_sentence(stage, found.before)
    if not stage.saved.requests:
        return
    if not found.triggers:
        yield "No trigger has fired: a running stage would not search for moves."
    yield from (f"Trigger: {trigger}." for trigger in found.triggers)
    if not plan.moves:
        yield "Nothing moves: no move pays off within the expected run time of its request."
    for reason, words in _REASONS.items():
        if count := sum(move.groups for move in plan.moves if move.reason is reason):
            yield f"{plural(count, 'head group')} {'moves' if count == 1 else 'move'} {words}."
    if plan.moves:
        saved_s = plan.makespan_before_s - plan.makespan_after_s
        per_step = f", {digits(saved_s * stage.saved.num_layers * 1e3)} ms per decode step" if saved_s > 0 else ""
        change = f"from {seconds(plan.makespan_before_s)} to {seconds(plan.makespan_after_s)} per layer{per_step}"
        yield f"The slowest device goes {change}; copying takes {seconds(_copying_s(plan))} of link time."
        if paying := [(move.payback_steps, move) for move in plan.moves if move.payback_steps is not None]:
            steps, last = max(paying, key=lambda one: one[0])
            slowest = f"The slowest move to pay off is {last.request} to {names[last.target]}"
            yield f"{slowest}: its cost is recovered after {digits(steps, 2)} decode steps."
    if plan.short_after >= 1:
        yield (
            f"{plan.short_after:,.0f} KV blocks are expected to be short or remain on draining devices; "
            f"before, they were {plan.short_before:,.0f}."
        )
    elif plan.short_before >= 1:
        yield f"{plan.short_before:,.0f} KV blocks were expected to be short or on draining devices: none remain so."
    for device, held in zip(stage.saved.devices, found.reached.groups.sum(axis=0), strict=True):
        if device.status is DeviceStatus.DRAINING and held:
            why = "those of requests with head groups in transit wait for them, the others found no room"
            yield f"{device.name} still holds {plural(int(held), 'head group')}: {why}."
    if plan.gap <= 1e-9:
        yield "No plan has a lower sum of makespan, moving and memory shortage: the plan reaches the bound."
    else:
        best = "The best plan's sum of makespan, moving and memory shortage"
        yield f"{best} is at most {could_fall(plan)} lower, proved by weak duality."
    if plan.refused:
        yield f"{plural(len(plan.refused), 'move')} that would help cannot be made; the table gives the reasons."


def _copying_s(plan: RedispatchPlan) -> float:
    return sum(move.seconds for move in plan.moves)


def could_fall(plan: RedispatchPlan) -> str:
    """Return by what share of the objective the best plan could be lower; at most 100%."""
    return percent(1.0 - plan.bound_s / plan.objective_s)


# --- dispatch as tables


MAX_ROWS = 40  # requests, moves or devices shown; -o json has all
BAR_WIDTH = 8


@as_group
def render_dispatch(found: Dispatched, explanation: tuple[str, ...] | None = None) -> Iterator[RenderableType]:
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
    yield from _ending(stage, explanation)


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


def _ending(stage: CostedStage, explanation: tuple[str, ...] | None) -> Iterator[RenderableType]:
    if (costs := costs_sentence(stage)) is not None:
        yield Text(f"\n{costs}", style="dim")
    if explanation is not None:
        yield section("Why", bullets(explanation))


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
def render_redispatch(found: Redispatched, explanation: tuple[str, ...] | None = None) -> Iterator[RenderableType]:
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
    yield from _ending(stage, explanation)


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


def dispatch_document(found: Dispatched, explanation: tuple[str, ...] | None = None) -> dict[str, Any]:
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
        **_explanation(explanation),
    )


def redispatch_document(found: Redispatched, explanation: tuple[str, ...] | None = None) -> dict[str, Any]:
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
        **_explanation(explanation),
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


def _explanation(sentences: tuple[str, ...] | None) -> dict[str, Any]:
    return {} if sentences is None else {"explanation": sentences}
