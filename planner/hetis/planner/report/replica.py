"""One replica of a plan, or a group of equal ones: its pipeline drawn to scale, and the devices of every stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.engines.planned import planned_model
from hetis.formats.errors import DocumentError
from hetis.planner.report.figures import digits, plural, seconds, tokens
from hetis.planner.report.tables import table, table_of
from hetis.planner.use_cases.grouping import ReplicaGroup, abbreviate
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, ReplicaPlan, Role, StagePlan

PICTURE_WIDTH = 78
MIN_STAGE_WIDTH = 4  # room for a two-digit stage number
_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")


def palette_of(plan: Plan) -> Mapping[str, str]:
    """Return colours for the GPU types of a plan, in the order of its device classes."""
    gpus = [price.gpu for price in plan.prices]
    gpus += [stage.gpu for replica in plan.replicas for stage in replica.stages]
    gpus += [pool.gpu for replica in plan.replicas for pool in replica.attention_workers]
    return {gpu: _COLORS[i % len(_COLORS)] for i, gpu in enumerate(dict.fromkeys(gpus))}


def device_table(group: ReplicaGroup, plan: Plan) -> RenderableType:
    """Return the GPUs of each of several equal replicas: those of its stages, and its attention workers."""
    has_workers = any(replica.attention_workers for replica in plan.replicas)
    return table_of(
        group.numbers,
        ("'replica", str),
        ("'devices", lambda number: " | ".join(abbreviate(stage.devices) for stage in plan.replicas[number].stages)),
        ("'attention workers", lambda number: abbreviate(plan.replicas[number].worker_devices()))
        if has_workers
        else None,
    )


def replica_name(number: int, role: Role) -> str:
    """Return a replica's name as ``Replica 0``, ``Replica 3 (decode)``."""
    return f"Replica {number}" if role is Role.UNIFIED else f"Replica {number} ({role})"


def known_model(plan: Plan) -> ModelSpec | None:
    """Return the model of a plan, or None if the plan does not contain it."""
    try:
        return planned_model(plan)
    except DocumentError:
        return None


def unit_of_room(plan: Plan) -> str:
    """Return what KV room counts; where layers keep KV of windows alone, more tokens fit than it says."""
    model = known_model(plan)
    return "tokens" if model is None or model.cached_growth(math.inf) == 1.0 else "tokens in every layer"


def replica_headline(group: ReplicaGroup, unit: str) -> Text:
    """Return rate and settings in two lines and, if there are several zones, those to which KV may go in a third."""
    replica, count = group.first, len(group.numbers)
    name = f"Replica {group.numbers[0]}" if count == 1 else f"{count:,} equal replicas"
    each = "" if count == 1 else f" each, {digits(group.rate, 4)} together"
    role = "" if replica.role is Role.UNIFIED else (f" {replica.role}" if count == 1 else f", {replica.role}")
    serves = f" for {' and '.join(replica.classes)} requests" if replica.classes else ""
    return Text.assemble(
        (f"\n{name}", "bold"),
        (role + serves, "bold magenta"),
        f"  {digits(replica.rate, 4)} requests/s saturated{each} · room for {tokens(replica.kv_tokens)} {unit}\n",
        f" {_latencies(replica)} · {_in_flight(replica)}",
        f"\n sends KV to {', '.join(replica.kv_zones)}" if len(replica.kv_zones) > 1 else "",
    )


def _latencies(replica: ReplicaPlan) -> str:
    """Return the latencies that apply to the replica's role."""
    ttft, tpot = f"TTFT {seconds(replica.ttft_s)}", f"TPOT {seconds(replica.tpot_s)}"
    by_role = {Role.PREFILL: f"{ttft} until the KV arrives", Role.DECODE: tpot}
    return by_role.get(replica.role, f"{ttft} · {tpot}")


def _in_flight(replica: ReplicaPlan) -> str:
    chunks = f"chunks of {replica.chunk_tokens}"
    if replica.role is Role.PREFILL:
        return f"{plural(replica.in_flight, 'prompt')} in flight · {chunks}"
    size, count = replica.micro_batch, replica.in_flight
    chunks = chunks if replica.seats == replica.planned_seats else f"up to {replica.seats} at once · {chunks}"
    decoding = f"{size * count} decoding = {size} × {count} in flight"
    return decoding if replica.role is Role.DECODE else f"{decoding} · {chunks}"


def picture(replica: ReplicaPlan, palette: Mapping[str, str]) -> RenderableType:
    """Return the layers from left to right, with stages in proportion and layer numbers below."""
    widths = _widths([stage.num_layers for stage in replica.stages])
    if widths is None:
        return Text(f"{len(replica.stages)} stages, too many to draw", style="dim")
    line, ruler = Text("┃"), "0"
    for number, (stage, width) in enumerate(zip(replica.stages, widths, strict=True), start=1):
        label = _label(number, stage, replica.parallel_sizes(stage), width - 1)
        line.append(label.center(width - 1, "━"), style=palette[stage.gpu])
        line.append("┃")
        tick = str(stage.first_layer + stage.num_layers)
        ruler = ruler.ljust(len(line) - 1)
        if not ruler or ruler[-1] == " ":  # omit a tick that would overlap the previous one
            ruler = ruler[: len(line) - len(tick)] + tick if number == len(replica.stages) else ruler + tick
    return Group(line, Text(ruler, style="dim"))


def _label(number: int, stage: StagePlan, shape: str, width: int) -> str:
    """Return the longest description of a stage that leaves room for a dash on each side."""
    for label in (f" {number} {stage.gpu} {shape} ", f" {number} {stage.gpu} ", f" {number} ", f"{number}"):
        if len(label) <= width - 2 or label == f"{number}":
            return label
    raise AssertionError("unreachable")


def _widths(layers: list[int]) -> list[int] | None:
    """Return each stage's width in characters with its right border, or None if even the minimum does not fit."""
    room = PICTURE_WIDTH - 1 - MIN_STAGE_WIDTH * len(layers)
    if room < 0:
        return None
    ends = [round(room * sum(layers[: i + 1]) / sum(layers)) for i in range(len(layers))]
    return [MIN_STAGE_WIDTH + end - start for start, end in zip([0, *ends], ends, strict=False)]


def stage_table(group: ReplicaGroup, palette: Mapping[str, str]) -> Table:
    devices = "devices" if len(group.numbers) == 1 else f"devices of replica {group.numbers[0]}"
    rows: Iterator[list[str | Text]] = (
        [str(number or "└"), Text(gpu, palette[gpu]), *cells] for number, gpu, *cells in stage_rows(group.first)
    )
    return table("#", "<GPU", "<shape", "<layers", "<KV heads", f"'{devices}", rows=rows)


def stage_rows(replica: ReplicaPlan) -> Iterator[tuple[int | None, str, str, str, str, str]]:
    """Yield the number (from 1), GPU, shape, layers, KV heads and devices of every stage.

    Each stage is followed by its attention workers, which have no number.
    """
    for number, stage in enumerate(replica.stages):
        pools = [pool for pool in replica.attention_workers if pool.stage == number]
        groups = stage.kv_head_groups_kept + sum(pool.kv_head_groups for pool in pools)
        layers = f"{stage.first_layer}–{stage.first_layer + stage.num_layers - 1} ({stage.num_layers})"
        kept = f"{stage.kv_head_groups_kept} of {groups}" if pools else "all"
        yield number + 1, stage.gpu, replica.parallel_sizes(stage), layers, kept, abbreviate(stage.devices)
        for pool in pools:
            cards = f"×{len(pool.devices)}{' shared' if pool.shared else ''}"
            yield None, pool.gpu, cards, "attention", f"{pool.kv_head_groups} of {groups}", abbreviate(pool.devices)
