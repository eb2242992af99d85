"""Plans side by side (strategies or engines, two fleets, or what to buy next), as tables and documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hetis.formats.documents import to_data
from hetis.planner.report.changes import change_counts, change_fields
from hetis.planner.report.figures import digits, percent, plural, tokens, with_unit
from hetis.planner.report.goals import goal_line, problem_title
from hetis.planner.report.plan import SMALLEST_PRICE
from hetis.planner.report.promises import kept_cell
from hetis.planner.report.rungs import rung_section
from hetis.planner.report.tables import Narrowing, as_group, bullets, facts, grid, section, table
from hetis.planner.use_cases.compare import Compared, Figures, best_of, figures_of, kept_of
from hetis.planner.use_cases.grouping import gpu_counts, used_counts
from hetis.planner.use_cases.json_values import document, fields_of, json_value
from hetis.planner.use_cases.other_fleets.additions import FleetChange
from hetis.planner.use_cases.other_fleets.what_if import BuyNext, ListedOffer, Side, WhatIf
from hetis.planner.use_cases.record.parts import Requested, Verified
from hetis.planner.use_cases.service_level import DEFAULT
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.advice import ChangeVerdict, Difference, NodeShape
from hetis.solver.cluster import Link
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import Objective, ObjectiveKind, Plan

PUBLISHED_MEANS = (
    "-paper: the search of a paper as published; its plan is evaluated by this cost model under these limits; "
    "bound and gap are those of the family to which its plans belong."
)
_LINES_PER_REASON = 3
_LEAST_FIRST = ("KV", "solved", "USD/M", "bound", "TPOT", "TTFT")  # columns that a narrow console can do without
_WIDEST_GAP = 9.99  # larger gaps are shown as above it


def simulated_means(plans: Iterable[Plan]) -> str:
    """Return what the column of kept rates means, with the service levels of plans that are not held to the default."""
    levels = {str(level): None for level in (Requested.of(plan).service_level for plan in plans) if level != DEFAULT}
    for_level = f", {'; or '.join(levels)}" if levels else ""
    return (
        f"kept: the highest rate tried, up to the plan's, at which simulated traffic kept the limits{for_level}; "
        "`place` puts this rate first. All other values are from the model."
    )


@as_group
def render_comparison(compared: Sequence[Compared], inputs: Inputs, objective: Objective) -> Iterator[RenderableType]:
    yield problem_title(inputs)
    yield goal_line(inputs.applicable_limits(objective))
    if words := engine_words(compared):
        yield Text(words, style="dim")
    yield Text()
    yield _table(compared, inputs, objective)
    plans = [outcome.plan for outcome in compared if outcome.plan is not None]
    if _are_simulated(compared):
        yield Text(f"\n{simulated_means(plans)} Red: less than the plan's; none: no rate tried.", style="dim")
    elif plans and not any(Verified.of(plan).verification for plan in plans):
        yield Text(f"\n{model_words(objective)}", style="dim")
    published = dict.fromkeys(o.strategy for o in compared if STRATEGIES[o.strategy].is_published)
    if published:
        yield Text(f"\n{PUBLISHED_MEANS}", style="dim")
        rows = ((Text(f" {name}", "dim"), Text(STRATEGIES[name].summary, "dim")) for name in published)
        yield grid(False, True, rows=rows)
    for one in compared:
        if one.is_default and one.plan is not None and (rungs := rung_section(one.plan)) is not None:
            yield rungs
    label = _labels(compared)
    if without := [(label(one), _why(one)) for one in compared if one.plan is None]:
        yield section("Without a plan", grid(False, True, rows=without))
    if failed := [(label(one), _why(one)) for one in compared if one.plan is not None and one.reasons]:
        title = "Simulation or another search failed"
        yield section(title, grid(False, True, rows=failed), style="bold red")


def engine_words(compared: Iterable[Compared]) -> str:
    """Return which engine all plans are for; empty if each row names its own."""
    engines = _engines(compared)
    return f"for engine {engines.pop()}" if len(engines) == 1 else ""


def _why(outcome: Compared) -> str:
    lines = "\n".join(outcome.reasons[:_LINES_PER_REASON])
    return f"{outcome.status}: {lines}"


def comparison_document(compared: Sequence[Compared], inputs: Inputs, objective: Objective) -> dict[str, Any]:
    return document("Comparison", objective=objective, strategies=[_entry(outcome, inputs) for outcome in compared])


def _entry(outcome: Compared, inputs: Inputs) -> dict[str, Any]:
    plan = outcome.plan
    return {
        **fields_of(outcome, "name", "strategy", "engine", "status"),
        "rung": plan and Requested.of(plan).rung,
        "result": plan and plan.result,
        "figures": plan and figures_of(plan, inputs),
        "simulated": plan and Verified.of(plan).verification,
        **fields_of(outcome, "solve_s", "reasons"),
        "plan": plan and to_data(plan),
    }


def _table(compared: Sequence[Compared], inputs: Inputs, objective: Objective) -> Narrowing:
    """Return a row for each plan; a narrow console gets fewer columns, as digits that are cut off mislead."""
    rate = "through-\nput" if objective.kind is ObjectiveKind.THROUGHPUT else "good-\nput"
    bound = "bound" if objective.maximises else f"bound\n{objective.unit}"
    simulated = ["kept\n/s"] if _are_simulated(compared) else []
    name = "engine" if _compares_engines(compared) else "strategy"
    headings = [name, f"{rate} /s", *simulated, bound, "gap", "USD\n/h", "USD/M\ntokens", "TTFT\ns", "TPOT\nms"]
    headings += ["KV\ntokens", "GPUs\n(idle)", "solved\ns"]
    label = _labels(compared)
    plans = [outcome.plan for outcome in compared if outcome.plan is not None]
    best = plans[best_of(plans)] if plans else None
    rows = list[tuple[list[RenderableType], str]]()
    for outcome in compared:
        if outcome.plan is None:
            cells: list[RenderableType] = ["-"] * (len(headings) - 2)
            rows.append(([label(outcome), *cells, _solve_time(outcome.solve_s)], "dim"))
        else:
            first, *rest = _row(outcome.plan, figures_of(outcome.plan, inputs), outcome.solve_s)
            kept = [kept_cell(outcome.plan, unknown="-")] if simulated else []
            rows.append(([label(outcome), first, *kept, *rest], "bold" if outcome.plan is best else ""))

    optional = [number for word in _LEAST_FIRST for number, heading in enumerate(headings) if heading.startswith(word)]
    return _tight(headings, rows, optional)


def _tight(
    headings: Sequence[str], rows: Sequence[tuple[Sequence[RenderableType], str]], optional: Iterable[int]
) -> Narrowing:
    """Return a table of rows, each with its style, whose headings have line breaks and whose columns stand close.

    ``optional`` are the positions of columns that may be left out, the least important one first.
    """

    def draw(without: frozenset[int]) -> Table:
        made = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
        for number, heading in enumerate(headings):
            if number not in without:
                made.add_column(heading, justify="right" if number else "left", no_wrap=True, vertical="bottom")
        for cells, style in rows:
            made.add_row(*(cell for number, cell in enumerate(cells) if number not in without), style=style)
        return made

    return Narrowing(draw, {number: headings[number].replace("\n", " ") for number in optional})


def _are_simulated(compared: Sequence[Compared]) -> bool:
    return any(outcome.plan is not None and kept_of(outcome.plan) is not None for outcome in compared)


def _compares_engines(compared: Sequence[Compared]) -> bool:
    """Return whether several engines are compared with a single strategy."""
    return len({outcome.strategy for outcome in compared}) == 1 < len(_engines(compared))


def _engines(compared: Iterable[Compared]) -> set[str]:
    return {outcome.engine for outcome in compared if outcome.engine is not None}


def _labels(compared: Sequence[Compared]) -> Callable[[Compared], str]:
    """Return a function that labels a row: by strategy, by engine, or by both if there are several of both."""
    if _compares_engines(compared):
        return lambda outcome: f"{outcome.name}{_rung(outcome)}" if outcome.is_default else outcome.engine or ""
    several = len(_engines(compared)) > 1
    return lambda outcome: f"{outcome.name if several or outcome.is_default else outcome.strategy}{_rung(outcome)}"


def _rung(outcome: Compared) -> str:
    """Return the rung of the plan that `place` shows; empty for the others."""
    return f" ({Requested.of(outcome.plan).rung})" if outcome.is_default and outcome.plan is not None else ""


def _row(plan: Plan, figures: Figures, solve_s: float) -> list[str]:
    def or_dash(value: float | None) -> str:
        return "-" if value is None else digits(value)

    return [
        digits(figures.rate_rps),
        digits(plan.result.bound),
        percent(plan.result.gap) if plan.result.gap <= _WIDEST_GAP else f">{percent(_WIDEST_GAP)}",
        or_dash(figures.usd_per_hour),
        or_dash(figures.usd_per_million_output_tokens),
        digits(figures.ttft_s),
        digits(1e3 * figures.tpot_s),
        tokens(figures.kv_tokens),
        f"{figures.gpus_used:,} ({figures.gpus_idle:,})",
        _solve_time(solve_s),
    ]


def _solve_time(solve_s: float) -> str:
    return f"{solve_s:.1f}" if solve_s < 99.95 else f"{solve_s:,.0f}"


# --- two fleets


def model_words(objective: Objective, known: Plan | None = None) -> str:
    """Return whose values are shown for plans that were not simulated, since `place` shows simulated ones first.

    ``known`` is the plan that the reader has beside them; both its values are given if it was simulated.
    """
    words = "Values and bounds are the cost model's; these plans are not simulated."
    if objective.kind is not ObjectiveKind.GOODPUT:
        return words
    kept = None if known is None else kept_of(known)
    if known is None or kept is None:
        return f"{words} `place` shows the rate that simulated traffic keeps, which may be lower."
    model = f"{with_unit(known.result.value, objective.unit)} by the model"
    rate = f"up to {digits(kept.rate_rps, 4)}" if kept.rate_rps else "at no rate tried"
    return f"{words} The present plan has {model} and keeps its limits {rate} in simulation."


_NOTE = (
    "Every plan is solved from scratch; hetis-plan replan shows what to keep of a running plan, and what moving costs."
)


@as_group
def render_what_if(found: WhatIf) -> Iterator[RenderableType]:
    yield problem_title(found.before.loaded.inputs)
    yield goal_line(found.before.loaded.inputs.applicable_limits(found.objective))
    yield facts(change_lines(found.change, found.before))
    yield Text()
    yield _sides(found)
    yield Padding(Text(model_words(found.objective), style="dim"), (0, 0, 0, 1))
    yield section("Difference of the best plans", Text(verdict_words(found)))
    for name, side in (("before", found.before), ("after", found.after)):
        if side.outcome.plan is None:
            yield section(f"No plan {name}: {side.outcome.status}", bullets(side.outcome.reasons[:3]))
    yield section("GPUs in use", _use_table(found))
    if found.plan_change is not None:
        yield section("Replicas", Text(change_counts(found.plan_change)))
        yield Padding(Text(_NOTE, style="dim"), (0, 0, 0, 1))


def change_lines(change: FleetChange, before: Side) -> Iterator[tuple[str, str]]:
    """Yield what is removed and what is added, each after a word that names it."""
    if change.remove:
        yield "without", ", ".join(change.remove)
    if change.add:
        yield "with", ", ".join(f"{addition.count} {addition.gpu.name}" for addition in change.add)
        yield "", shape_words(change.shape, before)


def shape_words(shape: NodeShape, before: Side) -> str:
    """Return a node's shape as ``in nodes of up to 8 GPUs, zone default, the network's 100 Gb/s``."""
    default = before.loaded.inputs.cluster.network.default
    nic = f"the network's {_speed(default)}" if shape.nic is None else f"a NIC of {_speed(shape.nic)}"
    inside = "" if shape.intra_link is None else f", {_speed(shape.intra_link)} between its GPUs"
    return f"in nodes of up to {plural(shape.gpus_per_node, 'GPU')}, zone {shape.zone}, {nic}{inside}"


def _speed(link: Link) -> str:
    return f"{digits(8e-9 * link.bytes_per_s)} Gb/s"


def _sides(found: WhatIf) -> Table:
    made = table("'", "before", "after")
    for name, *cells in side_rows(found):
        made.add_row(name, *cells, style="bold" if name == _value_name(found.objective) else "")
    return made


def _value_name(objective: Objective) -> str:
    return f"{objective.kind.value} {objective.unit}"


def side_rows(found: WhatIf) -> Iterator[tuple[str, str, str]]:
    sides = (found.before, found.after)
    plans = [side.outcome.plan for side in sides]
    results = [plan.result if plan is not None else None for plan in plans]
    figures = [_figures(side) for side in sides]
    nothing = None if found.objective.maximises else math.inf  # the bound that proves that there is no plan
    rows = (
        ("GPUs", [f"{side.loaded.inputs.cluster.num_gpus():,}" for side in sides]),
        ("fleet USD/h", [_money(side.usd_per_hour) for side in sides]),
        (_value_name(found.objective), ["-" if one is None else digits(one.value, 4) for one in results]),
        ("bound", ["-" if side.proven.bound == nothing else digits(side.proven.bound, 4) for side in sides]),
        ("gap", ["-" if one is None else percent(one.gap) for one in results]),
        ("GPUs in use", ["-" if one is None else f"{one.gpus_used:,}" for one in figures]),
        ("used USD/h", ["-" if one is None else _money(one.usd_per_hour) for one in figures]),
        ("replicas", ["-" if plan is None else f"{len(plan.replicas):,}" for plan in plans]),
        ("solved", [f"{side.outcome.solve_s:.1f} s" for side in sides]),
    )
    yield from ((name, before, after) for name, (before, after) in rows)


def _figures(side: Side) -> Figures | None:
    return None if side.outcome.plan is None else figures_of(side.outcome.plan, side.loaded.inputs)


def _money(usd: float | None) -> str:
    return "-" if usd is None else f"{usd:,.2f}"


def verdict_words(found: WhatIf) -> str:
    """Return in words what is proven; a difference smaller than the gaps is not claimed."""
    difference, unit = found.difference, found.objective.unit
    no_plan = _no_plan_words(found)
    if difference.no_plan_before and difference.no_plan_after:
        return f"proven: {no_plan}"
    span = ""
    if any(map(math.isfinite, (difference.low, difference.high))):
        span = f"between {_signed(difference.low)} and {_signed(difference.high)} {unit}"
    plans = no_plan or f"the plans found differ by {_signed(difference.found)} {unit}"
    match difference.verdict:
        case ChangeVerdict.SAME:
            return "proven: there is none"
        case ChangeVerdict.BETTER | ChangeVerdict.WORSE:
            return f"proven: {difference.verdict.value}, {'; '.join(filter(None, (span, plans)))}"
    if no_plan:
        return f"undecided: {f'{span}, because ' if span else ''}{no_plan}; a longer --time-limit may find a plan"
    advice = "" if difference.low == difference.high else "; a smaller --gap or a longer --time-limit narrows that"
    return f"undecided: {span}, because of the gaps ({plans}){advice}"


def _no_plan_words(found: WhatIf) -> str:
    """Return which sides are proven to have no plan, and on which none was found; empty if both have plans."""
    sides = (
        ("before", found.before.outcome.plan, found.difference.no_plan_before),
        ("after", found.after.outcome.plan, found.difference.no_plan_after),
    )
    proven = [name for name, _, no_plan in sides if no_plan]
    unknown = [name for name, plan, no_plan in sides if plan is None and not no_plan]
    known = (("no plan exists", proven), ("no plan was found", unknown))
    return ", and ".join(f"{what} {'either way' if names[1:] else names[0]}" for what, names in known if names)


def _signed(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "unknown"
    return f"{'+' if value > 0 else '-' if value < 0 else ''}{digits(abs(value))}"


def _use_table(found: WhatIf) -> Table:
    """Return a table of how many GPUs of every type exist and are used, before and after."""
    sides = [_counts(side) for side in (found.before, found.after)]
    gpus = dict.fromkeys([*sides[0], *sides[1]])
    rows = ((gpu, *(f"{count:,}" for side in sides for count in side.get(gpu, (0, 0)))) for gpu in gpus)
    return table("'GPU", "there", "used", "then there", "used", rows=rows)


def _counts(side: Side) -> dict[str, tuple[int, int]]:
    """Return the existing and the used GPUs by type."""
    used = used_counts(side.outcome.plan)
    return {gpu: (count, used[gpu]) for gpu, count in gpu_counts(side.loaded.inputs.cluster).items()}


def what_if_document(found: WhatIf) -> dict[str, Any]:
    """Return the answer as plain data, including both plans in full."""
    return document(
        "WhatIf",
        objective=found.objective,
        removed=found.change.remove,
        added=[{"gpu": a.gpu.name, "count": a.count} for a in found.change.add],
        node_shape=found.change.shape,
        before=_side_fields(found.before),
        after=_side_fields(found.after),
        difference={**json_value(found.difference), "unit": found.objective.unit},
        plan_change=found.plan_change and change_fields(found.plan_change),
    )


def _side_fields(side: Side, *, with_plan: bool = True) -> dict[str, Any]:
    plan = side.outcome.plan
    return {
        "gpus": side.loaded.inputs.cluster.num_gpus(),
        "fleet_usd_per_hour": side.usd_per_hour,
        "status": side.outcome.status,
        "result": plan and plan.result,
        "figures": _figures(side),
        "reasons": side.outcome.reasons,
        **({"plan": plan and to_data(plan)} if with_plan else {}),
    }


# --- what to buy next


@as_group
def render_buy_next(found: BuyNext) -> Iterator[RenderableType]:
    """Return the market as a table, the best purchase per dollar first."""
    result, unit = found.before.outcome.plan, found.objective.unit
    yield problem_title(found.before.loaded.inputs)
    yield goal_line(found.before.loaded.inputs.applicable_limits(found.objective))
    now = "no plan" if result is None else f"{with_unit(result.result.value, unit)} by the model"
    now += "" if result is None else f", gap {percent(result.result.gap)}"
    added = f"{plural(found.count, 'GPU')} of one type, {shape_words(found.shape, found.before)}"
    yield facts((("now", now), ("added", added)))
    yield Text()
    if found.offers:
        yield _market_table(found)
        yield Text(
            "\ngain: between the plans found, for all added GPUs together. proven: the range that both bounds allow.\n"
            "marginal price: the value of one GPU in the present plan, an estimate that solving again replaces.\n"
            f"{model_words(found.objective)}",
            style="dim",
        )
    if found.left_out:
        yield section("Not solved in time", Text(", ".join(found.left_out)))


def _market_table(found: BuyNext) -> Narrowing:
    headings, least = offer_headings(found), ("per\nGPU", "marginal\nprice", "USD/h\neach")
    return _tight(headings, [(offer_row(offer), "") for offer in found.offers], map(headings.index, least))


def offer_headings(found: BuyNext) -> list[str]:
    """Return the headings of `offer_row`, with the line breaks of a narrow table."""
    unit_then = f"{found.objective.unit}\nthen"
    return ["GPU", "USD/h\neach", "marginal\nprice", unit_then, "gain", "per\nGPU", "per\nUSD/h", "proven", ""]


def offer_row(offer: ListedOffer) -> list[str]:
    plan, price = offer.after.outcome.plan, offer.usd_per_hour
    per_gpu = offer.gain / offer.addition.count
    return [
        offer.addition.gpu.name,
        _money(price),
        _price(offer.dual),
        "-" if plan is None else digits(plan.result.value, 4),
        _gain(offer.gain),
        _gain(per_gpu),
        "-" if not price else _gain(per_gpu / price),
        _proven(offer.difference),
        "?" if offer.difference.verdict is ChangeVerdict.UNDECIDED else "",
    ]


def _price(dual: float | None) -> str:
    if dual is None:
        return "-"
    return digits(dual) if dual == 0.0 or dual >= SMALLEST_PRICE else f"< {SMALLEST_PRICE}"


def _gain(value: float) -> str:
    return _signed(value) if math.isfinite(value) else "-"


def _proven(difference: Difference) -> str:
    if difference.no_plan_after:
        return "no plan"
    if difference.verdict is ChangeVerdict.BETTER and math.isinf(difference.high):
        return "a plan"  # where none existed
    if difference.verdict is ChangeVerdict.SAME:
        return "0"
    low, high = _signed(difference.low), _signed(difference.high)
    return low if low == high else f"{low}…{high}"


def buy_next_document(found: BuyNext) -> dict[str, Any]:
    """Return the market as plain data. ``gain`` is in the objective's unit, negative if a minimised objective falls."""
    return document(
        "BuyNext",
        objective=found.objective,
        node_shape=found.shape,
        count=found.count,
        before=_side_fields(found.before, with_plan=False),
        offers=[_offer_fields(offer, found.objective) for offer in found.offers],
        left_out=found.left_out,
    )


def _offer_fields(offer: ListedOffer, objective: Objective) -> dict[str, Any]:
    price, count, gain = offer.usd_per_hour, offer.addition.count, offer.gain
    return {
        "gpu": offer.addition.gpu.name,
        "usd_per_hour": price,
        "dual": offer.dual,
        "gain": gain,
        "gain_per_gpu": gain / count,
        "gain_per_usd_per_hour": None if not price else gain / count / price,
        "difference": {**json_value(offer.difference), "unit": objective.unit},
        "after": _side_fields(offer.after, with_plan=False),
    }
