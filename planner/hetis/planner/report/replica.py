"""One replica, or a group of equal ones: its pipeline drawn to scale and the devices of every stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hetis.planner.report.figures import digits, plural, seconds, tokens
from hetis.planner.use_cases.grouping import ReplicaGroup, abbreviate
from hetis.solver.plan import AttentionWorkerPool, Plan, ReplicaPlan, Role, StagePlan

_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """Colours by GPU type; unknown types are drawn plainly."""

    colors: Mapping[str, str]

    @classmethod
    def of(cls, plan: Plan) -> Palette:
        """Return colours for the GPU types of a plan, in the order of its device classes."""
        gpus = [price.gpu for price in plan.prices]
        gpus += [stage.gpu for replica in plan.replicas for stage in replica.stages]
        distinct = dict.fromkeys(gpus)
        return cls(colors={gpu: _COLORS[i % len(_COLORS)] for i, gpu in enumerate(distinct)})

    def __getitem__(self, gpu: str) -> str:
        return self.colors.get(gpu, "default")


PICTURE_WIDTH = 78
MIN_STAGE_WIDTH = 4  # enough for a two-digit stage number


def render_replica(group: ReplicaGroup, palette: Palette) -> RenderableType:
    """Return headline, picture and stage table of a group of equal replicas."""
    return Group(
        _headline(group), Padding(Group(_picture(group.first, palette), _stages(group, palette)), (0, 0, 0, 1))
    )


def device_table(group: ReplicaGroup, plan: Plan) -> Table:
    """Return the GPUs of each of several equal replicas: those of its stages, and its attention workers."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    workers = any(replica.attention_workers for replica in plan.replicas)
    for name in ("replica", "devices", *(["attention workers"] if workers else [])):
        table.add_column(name, overflow="fold")
    for number in group.numbers:
        replica = plan.replicas[number]
        stages = " | ".join(abbreviate(stage.devices) for stage in replica.stages)
        table.add_row(str(number), stages, *([abbreviate(replica.worker_devices())] if workers else []))
    return table


def _headline(group: ReplicaGroup) -> Text:
    """Return rate and settings in two lines, and in a third the zones to which KV may go if there are several."""
    replica, count = group.first, len(group.numbers)
    name = f"Replica {group.numbers[0]}" if count == 1 else f"{count:,} equal replicas"
    each = "" if count == 1 else f" each, {digits(group.rate, 4)} together"
    role = "" if replica.role is Role.UNIFIED else (f" {replica.role}" if count == 1 else f", {replica.role}")
    return Text.assemble(
        (f"\n{name}", "bold"),
        (role, "bold magenta"),
        f"  {digits(replica.rate, 4)} requests/s saturated{each} · room for {tokens(replica.kv_tokens)} tokens\n",
        f" {_latencies(replica)} · {_in_flight(replica)}{_kv_zones(replica)}",
    )


def _latencies(replica: ReplicaPlan) -> str:
    """Return the latencies that the role has."""
    ttft, tpot = f"TTFT {seconds(replica.ttft_s)}", f"TPOT {seconds(replica.tpot_s)}"
    match replica.role:
        case Role.PREFILL:
            return f"{ttft} until the KV is there"
        case Role.DECODE:
            return tpot
    return f"{ttft} · {tpot}"


def _in_flight(replica: ReplicaPlan) -> str:
    chunks = f"chunks of {replica.chunk_tokens}"
    if replica.role is Role.PREFILL:
        return f"{plural(replica.in_flight, 'prompt')} in flight · {chunks}"
    decoding = (
        f"{replica.micro_batch * replica.in_flight} decoding = {replica.micro_batch} × {replica.in_flight} in flight"
    )
    return decoding if replica.role is Role.DECODE else f"{decoding} · {chunks}"


def _kv_zones(replica: ReplicaPlan) -> str:
    return f"\n sends KV to {', '.join(replica.kv_zones)}" if len(replica.kv_zones) > 1 else ""


def _picture(replica: ReplicaPlan, palette: Palette) -> RenderableType:
    """Return the layers from left to right, with stage widths in proportion and layer numbers below."""
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
        if not ruler or ruler[-1] == " ":  # a tick that would overlap the previous one is left out
            ruler = ruler[: len(line) - len(tick)] + tick if number == len(replica.stages) else ruler + tick
    return Group(line, Text(ruler, style="dim"))


def _label(number: int, stage: StagePlan, shape: str, width: int) -> str:
    """Return the longest description of a stage that leaves a dash on both sides."""
    for label in (f" {number} {stage.gpu} {shape} ", f" {number} {stage.gpu} ", f" {number} ", f"{number}"):
        if len(label) <= width - 2 or label == f"{number}":
            return label
    raise AssertionError("unreachable")


def _widths(layers: list[int]) -> list[int] | None:
    """Return characters per stage including its right border, or None if even the minimum does not fit."""
    room = PICTURE_WIDTH - 1 - MIN_STAGE_WIDTH * len(layers)
    if room < 0:
        return None
    ends = [round(room * sum(layers[: i + 1]) / sum(layers)) for i in range(len(layers))]
    return [MIN_STAGE_WIDTH + end - start for start, end in zip([0, *ends], ends, strict=False)]


def _stages(group: ReplicaGroup, palette: Palette) -> Table:
    replica = group.first
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("GPU", no_wrap=True, overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    table.add_column("KV heads", no_wrap=True)
    table.add_column(
        "devices" if len(group.numbers) == 1 else f"devices of replica {group.numbers[0]}", overflow="fold"
    )
    for number, stage in enumerate(replica.stages):
        pools = [pool for pool in replica.attention_workers if pool.stage == number]
        groups = stage.kv_head_groups_kept + sum(pool.kv_head_groups for pool in pools)
        last = stage.first_layer + stage.num_layers - 1
        table.add_row(
            str(number + 1),
            Text(stage.gpu, style=palette[stage.gpu]),
            replica.parallel_sizes(stage),
            f"{stage.first_layer}–{last} ({stage.num_layers})",
            "all" if not pools else f"{stage.kv_head_groups_kept} of {groups}",
            abbreviate(stage.devices),
        )
        for pool in pools:
            table.add_row(*_pool_row(pool, groups, palette))
    return table


def _pool_row(pool: AttentionWorkerPool, groups: int, palette: Palette) -> list[str | Text]:
    return [
        "└",
        Text(pool.gpu, style=palette[pool.gpu]),
        f"×{len(pool.devices)}" + (" shared" if pool.shared else ""),
        "attention",
        f"{pool.kv_head_groups} of {groups}",
        abbreviate(pool.devices),
    ]
