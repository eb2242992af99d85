"""Dispatch as tables: the placement of new requests, its effect on every device, and waiting requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.dispatch_words import PATHS, costs_sentence
from hetis.planner.report.figures import bar, digits, percent, plural, seconds
from hetis.planner.report.plan import bullets, section
from hetis.planner.use_cases.dispatch import Dispatched
from hetis.planner.use_cases.stage_sources import LoadedStage
from hetis.planner.use_cases.stage_times import StageTimes, expected_blocks

MAX_ROWS = 40  # requests, moves or devices shown; -o json has all
BAR_WIDTH = 8


def render_dispatch(found: Dispatched, explanation: tuple[str, ...] | None = None) -> RenderableType:
    """Return the table view, at most 80 columns wide if the names allow it."""
    return Group(*_sections(found, explanation))


def facts_table(rows: Sequence[tuple[str, Text | str]]) -> Table:
    """Return a table of facts about the decision and its quality, one per line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def plain_table(*columns: tuple[str, str]) -> Table:
    """Return a table without lines; every column is ``(name, left or right)``."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table


def device_table(
    stage: LoadedStage,
    before: StageTimes,
    after: StageTimes,
    *,
    blocks: Sequence[int],
    last: tuple[str, Sequence[str]] | None = None,
) -> RenderableType:
    """Return times before and after with a bar, KV blocks of each device, and optionally a column of the caller's."""
    title, cells = last or ("", ())
    columns = [("device", "left"), ("before", "right"), ("after", "right"), ("", "left"), ("KV blocks", "right")]
    table = plain_table(*columns, *([(title, "right")] if last else []))
    makespan_s = after.makespan_s
    shown = stage.saved.devices[:MAX_ROWS]
    for i, device in enumerate(shown):
        time_s = after.devices[i].seconds
        total = device.total_blocks
        share = f" {blocks[i] / total:>4.0%}" if total else ""
        name = Text(device.name)
        if device.status.value != "ok":
            name.append(f" {device.status.value}", style="yellow")
        table.add_row(
            name,
            seconds(before.devices[i].seconds),
            seconds(time_s),
            Text(bar(time_s / makespan_s if makespan_s else 0.0, BAR_WIDTH), style="green"),
            f"{blocks[i]:,}/{total:,}{share}",
            *([cells[i]] if last else []),
        )
    if after.card_s:
        share_s = after.card_s / makespan_s if makespan_s else 0.0
        table.add_row(
            Text("network card", style="dim"),
            seconds(before.card_s),
            seconds(after.card_s),
            Text(bar(share_s, BAR_WIDTH), style="green"),
        )
    if len(stage.saved.devices) <= MAX_ROWS:
        return table
    return Group(table, and_more(len(stage.saved.devices) - MAX_ROWS, "device"))


def and_more(count: int, noun: str) -> Text:
    """Return a line about rows that are not shown."""
    return Text(f"… and {count:,} more {noun}{'' if count == 1 else 's'} (-o json has all)", style="dim")


def per_layer(value_s: float, stage: LoadedStage) -> str:
    """Return the time of one layer, and of a decode step through all layers of the stage."""
    layers = stage.saved.num_layers
    return f"{seconds(value_s)} per layer, {seconds(value_s * layers)} per step of {plural(layers, 'layer')}"


def _sections(found: Dispatched, explanation: tuple[str, ...] | None) -> Iterator[RenderableType]:
    plan, stage = found.plan, found.stage
    num, placed = len(found.requests.requests), len(found.requests.requests) - len(plan.unplaced)
    yield Text.assemble(
        (stage.saved.name, "bold"),
        f": {placed} of {plural(num, 'new request')} placed on {plural(len(stage.saved.devices), 'device')}",
    )
    yield facts_table(list(_facts(found)))
    if num:
        yield section("Head groups", _requests(found))
    if plan.unplaced:
        yield section("Waiting", bullets(tuple(str(one) for one in plan.unplaced[:MAX_ROWS])))
    expected = [int(blocks) for blocks in expected_blocks(found.reached)]
    worth = [_worth(float(price)) for price in plan.prices.block_s]
    title = ("a block saves", worth) if any(plan.prices.block_s > 0) else None
    table = device_table(stage, found.before, found.after, blocks=expected, last=title)
    yield section("Devices (KV blocks per layer, expected growth included)", table)
    costs = costs_sentence(stage)
    if costs is not None:
        yield Text(f"\n{costs}", style="dim")
    if explanation is not None:
        yield section("Why", bullets(explanation))


def _facts(found: Dispatched) -> Iterator[tuple[str, Text | str]]:
    plan = found.plan
    yield "Makespan", Text(per_layer(plan.makespan_s, found.stage), style="bold green")
    yield "Before", per_layer(found.before.makespan_s, found.stage)
    proof = "nothing is faster" if plan.gap <= 1e-9 else f"proven: nothing is over {percent(plan.gap)} faster"
    yield "Bound", f"{seconds(plan.bound_s)}  gap {percent(plan.gap)}, {proof}"
    yield "Path", f"{plan.path.value}: {PATHS[plan.path]}"


def _requests(found: Dispatched) -> RenderableType:
    names = found.stage.snapshot.stage.devices
    table = plain_table(("request", "left"), ("context", "right"), ("output", "right"), ("groups on", "left"))
    requests = found.requests.requests
    for j, request in enumerate(requests[:MAX_ROWS]):
        row = found.plan.groups[j]
        where = " · ".join(f"{names[i]} {row[i]}" for i in row.nonzero()[0])
        home = Text(where) if where else Text("waits", style="yellow")
        table.add_row(Text(request.id), f"{request.context_tokens:,}", f"{request.output_tokens:,}", home)
    if len(requests) <= MAX_ROWS:
        return table
    return Group(table, and_more(len(requests) - MAX_ROWS, "request"))


def _worth(price_s: float) -> str:
    return f"≤ {digits(price_s * 1e9)} ns" if price_s > 0 else "0"
