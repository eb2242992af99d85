"""What else was tried beside a plan, in tables that the terminal and the page share: rungs, classes, and runners-up."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from rich.text import Text

from hetis.planner.report.blocks import Cell, Column, Grid, grid_of
from hetis.planner.report.figures import digits, percent, percent_at_least, plural, seconds, with_unit
from hetis.planner.use_cases.record.forms import LITTLE_LEFT, RungFound
from hetis.planner.use_cases.record.parts import Classes, Requested, Rungs, Surviving
from hetis.solver.placement.rungs import RUNGS
from hetis.solver.plan import Plan, RunnerUp

# --- rungs: what the best plan of each reaches, and what the next rung would buy and cost


FEW = 3  # targets that are named on a terminal


def rung_grid(plan: Plan, *, on_page: bool = False) -> Grid | None:
    """Return a line for each rung, and one on the next; None: rungs were not climbed.

    ``on_page`` adds what a terminal has no room for: bounds, nodes, and all targets.
    """
    found = Rungs.of(plan).found
    chosen = next((number for number, one in enumerate(found) if one.is_chosen), None)
    if chosen is None:
        return None

    def name(one: RungFound) -> str:
        if on_page:
            return f"{one.name}, the plan" if one.is_chosen else one.name
        return f"{'▸' if one.is_chosen else ' '} {one.name}"

    def rate(one: RungFound) -> Cell:
        words = _nothing_new(one, found)
        return Text(words, style="dim") if words else digits(one.rate_rps or 0.0, 4)

    def left(one: RungFound) -> Text:
        return Text(percent_at_least(one.left_share), style="red" if one.left_share < LITTLE_LEFT else "")

    def if_new(head: str, cell: Callable[[RungFound], Cell]) -> Column[RungFound]:
        return head, lambda one: "" if _nothing_new(one, found) else cell(one)

    return grid_of(
        found,
        ("'rung", name),
        ("requests/s", rate),
        if_new("at most", lambda one: "" if one.bound is None else digits(one.bound, 4)) if on_page else None,
        if_new("USD/h", lambda one: "unknown" if one.usd_per_hour is None else digits(one.usd_per_hour)),
        if_new("GPUs", lambda one: f"{one.gpus:,}"),
        if_new("left after a loss", left),
        if_new("nodes per replica", lambda one: "" if one.nodes is None else f"{one.nodes}") if on_page else None,
        if_new("shapes", lambda one: f"{one.shapes:,}"),
        if_new("'carried by", lambda one: _targets(one, len(one.targets or ()) if on_page else FEW)),
        title="Rungs of complexity",
        intro="The best plan of each: replicas in one node, layers over nodes, prefill and decode apart, workers.",
        note=other_rungs(found, plan),
        strong=chosen,
        bad=[
            n
            for n, one in enumerate(found)
            if n != chosen and not _nothing_new(one, found) and one.left_share < LITTLE_LEFT
        ],
        least=("shapes", "USD/h", "carried by"),
    )


def _nothing_new(one: RungFound, found: Sequence[RungFound]) -> str:
    """Return why a rung has no plan of its own; empty: it has."""
    if one.value is None:
        return "none"
    lower = next((other for other in found if other.name == one.of), one)
    return "" if lower is one or lower.value is None else "the same"


def _targets(one: RungFound, most: int) -> str:
    if one.targets is None:
        return "unknown"
    if len(one.targets) > most:
        return plural(len(one.targets), "export")
    return ", ".join(one.targets) or "no export"


def other_rungs(found: Sequence[RungFound], plan: Plan) -> str:
    """Return what the next rung with a better plan would buy and cost, and what the next simpler one would."""
    names = [one.name for one in found]
    mine = next(one for one in found if one.is_chosen)
    own, at = [one for one in found if one.value is not None and one.of == one.name], names.index(mine.name)
    above = next((one for one in own if names.index(one.name) > at), None)
    below = next((one for one in reversed(own) if names.index(one.name) < at and one.name != mine.of), None)
    return "\n".join(_other_rung(mine, other, plan) for other in (above, below) if other is not None and mine.value)


def _other_rung(mine: RungFound, other: RungFound, plan: Plan) -> str:
    rung, unit, value, own = RUNGS[other.name], plan.result.unit, other.value or 0.0, mine.value or 0.0
    if plan.objective.maximises:
        gain = f"{abs(value / own - 1.0):.1%} {'more' if value > own else 'fewer'} {unit}"
    else:
        gain = f"{with_unit(value, unit)} instead of {digits(own, 4)}"
    over = f", up to {plural(other.nodes, 'node')} each" if other.nodes and other.nodes > 1 else ""
    left = f"{percent_at_least(other.left_share)} left after a loss, instead of {percent_at_least(mine.left_share)}"
    return f"--rung {other.name}: {gain} with {rung.summary}{over}; {left}; needs {rung.needs}"


def survival_words(plan: Plan) -> str | None:
    """Return what is left after the loss that a plan had to survive, with the bound; None: there was none."""
    found, place = Surviving.of(plan), Requested.of(plan).survive
    if found.left_rps is None:
        return None
    left = f"{digits(found.left_rps, 4)} requests/s are left after losing any one {place}"
    if found.bound_rps is not None:
        return f"{left}; no plan leaves more than {digits(found.bound_rps, 4)}"
    return left if found.keep is None else f"{left}, at least {percent(found.keep)} of all"


# --- pools of classes of requests: what they keep beside a plan without, and which class gains or pays


def class_grids(plan: Plan) -> list[Grid]:
    """Return tables of what a plan keeps with classes and without, and of which class gains; none: none were tried."""
    found = Classes.of(plan)
    if not found.cut:
        return []
    kept = grid_of(
        found.kept,
        (f"'{_what_is_kept(plan)}", lambda one: one.traffic),
        ("without classes", lambda one: digits(one.without_rps, 4)),
        ("with", lambda one: digits(one.with_rps, 4)),
        ("gain", lambda one: f"{one.with_rps / one.without_rps - 1.0:+.1%}" if one.without_rps else "all"),
        title="Classes of requests",
        intro=_used(found),
    )
    if not found.ttft:
        return [kept]
    latencies = grid_of(
        found.ttft,
        ("'class", lambda one: one.name),
        ("prompts up to", lambda one: "any" if one.max_prompt_tokens is None else f"{one.max_prompt_tokens:,}"),
        ("requests", lambda one: percent(one.share)),
        ("limit", lambda one: "none" if one.limit_s is None else seconds(one.limit_s)),
        ("without classes", lambda one: "never" if one.without_s is None else seconds(one.without_s)),
        ("with", lambda one: "never" if one.with_s is None else seconds(one.with_s)),
        ("'who", lambda one: "" if None in (one.without_s, one.with_s) else "pays" if one.pays else "gains"),
        title="Who gains and who pays",
        intro=f"p95 TTFT of each class, in both plans at {digits(found.ttft[0].rate_rps, 4)} requests/s",
        least=("requests",),
    )
    return [kept, latencies]


def _what_is_kept(plan: Plan) -> str:
    if Surviving.of(plan).bound_rps is None:
        return "kept in simulation"
    return f"left of it without any one {Requested.of(plan).survive}"


def _used(found: Classes) -> str:
    """Return whether pools of classes are used, and the value and bound of plans with them, or why not."""
    if found.why_not or found.value is None:
        return f"not used: cut at {found.cut}; {found.why_not}"
    bound = "" if found.bound is None else f", no plan with them more than {digits(found.bound, 4)}"
    return f"used: cut at {found.cut}; by the model {digits(found.value, 4)}{bound}"


# --- replicas that were not chosen


def runners_up_grid(plan: Plan) -> Grid:
    """Return the closest alternatives in words, each with its saturated rate."""
    return grid_of(
        distinct_runners_up(plan),
        ("'a replica of", lambda one: shape_words(one.shape)),
        ("rate /s", lambda one: digits(one.rate)),
        ("'why not", lambda one: reason_words(one.reason, one.rate)),
        title="Not chosen",
    )


_STAGE = re.compile(
    r"(?P<gpu>\S+) TP(?P<tp>\d+) x(?P<copies>\d+)(?P<shared> EP\d+)? L(?P<layers>\d+)"
    r"(?: \(\+(?P<workers>.+) attention workers\))?"
)
_WORTH = re.compile(
    r"its GPUs are worth (?P<worth>[\d.]+) requests/s elsewhere(?:, its (?P<role>\w+) work (?P<own>[\d.]+))?"
)


def distinct_runners_up(plan: Plan) -> list[RunnerUp]:
    """Return the runners-up, those once that differ only in their zones or nodes."""
    return list({(one.shape, digits(one.rate), one.reason): one for one in plan.runners_up}.values())


def shape_words(shape: str) -> str:
    """Return ``decode: L4 TP4 x1 L20 | H100 TP2 x2 L60`` in words, or unchanged if it cannot be parsed."""
    role, colon, stages = shape.rpartition(": ")
    found = [_STAGE.fullmatch(stage) for stage in stages.split(" | ")]
    if not all(found):
        return _folded(shape)
    runs = itertools.groupby((match for match in found if match is not None), key=re.Match[str].group)
    words = ", then ".join(_stage_words(next(equal), 1 + len(list(equal))) for _, equal in runs)
    return f"{role} only: {words}" if colon else words


def _stage_words(match: re.Match[str], count: int) -> str:
    """Return ``2 stages of 20 layers, each on 4 × L4 in TP4`` for that many equal stages."""
    tp, copies, gpu = int(match["tp"]), int(match["copies"]), match["gpu"]
    cards = f"one {gpu}" if tp == 1 else f"{tp} × {gpu} in TP{tp}"
    layers = plural(int(match["layers"]), "layer")
    text = f"{layers} on {cards}" if count == 1 else f"{count} stages of {layers}, each on {cards}"
    text += f" ({copies} copies{' that share experts' if match['shared'] else ''})" if copies > 1 else ""
    return text + (f" with {match['workers']} as attention workers" if match["workers"] else "")


def reason_words(reason: str, rate: float) -> str:
    """Return why a runner-up was not chosen.

    If its GPUs are worth more elsewhere, that is by how much it is worse; any other reason is returned unchanged.
    """
    match = _WORTH.fullmatch(reason)
    if match is None or not float(match["worth"]) > 0:
        return reason
    elsewhere = float(match["worth"])
    if match["role"]:
        verb = "serve" if match["role"] == "own" else match["role"]
        own = f"what it would {verb} is worth {digits(float(match['own']))} there"
        return f"as they are used in the plan its GPUs serve {digits(elsewhere)} requests/s; {own}"
    return f"{percent(1.0 - rate / elsewhere)} less than the {digits(elsewhere)} requests/s its GPUs serve in the plan"


def _folded(shape: str) -> str:
    """Merge consecutive equal stages: ``A | A | B`` becomes ``2 × A | B``."""
    runs = [(stage, len(list(equal))) for stage, equal in itertools.groupby(shape.split(" | "))]
    return " | ".join(stage if count == 1 else f"{count} × {stage}" for stage, count in runs)
