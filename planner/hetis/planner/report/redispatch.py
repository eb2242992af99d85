"""Re-dispatch as tables: triggers, moves of head groups in order, and their effect."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from hetis.planner.report.dispatch import MAX_ROWS, and_more, device_table, facts_table, per_layer, plain_table
from hetis.planner.report.dispatch_words import costs_sentence, could_fall
from hetis.planner.report.figures import digits, percent, plural, seconds
from hetis.planner.report.plan import bullets, section
from hetis.planner.use_cases.dispatch import Redispatched


def render_redispatch(found: Redispatched, explanation: tuple[str, ...] | None = None) -> RenderableType:
    """Return the table view, at most 80 columns wide if the names allow it."""
    return Group(*_sections(found, explanation))


def _sections(found: Redispatched, explanation: tuple[str, ...] | None) -> Iterator[RenderableType]:
    plan, stage = found.plan, found.stage
    moving = plural(len(plan.moves), "move") if plan.moves else "nothing moves"
    yield Text.assemble(
        (stage.saved.name, "bold"),
        f": {moving} among {plural(len(stage.saved.requests), 'running request')} "
        f"on {plural(len(stage.saved.devices), 'device')}",
    )
    yield facts_table(list(_facts(found)))
    fired = tuple(str(trigger) for trigger in found.triggers) or ("none: a running stage would not look",)
    yield section("Triggers", bullets(fired))
    if plan.moves:
        yield section("Moves, in order", _moves(found))
    if plan.refused:
        yield section("Would help, cannot be made", _refused(found))
    used = [int(count) for count in found.reached.used_blocks()]
    yield section(
        "Devices (KV blocks per layer, in use now)", device_table(stage, found.before, found.after, blocks=used)
    )
    costs = costs_sentence(stage)
    if costs is not None:
        yield Text(f"\n{costs}", style="dim")
    if explanation is not None:
        yield section("Why", bullets(explanation))


def _facts(found: Redispatched) -> Iterator[tuple[str, Text | str]]:
    plan, stage = found.plan, found.stage
    yield "Makespan", Text(per_layer(plan.makespan_after_s, stage), style="bold green")
    yield "Before", per_layer(plan.makespan_before_s, stage)
    proof = "nothing is better" if plan.gap <= 1e-9 else f"proven: the best is at most {could_fall(plan)} lower"
    yield "Objective", f"{seconds(plan.objective_s)}, the makespan with what moving and short memory cost"
    yield "Bound", f"{seconds(plan.bound_s)}  gap {percent(plan.gap)}, {proof}"
    if plan.moves:
        copying = sum(move.seconds for move in plan.moves)
        yield "Copied", f"{_size(plan.num_bytes)} of KV, {seconds(copying)} of link time"
    if max(plan.short_before, plan.short_after) >= 1:
        yield "Short", f"{plan.short_after:,.0f} KV blocks expected or draining, {plan.short_before:,.0f} before"


def _moves(found: Redispatched) -> RenderableType:
    names, moves = found.stage.snapshot.stage.devices, found.plan.moves
    table = plain_table(
        ("wave", "right"),
        ("request", "left"),
        ("groups", "right"),
        ("from → to", "left"),
        ("size", "right"),
        ("copy", "right"),
        ("pays after", "right"),
        ("why", "left"),
    )
    for move in moves[:MAX_ROWS]:
        table.add_row(
            str(move.wave + 1),
            Text(move.request),
            str(move.groups),
            Text(f"{names[move.source]} → {names[move.target]}"),
            _size(move.num_bytes),
            seconds(move.seconds),
            "" if move.payback_steps is None else f"{digits(move.payback_steps, 2)} steps",
            move.reason.value,
        )
    return table if len(moves) <= MAX_ROWS else Group(table, and_more(len(moves) - MAX_ROWS, "move"))


def _refused(found: Redispatched) -> RenderableType:
    names, refused = found.stage.snapshot.stage.devices, found.plan.refused
    lines = tuple(
        f"{one.request}, {plural(one.groups, 'group')} {names[one.source]} → {names[one.target]}: {one.why}"
        for one in refused[:MAX_ROWS]
    )
    if len(refused) <= MAX_ROWS:
        return bullets(lines)
    return Group(bullets(lines), and_more(len(refused) - MAX_ROWS, "move"))


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
