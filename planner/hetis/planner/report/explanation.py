"""The explanation of a plan: memory and time as bars, bottlenecks, prices, and why each idle GPU is idle.

Bars are readable with and without colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.blocks import Grid
from hetis.planner.report.figures import digits, percent, plural, seconds
from hetis.planner.report.plan import classes_section, headline, price_grid
from hetis.planner.report.replica import device_table, replica_name
from hetis.planner.report.tables import Unbroken, as_group, bullets, drawn, grid, section
from hetis.planner.use_cases.grouping import ReplicaGroup, abbreviate, group_replicas
from hetis.solver.placement.explanation.facts import Explanation, IdleGpus, MemoryBar, StageTime
from hetis.solver.plan import Plan, ReplicaPlan, parallel_sizes
from hetis.solver.queueing import Queueing

MAX_SHAPES = 6
SELDOM = 1e-4  # share of requests below which nobody waits for a seat
MAX_EQUAL = 12  # equal replicas whose devices are named
PRICES_MEAN = (
    "The marginal price is what one GPU of the class adds if fractions of replicas are allowed. 0 means that "
    "the class is not scarce then, not that its GPUs are useless. One more GPU may add more than that if it makes room "
    "for a larger replica, or nothing."
)
UNKNOWN_PRICES = "The tenants' shares were found without prices: what a GPU is worth to them is unknown."
WIRE_MEANS = (
    "(wire): time to send or receive the KV of a request, which overlaps with computing and is not in the "
    "sum; wait: the part that exceeds the computing time."
)
BAR_WIDTH = 30


@as_group
def render_explanation(
    plan: Plan, explanation: Explanation, waits: Queueing | None = None, *, wide: bool = False
) -> Iterator[RenderableType]:
    """Yield the view of ``hetis-plan explain``, at most 80 columns wide.

    ``waits`` are those of requests (None: not known). ``wide`` shows every shape of replica, and the devices of every
    replica.
    """
    yield headline(plan)
    groups = group_replicas(plan.replicas)
    shown = len(groups) if wide else MAX_SHAPES
    for group in groups[:shown]:
        yield from _replica(group, explanation)
        if len(group.numbers) > 1:
            yield section("Their devices", Group(*_equal_devices(group, plan, wide=wide)))
    if len(groups) > shown:
        yield Text(f"\n… and {plural(len(groups) - shown, 'more shape')} (-o wide has all)", style="dim")
    if waits is not None:
        yield section("Queueing", Text(_queueing(waits)))
    yield from classes_section(plan)
    if explanation.kv_routes:
        yield section("Prefill to decode", bullets(explanation.kv_routes))
    if plan.prices:
        mean = PRICES_MEAN if plan.has_prices() else UNKNOWN_PRICES
        yield section("Value of a GPU of each class", Group(drawn(price_grid(plan)), Text(mean, style="dim")))
    if explanation.idle:
        yield section("Idle GPUs", _idle(explanation.idle))
    yield section("Attention workers", Text(explanation.attention_workers))
    if plan.notes:
        yield section("Notes", bullets(plan.notes))
    yield section("Family: the plans for which the bound holds", Text(plan.family))


def _queueing(waits: Queueing) -> str:
    """Return the waits by the queue model in a sentence."""
    at = f"By a queue model, at {digits(waits.rate_rps, 4)} requests/s"
    if not math.isfinite(waits.ttft_p95_s):
        return f"{at} requests queue up without end."
    seats = f"{percent(waits.must_wait)} of the requests find none of {plural(waits.seats, 'seat')} free"
    if waits.must_wait < SELDOM:
        seats = f"a request finds one of {plural(waits.seats, 'seat')} free"
    longest = f"seats {seconds(waits.seat_p95_s)}, for other prompts {seconds(waits.lane_p95_s)}"
    return f"{at} {seats}; the p95 wait for {longest}; p95 TTFT {seconds(waits.ttft_p95_s)}."


def _equal_devices(group: ReplicaGroup, plan: Plan, *, wide: bool) -> Iterator[RenderableType]:
    shown = group.numbers if wide else group.numbers[:MAX_EQUAL]
    yield device_table(replace(group, numbers=shown), plan)
    if rest := len(group.numbers) - len(shown):
        yield Text(f"… and those of {plural(rest, 'more replica')} (-o wide has all)", style="dim")


def _replica(group: ReplicaGroup, explanation: Explanation) -> Iterator[RenderableType]:
    number, count = group.numbers[0], len(group.numbers)
    name = replica_name(number, group.first.role) + ("" if count == 1 else f" and {count - 1:,} like it")
    if (sentence := explained_bottlenecks(explanation).get(number)) is not None:
        yield section(name, Text(sentence))
    if memory := [part for part in explanation.memory if part.replica == number]:
        yield section(f"{name}: memory of one GPU", _memory(memory, group.first))
    if times := [part for part in explanation.stage_times if part.replica == number]:
        yield section(f"{name}: time of one request", _times(times, group.first))


def explained_bottlenecks(explanation: Explanation) -> dict[int, str]:
    """Return the sentence on each explained replica, the first of its shape, by its number, without its name."""
    explained = dict.fromkeys(part.replica for part in explanation.stage_times)
    sentences = (sentence.partition(": ")[2] for sentence in explanation.bottlenecks)
    return dict(zip(explained, sentences, strict=False))


def _memory(parts: list[MemoryBar], replica: ReplicaPlan) -> RenderableType:
    rows = (
        (
            f"{part.stage + 1}{'└' if part.role != 'primary' else ''}",
            Text(part.gpu),
            f"×{part.num_devices}",
            stacked_bar(memory_shares(part), whole=part.nominal_bytes),
            Text(abbreviate(_devices(part, replica))),
        )
        for part in parts
    )
    bars = grid(False, False, False, False, True, rows=rows, gap=1)
    labels = [f"stage {part.stage + 1}" if part.role == "primary" else "└ worker" for part in parts]
    return Group(bars, legend(memory_shares(parts[0])), drawn(memory_grid(parts, labels)))


def _devices(part: MemoryBar, replica: ReplicaPlan) -> Sequence[str]:
    if part.role == "primary":
        return replica.stages[part.stage].devices
    pools = [pool for pool in replica.attention_workers if pool.stage == part.stage and pool.gpu == part.gpu]
    return [device for pool in pools for device in pool.devices]


def memory_grid(parts: Sequence[MemoryBar], labels: Sequence[str]) -> Grid:
    """Return what takes the memory of one GPU of each part, in GiB."""
    amounts = [[share.amount for share in memory_shares(part)] for part in parts]
    return Grid(
        title="All stages, in GiB",
        columns=("'GiB", *(share.name for share in memory_shares(parts[0])), "free", "nominal"),
        rows=[
            (label, *(f"{size / 2**30:.1f}" for size in (*taken, part.free_bytes, part.nominal_bytes)))
            for label, taken, part in zip(labels, amounts, parts, strict=True)
        ],
        least=("nominal", "engine", "unusable", "activations", "weights"),
        folded=True,
    )


def memory_shares(part: MemoryBar) -> list[Share]:
    return [
        Share("unusable", part.unusable_bytes, "×", "bright_black"),
        Share("engine", part.reserve_bytes, "░", "red"),
        Share("weights", part.weight_bytes, "█", "cyan"),
        Share("KV", part.kv_bytes, "▒", "green"),
        Share("activations", part.activation_bytes, "▓", "yellow"),
    ]


def _times(parts: list[StageTime], replica: ReplicaPlan) -> RenderableType:
    slowest = max(part.total_s / part.copies for part in parts)
    rows = (
        (
            f"{part.stage + 1}",
            Text(f"{part.gpu} {parallel_sizes(part.tp, part.copies, shares_experts=replica.expert_parallel)}"),
            stacked_bar(time_shares(part), whole=slowest * part.copies),
            Text(seconds(part.total_s / part.copies)),
            Text("bottleneck" if part.is_bottleneck else percent(part.total_s / part.copies / slowest), style="dim"),
        )
        for part in parts
    )
    bars = grid(False, True, False, False, False, rows=rows, gap=1)
    means = [Text(WIRE_MEANS, style="dim")] if any(part.kv_wire_s for part in parts) else []
    return Group(bars, legend(time_shares(parts[0])), drawn(_time_grid(parts)), *means)


def _time_grid(parts: list[StageTime]) -> Grid:
    """Return each part's share of the stage's own time in per cent; columns empty for all stages are left out."""
    amounts = [{one.name: one.amount for one in time_shares(part)} | {"(wire)": part.kv_wire_s} for part in parts]
    names = [name for name in amounts[0] if any(of.get(name, 0.0) > 0 for of in amounts)]
    return Grid(
        columns=("'% of stage", *names),
        rows=[
            (f"stage {part.stage + 1}", *(f"{100 * of.get(name, 0.0) / part.total_s:.1f}" for name in names))
            for part, of in zip(parts, amounts, strict=True)
        ],
        least=("(wire)", "other", "head", "wait", "transfer", "all-reduce"),
    )


def time_shares(part: StageTime) -> list[Share]:
    return [
        Share("dense", part.dense_s, "█", "cyan"),
        Share("all-reduce", part.all_reduce_s, "▒", "red"),
        Share("prefill att.", part.prefill_attention_s, "▓", "yellow"),
        Share("decode att.", part.decode_attention_s, "░", "green"),
        Share("transfer", part.transfer_s, "=", "magenta"),
        Share("head", part.head_s, "+", "blue"),
        Share("other", part.other_s, "-", "bright_black"),
        *([Share("wait", part.kv_wait_s, "~", "bright_red")] if part.kv_wire_s else []),
    ]


def _idle(groups: tuple[IdleGpus, ...]) -> Table:
    several = len({idle.zone for idle in groups}) > 1
    return bullets(Text.assemble((idle_name(idle, several=several), "bold"), f": {idle.reason}") for idle in groups)


def idle_name(idle: IdleGpus, *, several: bool) -> str:
    """Return ``4 × L4``, with the zone if there are ``several``."""
    return f"{idle.count:,} × {idle.gpu}{f' in {idle.zone}' if several else ''}"


class Share(NamedTuple):
    """One part of a stacked bar: an amount, and how it is drawn."""

    name: str
    amount: float
    glyph: str
    style: str


def stacked_bar(shares: Sequence[Share], *, whole: float) -> Text:
    """Draw parts side by side in `BAR_WIDTH` characters, which stand for ``whole``; the rest is a dotted line."""
    text, drawn, total = Text(), 0, 0.0
    for share in shares:
        total += share.amount
        end = min(BAR_WIDTH, round(BAR_WIDTH * total / whole)) if whole > 0 else 0
        text.append(share.glyph * (end - drawn), style=share.style)
        drawn = max(drawn, end)
    text.append("·" * (BAR_WIDTH - drawn), style="dim")
    return text


def legend(shares: Sequence[Share]) -> Unbroken:
    return Unbroken([Text.assemble((f"{s.glyph} ", s.style), (s.name, "dim")) for s in shares], "  ")
