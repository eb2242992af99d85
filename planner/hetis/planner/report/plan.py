"""A plan on one screen: its quality, the limits that bind, its replicas, device classes, and alternatives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hetis.formats.errors import DocumentError
from hetis.planner.report import promises
from hetis.planner.report.alternatives import class_grids, rung_grid, runners_up_grid, survival_words
from hetis.planner.report.blocks import Grid, grid_of
from hetis.planner.report.figures import bar, digits, percent, plural, seconds, with_unit
from hetis.planner.report.goals import named_problem
from hetis.planner.report.replica import device_table, palette_of, picture, replica_headline, stage_table, unit_of_room
from hetis.planner.report.tables import as_group, bullets, drawn, facts, section, table, titled
from hetis.planner.use_cases.comparing.plan_figures import cost_rate, figures_of
from hetis.planner.use_cases.grouping import ReplicaGroup, group_replicas, number_ranges, shapes_of
from hetis.planner.use_cases.record.forms import Predicted
from hetis.planner.use_cases.record.parts import MadeFrom, Requested, Verified
from hetis.planner.use_cases.saved_plans import inputs_from_documents
from hetis.solver.engine_rules import Family
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import ObjectiveKind, Plan, Role
from hetis.solver.problem import EXPLICIT_LINKS, LINKS_TO_ANY, OWN_LINKS, QUICK_LINKS

MAX_SHAPES = 12  # replica shapes shown in full; the others are summarised in one line
MAX_CLASSES = 40
SMALLEST_PRICE = 1e-4  # prices of device classes below this are shown as smaller than it
BINDS_FROM = 0.99  # micro-batches are integers, so a limit binds if the next size would violate it

MAX_NUMBERS = 24  # characters for the numbers of equal replicas
MAX_ROUTES = 12  # pairs of replica shapes; the others are summarised in one line


@as_group
def render_plan(plan: Plan, *, wide: bool = False) -> Iterator[RenderableType]:
    """Yield the table view of a plan, at most 80 columns wide if the names allow it; ``wide`` names every device."""
    yield headline(plan)
    if (rungs := rung_grid(plan)) is not None:
        yield titled(rungs)
    groups = group_replicas(plan.replicas)
    yield from _replicas(groups, plan, wide=wide)
    if plan.kv_routes:
        yield section("KV routes", route_table(plan, groups))
    if plan.prices:
        yield titled(price_grid(plan))
    yield from classes_section(plan)
    if simpler := promises.simple_setups(plan):
        yield section(f"Simpler setups{promises.by_unified(plan)}", bullets(simpler))
    if plan.runners_up:
        yield titled(runners_up_grid(plan))
    if plan.notes:
        yield section("Notes", bullets(plan.notes))
    yield section("Searched", Text("\n".join([*searched(plan), *([plan.family] if wide else [])]), style="dim"))


def classes_section(plan: Plan) -> Iterator[RenderableType]:
    """Yield what a plan keeps with classes of requests and without, if any were tried."""
    if grids := class_grids(plan):
        parts = (part for one in grids for part in (Text(one.intro), *([drawn(one)] if one.rows else [])))
        yield section(grids[0].title, Group(*parts))


@as_group
def render_verified(proven: Plan, plan: Plan, *, wide: bool = False) -> Iterator[RenderableType]:
    """Yield what simulation added to the tables of the proven plan: all of another plan, or the facts that differ."""
    before = {name: str(fact) for name, fact in _facts(proven)}
    changed = [(name, fact) for name, fact in _facts(plan) if before.get(name) != str(fact)]
    if shapes_of(plan) != shapes_of(proven):
        yield Text("\nKept in simulated traffic is another plan\n", style="bold")
        yield render_plan(plan, wide=wide)
        return
    yield from classes_section(plan)
    if changed:
        notes = bullets([note for note in plan.notes if note not in proven.notes])
        yield section("Simulated traffic", Group(facts(changed), notes))


def searched(plan: Plan) -> Iterator[str]:
    """Yield what was searched in a few plain lines; `Plan.family` is the exact text."""
    known = STRATEGIES.get(plan.strategy)
    if known is None:  # of another version
        yield plan.family
        return
    requested = Requested.of(plan)
    is_part = bool(requested.roles) and bool(set(known.restrict(Family()).roles).difference(requested.roles))
    only = f"; only {', '.join(requested.roles)} replicas" if is_part else ""
    yield f"Strategy {plan.strategy}: {known.summary}{only}."
    if (engine := requested.engine) is not None:
        yield f"Of these, what {engine.name} runs: replicas of up to {engine.max_stages} stages in one zone."
    if requested.constraints:  # the family ends with them, in words
        yield f"Constraints: {'; '.join(plan.family.split('; ')[-len(requested.constraints) :])}."
    yield from (words for clause, words in _LINKS.items() if clause in plan.family)
    yield "The bound holds for all these plans; `hetis-plan explain`, or -o wide, describes them exactly."


_HOP = "A hop is charged at most the slowest explicit link between nodes of its replica; KV that is handed over"
_LINKS = {
    EXPLICIT_LINKS: f"All are {EXPLICIT_LINKS}.",
    LINKS_TO_ANY: f"{_HOP},\nthe slowest of its node to any other.",
    OWN_LINKS: f"{_HOP}\ninside a zone, the slowest between nodes of the replicas that exchange it.",
    QUICK_LINKS: f"{QUICK_LINKS.capitalize()}.",
}
"""What the clauses of a family on links between nodes mean."""


def headline(plan: Plan) -> RenderableType:
    """Return what was planned and its quality, which `explain` also shows."""
    return Group(_title(plan), facts(_facts(plan)))


def price_grid(plan: Plan) -> Grid:
    """Return the device classes: their counts, uses, and marginal prices."""
    has_zones, is_shared = len({price.zone for price in plan.prices}) > 1, bool(plan.other_tenants())
    shown = sorted(plan.prices, key=lambda price: -price.available)[:MAX_CLASSES]
    rest = len(plan.prices) - len(shown)
    every = zip(plan.prices, _held_by_others(plan), strict=True)
    return grid_of(
        [(price, held) for price, held in every if price in shown],
        ("'GPU", lambda one: one[0].gpu),
        ("'zone", lambda one: one[0].zone) if has_zones else None,
        ("per node", lambda one: f"{one[0].gpus_per_node:,}"),
        ("there", lambda one: f"{one[0].available:,}"),
        ("used", lambda one: f"{one[0].used:,}"),
        ("workers", lambda one: f"{one[0].as_attention_workers:,}"),
        ("others'", lambda one: f"{one[1]:,}") if is_shared else None,
        ("idle", lambda one: f"{one[0].available - one[0].used - one[1]:,}"),
        ("marginal price", lambda one: worth(one[0].dual, plan)),
        title="Device classes",
        note=f"… and {rest:,} classes of fewer GPUs" if rest else "",
        least=("per node", "idle", "workers", "there"),
    )


def _title(plan: Plan) -> Text:
    made_from = MadeFrom.of(plan)
    documents = [made_from.document(kind) for kind in ("model", "cluster", "workload")]
    if not all(documents):
        return Text(f"Plan by strategy {plan.strategy}", style="bold")
    model, cluster, workload = (str(one.get("name", "unnamed")) for one in documents)
    gpus = sum(price.available for price in plan.prices)
    fleet = f"{cluster} ({plural(gpus, 'GPU')})" if gpus else cluster
    title = named_problem(made_from.checkpoint_of(model), fleet, workload)
    hits = documents[2].get("prefix_hit_rate", 0.0)
    return title.append(f" with {percent(hits)} prefix cache hits") if hits else title


def _facts(plan: Plan) -> list[tuple[str, RenderableType]]:
    """Return what is known of a plan, each after its name."""
    result, requested, expected = plan.result, Requested.of(plan), promises.range_of(plan)
    simulated, settings = promises.simulated_words(plan), requested.engine_settings
    alone = " with the whole fleet to itself" if plan.other_tenants() else ""
    runs_on = f" for {requested.engine.name}" if requested.engine is not None else ""
    every: list[tuple[str, str | Text | None]] = [
        (result.objective.goal.label, _value(plan)),
        ("Price" if result.objective is ObjectiveKind.COST else "Cost", _cost(plan)),
        ("Uniform", promises.beside_equal_stages(plan)),
        ("Precision", promises.precision(plan)),
        ("Demand", promises.demand_words(plan, plan.objective.demand_rps)),
        *((one.name, _limit(one)) for one in promises.limits(plan)),
        ("Simulated", None if simulated is None else simulated.text()),
        ("Fleet", _fleet(plan)),
        ("Survives", survival_words(plan)),
        ("Losses", Text(promises.losses(plan), style="red" if promises.loses_most(plan) else "")),
        ("Roles", f"requests/s: {rates_by_role(plan)}" if count_by_role(plan) else None),
        ("Range", None if expected is None else _range(expected, plan)),
        ("Bound", f"{with_unit(result.bound, result.unit)}{alone}  gap {percent(result.gap)}"),
        ("Solved", f"{result.status} in {seconds(result.solve_s)}, strategy {plan.strategy}{runs_on}"),
        ("Settings", f"engines started with {settings.describe()}" if settings else None),
    ]
    return [(name, fact) for name, fact in every if fact]


def _value(plan: Plan) -> Text:
    """Return the value: what simulated traffic keeps or, without a simulation, what the model says is kept."""
    result, by_model = plan.result, Verified.of(plan).model_value
    value = with_unit(result.value, result.unit)
    if promises.misses_as_planned(plan):
        return Text.assemble((value, "bold yellow"), f"  by the model, {promises.verdict(plan)}; MISSED in simulation")
    if by_model is None:
        return Text.assemble((value, "bold green"), f"  {promises.verdict(plan)}")
    model = f"by the model {with_unit(by_model, result.unit)}"
    if not result.value:
        return Text.assemble(("none", "bold yellow"), f"  of the rates tried keeps the limits in simulation; {model}")
    style = "bold yellow" if result.value < by_model else "bold green"
    return Text.assemble((value, style), f"  kept in simulation; {model}; {promises.verdict(plan)}")


def _cost(plan: Plan) -> str | None:
    """Return the cost of the used GPUs, per hour and per token, or None if the plan does not contain its inputs."""
    documents = MadeFrom.of(plan).documents
    if not plan.replicas or not documents:
        return None
    try:
        inputs = inputs_from_documents(documents, "plan")
        figures, cost_rps = figures_of(plan, inputs), cost_rate(plan)
    except DocumentError:
        return None
    if figures.usd_per_hour is None:
        used = {price.gpu for price in plan.prices if price.used}
        slots = [one for group in inputs.cluster.node_groups for one in group.gpus if one.gpu in used]
        unknown = dict.fromkeys(one.gpu for one in slots if inputs.cluster.price_of(one) is None)
        return f"unknown: no price for {', '.join(unknown)}"
    if figures.usd_per_million_output_tokens is None:
        return f"{digits(figures.usd_per_hour)} USD/h"
    tokens = f"{digits(figures.usd_per_million_output_tokens)} USD per million output tokens"
    at = "" if cost_rps is None else f" at {digits(cost_rps, 4)} requests/s"
    return f"{digits(figures.usd_per_hour)} USD/h, {tokens}{at}"


def _range(expected: Predicted, plan: Plan) -> Text:
    """Return the ranges of rate and latencies, given the errors of the profiles."""
    rate = f"{digits(expected.rate.low)} to {digits(expected.rate.high)}"
    unit = plan.objective.unit if plan.objective.maximises else "requests/s of goodput"
    latencies = (
        f"{name} {seconds(span.low)} to {seconds(span.high)}"
        for name, span in (("TTFT", expected.ttft_s), ("TPOT", expected.tpot_s))
        if name == "TTFT" or MadeFrom.of(plan).has_tpot()
    )
    return Text(f"{rate} {unit}, {', '.join(latencies)} by the profiles' errors")


def _limit(reached: promises.Reached) -> Text:
    remarks = "".join(f", {one}" for one in reached.remarks())
    if reached.limit_s is None:
        return Text(f"{seconds(reached.value_s)}, no limit{remarks}")
    ratio = reached.value_s / reached.limit_s
    text = Text(f"{seconds(reached.value_s)} of {seconds(reached.limit_s)}".ljust(20))
    text.append(bar(ratio, 20), style="yellow" if ratio >= BINDS_FROM else "green")
    text.append(f" {percent(ratio)}{' binds' if ratio >= BINDS_FROM else ''}{remarks}")
    return text


def _fleet(plan: Plan) -> str:
    used = sum(price.used for price in plan.prices)
    workers = sum(price.as_attention_workers for price in plan.prices)
    held = len(plan.held_by_others())
    idle = sum(price.available for price in plan.prices) - used - held
    others = f"{held:,} held by other tenants, " if held else ""
    part = f", {workers:,} of them attention workers" if workers else ""
    roles = f" ({count_by_role(plan)})" if count_by_role(plan) else ""
    return f"{plural(len(plan.replicas), 'replica')}{roles} on {plural(used, 'GPU')}{part}; {others}{idle:,} idle"


def _replicas(groups: Sequence[ReplicaGroup], plan: Plan, *, wide: bool) -> Iterator[RenderableType]:
    shown = len(groups) if wide else MAX_SHAPES
    palette, room = palette_of(plan), unit_of_room(plan)
    for group in groups[:shown]:
        yield replica_headline(group, room)
        yield Padding(Group(picture(group.first, palette), stage_table(group, palette)), (0, 0, 0, 1))
        if wide and len(group.numbers) > 1:
            yield Padding(device_table(group, plan), (0, 0, 0, 1))
    if rest := groups[shown:]:
        count, rate = sum(len(group.numbers) for group in rest), sum(group.rate for group in rest)
        words = f"{plural(len(rest), 'more shape')} with {plural(count, 'replica')}, {digits(rate)} requests/s together"
        yield Text(f"\n… and {words} (-o wide lists all)", style="dim")


def _held_by_others(plan: Plan) -> list[int]:
    """Return how many GPUs of every class other tenants hold; 0 if the plan does not contain its cluster."""
    if plan.other_tenants():
        from hetis.solver.placement.explanation import held_by_class

        with suppress(DocumentError, InvalidProblemError):
            return held_by_class(plan, inputs_from_documents(MadeFrom.of(plan).documents, "plan").cluster)
    return [0] * len(plan.prices)


def worth(dual: float, plan: Plan) -> str:
    if dual <= 0:
        return "0" if plan.has_prices() else "unknown"
    unit = plan.result.unit.removeprefix("requests")
    number = digits(dual) if dual >= SMALLEST_PRICE else f"< {SMALLEST_PRICE}"  # never 0, since it is worth something
    return f"{number}{unit if unit.startswith('/') else f' {unit}'}"


def count_by_role(plan: Plan) -> str:
    """Return the number of replicas per role as ``1 prefill, 2 decode``; empty if all are unified."""
    counts = {role: sum(one.role is role for one in plan.replicas) for role in Role}
    if counts[Role.UNIFIED] == len(plan.replicas):
        return ""
    return ", ".join(f"{count:,} {role}" for role, count in counts.items() if count)


def rates_by_role(plan: Plan) -> str:
    """Return the possible rates of the prefill and decode sides and the routed rate, in saturated requests/s."""
    rates = {role: sum(one.rate for one in plan.replicas if one.role is role) for role in Role}
    routed = sum(route.rate for route in plan.kv_routes)
    text = f"prefill {digits(rates[Role.PREFILL])}, decode {digits(rates[Role.DECODE])}, routed {digits(routed)}"
    return f"{text}, unified {digits(rates[Role.UNIFIED])}" if rates[Role.UNIFIED] else text


def route_table(plan: Plan, groups: Sequence[ReplicaGroup]) -> Table:
    """Return the routes between replicas, one row for each pair of shapes, the largest first."""
    group_of = {number: i for i, group in enumerate(groups) for number in group.numbers}
    rates: defaultdict[tuple[int, int], float] = defaultdict(float)
    for route in plan.kv_routes:
        rates[group_of[route.prefill], group_of[route.decode]] += route.rate
    made = table("'prefill", "'decode", "requests/s", "of prefill", "of decode")
    pairs = sorted(rates, key=lambda pair: -rates[pair])
    for pair in pairs[:MAX_ROUTES]:
        sender, receiver = (groups[i] for i in pair)
        shares = (percent(rates[pair] / group.rate) if group.rate else "" for group in (sender, receiver))
        made.add_row(_named(sender), _named(receiver), digits(rates[pair], 4), *shares)
    rest = pairs[MAX_ROUTES:]
    if rest:
        made.add_row(f"… {plural(len(rest), 'more pair')}", "", digits(sum(rates[pair] for pair in rest)), "", "")
    return made


def _named(group: ReplicaGroup) -> str:
    gpus = ", ".join(dict.fromkeys(stage.gpu for stage in group.first.stages))
    numbers = number_ranges(group.numbers).strip("[]")
    if len(numbers) > MAX_NUMBERS:
        numbers = f"{numbers[:MAX_NUMBERS].rpartition(',')[0]},… ({len(group.numbers):,})"
    return f"{'replica' if len(group.numbers) == 1 else 'replicas'} {numbers} ({gpus})"
