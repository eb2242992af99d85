"""A plan on one screen: its quality, the limits that bind, its replicas, device classes, and alternatives."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hetis.formats.errors import DocumentError
from hetis.formats.models.dtypes import precision_of
from hetis.planner.report.figures import (
    bar,
    digits,
    percent,
    percent_at_least,
    percent_of_gap,
    plural,
    seconds,
    with_unit,
)
from hetis.planner.report.replica import (
    device_table,
    known_model,
    palette_of,
    picture,
    replica_headline,
    stage_table,
    unit_of_room,
)
from hetis.planner.report.tables import (
    Narrowing,
    SimulationRemarks,
    Unbroken,
    as_group,
    bullets,
    facts,
    kept_words,
    missed_words,
    narrowing,
    section,
    table,
    table_of,
)
from hetis.planner.use_cases.compare import Figures, KeptPromise, cost_rate, figures_of, kept_of
from hetis.planner.use_cases.grouping import ReplicaGroup, group_replicas, number_ranges
from hetis.planner.use_cases.record.forms import NOT_COMPILED, EngineValue, Predicted
from hetis.planner.use_cases.record.parts import (
    EqualStages,
    Losses,
    MadeFrom,
    OtherEngines,
    ProfileErrors,
    Requested,
    Verified,
)
from hetis.planner.use_cases.service_level import DEFAULT, Latency, limits_of
from hetis.planner.use_cases.sources import Inputs, inputs_from_documents
from hetis.planner.use_cases.verification.choosing import OUT_OF_TIME, stopped_simulation_of
from hetis.planner.use_cases.verification.outcome import MISSES_AT, attained, misses
from hetis.solver.constraints import Constraint, described
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role, RunnerUp, Status
from hetis.solver.planning import ConstraintPrice
from hetis.solver.problem import EXPLICIT_LINKS, LINKS_TO_ANY, OWN_LINKS, QUICK_LINKS, Family, PlacementProblem

MAX_SHAPES = 12  # replica shapes shown in full; the others are summarised in one line
MAX_CLASSES = 40
SMALLEST_PRICE = 1e-4  # prices of device classes below this are shown as smaller than it
SAME_RATE = 1e-6  # relative difference of two rates that rounding may cause
PROVED = 0.005  # relative difference of a bound from another engine's value up to which it is not mentioned
NEARLY = 0.95  # share of the slowest replica's latency from which another replica counts as equally slow
BINDS_FROM = 0.99  # micro-batches are integers, so a limit binds if the next size would violate it

MAX_NUMBERS = 24  # characters for the numbers of equal replicas
MAX_ROUTES = 12  # pairs of replica shapes; the others are summarised in one line


@as_group
def render_plan(plan: Plan, *, wide: bool = False) -> Iterator[RenderableType]:
    """Yield the table view of a plan, at most 80 columns wide if the names allow it; ``wide`` names every device."""
    yield headline(plan)
    groups = group_replicas(plan.replicas)
    yield from _replicas(groups, plan, wide=wide)
    if plan.kv_routes:
        yield section("KV routes", route_table(plan, groups))
    if plan.prices:
        yield section("Device classes", price_table(plan))
        if len(plan.prices) > MAX_CLASSES:
            yield Text(f" … and {len(plan.prices) - MAX_CLASSES:,} classes of fewer GPUs", style="dim")
    if simpler := simple_setups(plan):
        yield section(f"Simpler setups{by_unified(plan)}", bullets(simpler))
    if plan.runners_up:
        yield section("Not chosen", _runners_up(plan))
    if plan.notes:
        yield section("Notes", bullets(plan.notes))
    yield section("Searched", Text("\n".join([*searched(plan), *([plan.family] if wide else [])]), style="dim"))


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
    if EXPLICIT_LINKS in plan.family:
        yield f"All are {EXPLICIT_LINKS}."
    if LINKS_TO_ANY in plan.family:
        yield "A hop is charged at most the slowest explicit link between nodes of its replica; KV that is handed over,"
        yield "the slowest of its node to any other."
    if OWN_LINKS in plan.family:
        yield "A hop is charged at most the slowest explicit link between nodes of its replica; KV that is handed over"
        yield "inside a zone, the slowest between nodes of the replicas that exchange it."
    if QUICK_LINKS in plan.family:
        yield f"{QUICK_LINKS.capitalize()}."
    yield "The bound holds for all these plans; `hetis-plan explain`, or -o wide, describes them exactly."


def headline(plan: Plan) -> RenderableType:
    """Return what was planned and its quality, which `explain` also shows."""
    return Group(_title(plan), facts(_facts(plan)))


def price_table(plan: Plan) -> Narrowing:
    """Return a table of the device classes: their counts, uses, and marginal prices."""
    zone = len({price.zone for price in plan.prices}) > 1
    shown = sorted(plan.prices, key=lambda price: -price.available)[:MAX_CLASSES]
    others = ["others'"] if plan.other_tenants() else []
    counts = ("there", "used", "workers", *others, "idle")
    heads = ("<GPU", *(["<zone"] if zone else []), "per node", *counts, "marginal price")
    rows = [
        (price.gpu, *([price.zone] if zone else []), f"{price.gpus_per_node:,}", *cells)
        for price, cells in zip(plan.prices, price_cells(plan), strict=True)
        if price in shown
    ]
    return narrowing(*heads, rows=rows, least=("per node", "idle", "workers", "there"))


def _title(plan: Plan) -> Text:
    documents = [MadeFrom.of(plan).document(kind) for kind in ("model", "cluster", "workload")]
    if not all(documents):
        return Text(f"Plan by strategy {plan.strategy}", style="bold")
    model, cluster, workload = (str(one.get("name", "unnamed")) for one in documents)
    gpus = sum(price.available for price in plan.prices)
    title = _named_problem(model, f"{cluster} ({plural(gpus, 'GPU')})" if gpus else cluster, workload)
    hits = documents[2].get("prefix_hit_rate", 0.0)
    return title.append(f" with {percent(hits)} prefix cache hits") if hits else title


def problem_title(inputs: Inputs | PlacementProblem) -> Text:
    fleet = f"{inputs.cluster.name} ({plural(inputs.cluster.num_gpus(), 'GPU')})"
    return _named_problem(inputs.model.name, fleet, inputs.workload.name)


def _named_problem(model: str, fleet: str, workload: str) -> Text:
    return Text.assemble((model, "bold"), " on ", (fleet, "bold"), " for ", (workload, "bold"))


def goal_line(objective: Objective) -> Text:
    return Text(f"{goal_words(objective)}; {limits_words(objective)}", style="dim")


def goal_words(objective: Objective) -> str:
    """Return what is planned for, such as ``cost for 12 requests/s``."""
    demand = "" if objective.demand_rps is None else f" for {digits(objective.demand_rps)} requests/s"
    return f"{objective.kind.value}{demand}"


def limits_words(objective: Objective) -> str:
    ttft, tpot = objective.ttft_limit_s, objective.tpot_limit_s
    ttft_words = "unlimited" if ttft is None else f"up to {ttft:g} s" if ttft >= 0.1 else f"up to {1e3 * ttft:g} ms"
    return f"TTFT p95 {ttft_words}, TPOT {'unlimited' if tpot is None else f'up to {1e3 * tpot:g} ms'}"


def problem_line(inputs: Inputs | PlacementProblem, objective: Objective) -> str:
    """Return a line with what is planned, and for which objective."""
    return f"{problem_title(inputs).plain}: {goal_line(objective).plain}"


def _facts(plan: Plan) -> Iterator[tuple[str, RenderableType]]:
    result = plan.result
    yield result.objective.goal.label, _value(plan)
    if (cost := _cost(plan)) is not None:
        yield "Price" if result.objective is ObjectiveKind.COST else "Cost", cost
    if (compared := beside_equal_stages(plan)) is not None:
        yield "Uniform", compared
    if engines := beside_engines(plan):
        yield "Engines", "\n".join(engines)
    if (kept := precision(plan)) is not None:
        yield "Precision", kept
    if plan.objective.demand_rps is not None:
        yield "Demand", demand_words(plan, plan.objective.demand_rps)
    for one in limits(plan):
        yield one.name, _limit(one)
    if (simulated := simulated_words(plan)) is not None:
        yield "Simulated", simulated
    yield "Fleet", _fleet(plan)
    if lost := losses(plan):
        yield "Losses", lost
    if count_by_role(plan):
        yield "Roles", f"requests/s: {rates_by_role(plan)}"
    if (expected := range_of(plan)) is not None:
        yield "Range", _range(expected, plan)
    alone = " with the whole fleet to itself" if plan.other_tenants() else ""
    yield "Bound", f"{with_unit(result.bound, result.unit)}{alone}  gap {percent(result.gap)}"
    requested = Requested.of(plan)
    runs_on = f" for {requested.engine.name}" if requested.engine is not None else ""
    yield "Solved", f"{result.status} in {seconds(result.solve_s)}, strategy {plan.strategy}{runs_on}"
    if requested.engine_settings:
        yield "Settings", f"engines started with {requested.engine_settings.describe()}"


def less_than_planned(plan: Plan) -> KeptPromise | None:
    """Return the rate that simulated traffic kept, or None if it kept all of the goodput, or was not requested."""
    kept = kept_of(plan) if plan.objective.kind is ObjectiveKind.GOODPUT else None
    return None if kept is None or kept.is_all else kept


def misses_as_planned(plan: Plan) -> bool:
    """Return whether simulated traffic misses limits at the planned goodput, and no lower rate was decided."""
    stopped = stopped_simulation_of(plan)
    return stopped is not None and bool(stopped.missed) and plan.objective.kind is ObjectiveKind.GOODPUT


def is_below_model(plan: Plan) -> bool:
    """Return whether simulated traffic made the plan promise less than the best plan by the cost model.

    It then serves less at the same limits, or was chosen instead of the best one. Setups that were not simulated may
    have to promise less, too, so their values are shown as the model's.
    """
    return less_than_planned(plan) is not None or Verified.of(plan).is_other_than_best


def value_by_model(plan: Plan) -> float:
    """Return the value of the best plan by the model: the plan's own, unless simulation preferred another one."""
    found = Verified.of(plan).model_value
    return plan.result.value if found is None else found


def promised_value(plan: Plan) -> float:
    """Return the plan's value, or the rate that simulated traffic kept if it did not keep all of the goodput."""
    kept = less_than_planned(plan)
    return plan.result.value if kept is None else kept.rate_rps


def kept_cell(plan: Plan, *, unknown: str) -> Text:
    """Return the rate at which simulated traffic kept the limits, or ``unknown`` without a simulation."""
    kept = kept_of(plan)
    if kept is None:
        return Text(unknown)
    return Text(digits(kept.rate_rps) if kept.rate_rps else "none", style="" if kept.is_all else "red")


def promised_figures(plan: Plan, inputs: Inputs | PlacementProblem) -> Figures:
    """Return the figures of a plan at the rate it promises, which is the simulated rate if that is lower.

    Raises:
        DocumentError: the objective that was requested is not usable.
    """
    kept = less_than_planned(plan)
    return figures_of(plan, inputs, rate_rps=None if kept is None else kept.rate_rps)


def _value(plan: Plan) -> Text:
    """Return the promised value, which is the simulated rate within the limits if that is below the model's."""
    result, kept = plan.result, less_than_planned(plan)
    by_model = with_unit(result.value, result.unit)
    if kept is None and misses_as_planned(plan):
        return Text.assemble((by_model, "bold yellow"), f"  by the model, {verdict(plan)}; MISSED in simulation")
    if kept is None:
        return Text.assemble((by_model, "bold green"), f"  {verdict(plan)}")
    model = f"by the model {by_model}, {verdict(plan)}"
    if not kept.rate_rps:
        return Text.assemble(("none", "bold yellow"), f"  of the rates tried keeps the limits in simulation; {model}")
    promised = (with_unit(kept.rate_rps, result.unit), "bold yellow")
    return Text.assemble(promised, f"  within the limits in simulation; {model}")


def misses_demand(plan: Plan) -> bool:
    """Return whether a plan of the highest rate promises less than the demanded one.

    Plans of least cost are found for the demanded rate; `Simulated` says if traffic of this rate misses their limits.
    """
    demand_rps = plan.objective.demand_rps
    if demand_rps is None or not plan.objective.maximises:
        return False
    return promised_value(plan) < demand_rps * (1.0 - SAME_RATE)


def demand_words(plan: Plan, demand_rps: float) -> Text:
    """Return the demanded rate, and whether the plan misses it."""
    demand = Text(f"{digits(demand_rps, 4)} requests/s")
    return Text.assemble(demand, "  ", ("not met", "bold red")) if misses_demand(plan) else demand


def _cost(plan: Plan) -> str | None:
    """Return the cost of the used GPUs, per hour and per token, or None if the plan does not contain its inputs."""
    documents = MadeFrom.of(plan).documents
    if not plan.replicas or not documents:
        return None
    try:
        inputs = inputs_from_documents(documents, "plan")
        figures, cost_rps = promised_figures(plan, inputs), cost_rate(plan)
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


def losses(plan: Plan) -> str:
    """Return the share that is still served without the worst node or zone; empty if not requested."""
    return "; ".join(
        f"after losing any one {kind}: at least {percent_at_least(loss.share)} still served (worst: {loss.name})"
        if loss.rate
        else f"after losing any one {kind}: nothing still served (worst: {loss.name})"
        for kind, loss in Losses.of(plan).by_place.items()
    )


def precision(plan: Plan) -> str | None:
    """Return the precision of the weights and KV, or None if the plan does not contain its model."""
    model = known_model(plan)
    return None if model is None else precision_of(model)


class BesideEqualStages(NamedTuple):
    """The values of a plan and of equal stages that compare."""

    ours: float
    theirs: float | None  # None: unknown, or no such plan
    are_simulated: bool  # whether both are what simulated traffic kept, rather than the model's


def beside_by_rates(plan: Plan) -> BesideEqualStages:
    """Return the values of a plan and of equal stages: both as simulated, if that is known, or else by the model."""
    if (kept_rps := Verified.of(plan).equal_stages_kept_rps) is not None:
        return BesideEqualStages(promised_value(plan), kept_rps, are_simulated=True)
    best = EqualStages.of(plan).best
    return BesideEqualStages(value_by_model(plan), None if best is None else best.value, are_simulated=False)


def beside_equal_stages(plan: Plan) -> str | None:
    """Return the value of equal stages, as in a set-up without a planner, or None if not requested.

    If simulated traffic made the plan promise less than the best by the model, both are compared by the rates that they
    keep in simulation, or by the model if the simulation was stopped before that of equal stages was known.
    """
    best, simulation, unit = EqualStages.of(plan).best, Verified.of(plan), plan.result.unit
    if best is None:
        return None
    equal = "replicas of equal stages"
    if excludes_unified(plan):
        equal = f"unified {equal}, which --roles excludes"
    if (alone := best.value) is None:
        return f"{equal}: none keep the limits"
    if alone <= 0:
        return None
    by_model, (ours, theirs, are_simulated) = with_unit(alone, unit), beside_by_rates(plan)
    if not theirs:
        return f"{equal}: none of the rates tried keeps the limits in simulation; by the model {by_model}"
    beside = _beside(ours, theirs)
    if are_simulated:
        return f"{with_unit(theirs, unit)} within the limits in simulation, by {equal}; this plan {beside}"
    if not is_below_model(plan):
        return f"{by_model} by {equal}; this plan {beside}"
    this = "the best plan" if simulation.is_other_than_best else "this plan"
    simulated = "not simulated"
    if simulation.equal_stages_chosen is False:
        simulated = "in simulation they keep less than this plan"
    elif plan.objective.maximises and promised_value(plan) < alone and not excludes_unified(plan):
        simulated += ", may keep more than this plan: --strategy uniform"
    return f"{by_model} by the model, by {equal} ({simulated}); {this} by the model {beside}"


def excludes_unified(plan: Plan) -> bool:
    """Return whether equal stages, whose replicas are always unified, are no plans of the family that was searched."""
    roles = Requested.of(plan).roles
    return bool(roles) and Role.UNIFIED not in roles


def by_unified(plan: Plan) -> str:
    """Return what follows the name of setups with equal stages if the plan's family excludes them; empty if not."""
    return " by unified replicas, which --roles excludes" if excludes_unified(plan) else ""


def beside_engines(plan: Plan, *, hints: bool = True) -> list[str]:
    """Return the values of plans for other engines and their missing features; engines with equal values share a line.

    Without ``hints``, engines are omitted if nothing is known but how to find out more.
    """
    said = dict[str, list[str]]()
    for other in OtherEngines.of(plan).values:
        if not hints and other.why_not == NOT_COMPILED and not other.equal_stages:
            continue
        said.setdefault(_engine_words(other, plan), []).append(other.engine)
    return [f"{', '.join(names)}: {words}" for words, names in said.items()]


def _engine_words(other: EngineValue, plan: Plan) -> str:
    lacks, ours = " and ".join(filter(None, [", ".join(other.lacks[:-1]), *other.lacks[-1:]])), value_by_model(plan)
    by_model = " by the model" if is_below_model(plan) else ""
    why_not, again = other.why_not, f"plan with --engine {other.engine} (the first time takes up to a minute longer)"
    if why_not == NOT_COMPILED:
        why_not = f"to search for a plan, {again}"
    if other.value is None:
        return f"does not run this plan ({lacks}); {why_not}"
    if other.equal_stages:
        least = f"{'at least' if plan.objective.maximises else 'at most'} {with_unit(other.value, plan.result.unit)}"
        apart = f", without {lacks}" if lacks else ""
        return f"{least} by equal stages, {_beside(other.value, ours)}{by_model}{apart}"
    if other.why_not == NOT_COMPILED:
        # Not always better: under a TTFT limit the rules of its stages may be stricter (docs/cost-model.md, Latency).
        return f"runs this plan; its own search may find a better or a worse one: {again}"
    if other.why_not:
        return f"runs this plan; no better one is known: {other.why_not}"
    words = _beside(other.value, ours) + by_model
    if other.bound is not None and abs(other.bound - other.value) > PROVED * abs(other.value):
        near = abs(other.bound - ours) < ours
        words += f" found, {_beside(other.bound, ours)} at best" if near else " found within its time limit"
    if lacks and other.value != ours:
        is_richer = (other.value > ours) == plan.objective.maximises
        words += f", {'with' if is_richer else 'without'} {lacks}"
    return words


def simple_setups(plan: Plan) -> list[str]:
    """Return the setups that users try first, equal stages with one TP size everywhere, and their relative values."""
    by_model = " by the model" if is_below_model(plan) else ""
    lines = []
    for tp, value in EqualStages.of(plan).by_size.items():
        name = "one GPU per stage" if tp == "1" else f"TP{tp} in every replica"
        if value is not None and value > 0:
            lines.append(
                f"{name}: {with_unit(value, plan.result.unit)}, {_beside(value, value_by_model(plan))}{by_model}"
            )
        else:
            lines.append(f"{name}: none that keeps the limits")
    return lines


def _beside(value: float, other: float) -> str:
    """Return the difference as ``7.38% more``, ``15% less``, ``the same``."""
    ratio = value / other - 1.0 if other else 0.0
    return "the same" if not ratio else f"{percent(abs(ratio))} {'more' if ratio > 0 else 'less'}"


def range_of(plan: Plan) -> Predicted | None:
    """Return the ranges that the errors of the profiles leave, or None if the plan has none."""
    return ProfileErrors.of(plan).errors.predicted


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


def verdict(plan: Plan) -> str:
    """Return what is proven of a plan; the bound of a tenant's plan is that of the whole fleet to itself."""
    result = plan.result
    # Other statistics or a share are only simulated, and another plan may keep them at a higher rate.
    of = "" if Requested.of(plan).service_level == DEFAULT else f" for {DEFAULT.ttft} TTFT and {DEFAULT.tpot} TPOT"
    if result.status is Status.OPTIMAL:
        return f"proven optimal{of}: no plan of the family is better"
    better = result.objective.goal.better
    # A search for the least cost or GPUs that was stopped early has a bound of 0, which says nothing.
    if not math.isfinite(result.gap) or not (plan.objective.maximises or result.bound > 0):
        return f"no bound: it is unknown how much {better} a plan could be"
    if plan.other_tenants():
        claim = f"proven{of}: even with the whole fleet to itself not over {percent_of_gap(result.gap)} {better}"
    else:
        claim = f"proven{of}: no plan of the family is over {percent_of_gap(result.gap)} {better}"
    return f"interrupted; {claim}" if result.status is Status.INTERRUPTED else claim


class Reached(NamedTuple):
    """The planned value of TTFT or TPOT in the replica where it is highest, which every replica's limit is held to.

    ``is_slowest``: another replica is notably faster, so that the value is not that of all requests together.
    ``limit_of``: what the limit was given for if that is another statistic than the value's; empty: it is the same.
    """

    name: str
    value_s: float
    limit_s: float | None
    is_slowest: bool
    limit_of: str

    def remarks(self) -> list[str]:
        """Return what a reader must know to compare the value with its limit."""
        remarks = ["slowest replica"] if self.is_slowest else []
        return [*remarks, *([f"limit for {self.limit_of}"] if self.limit_of and self.limit_s is not None else [])]


def limits(plan: Plan) -> Iterator[Reached]:
    """Yield the planned TTFT and TPOT with their limits; nothing for a plan without replicas."""
    if plan.replicas:
        ttfts = [one.ttft_s for one in plan.replicas if one.role is not Role.DECODE]
        yield _reached(Latency.TTFT, ttfts, plan.objective.ttft_limit_s, plan)
        if MadeFrom.of(plan).has_tpot():
            tpots = [one.tpot_s for one in plan.replicas if one.role is not Role.PREFILL]
            yield _reached(Latency.TPOT, tpots, plan.objective.tpot_limit_s, plan)


def _reached(latency: Latency, values_s: Sequence[float], limit_s: float | None, plan: Plan) -> Reached:
    value_s, level, planned = max(values_s, default=0.0), Requested.of(plan).service_level, DEFAULT.statistic(latency)
    limit_of = "" if level.statistic(latency) is planned else str(level.statistic(latency))
    if level.attainment is not None:
        limit_of = f"{100 * level.attainment:g}% of the requests"
    is_slowest = any(one < NEARLY * value_s for one in values_s)
    return Reached(f"{latency} {planned}", value_s, limit_s, is_slowest, limit_of)


def _limit(reached: Reached) -> Text:
    remarks = "".join(f", {one}" for one in reached.remarks())
    if reached.limit_s is None:
        return Text(f"{seconds(reached.value_s)}, no limit{remarks}")
    ratio = reached.value_s / reached.limit_s
    text = Text(f"{seconds(reached.value_s)} of {seconds(reached.limit_s)}".ljust(20))
    text.append(bar(ratio, 20), style="yellow" if ratio >= BINDS_FROM else "green")
    text.append(f" {percent(ratio)}{' binds' if ratio >= BINDS_FROM else ''}{remarks}")
    return text


def simulated_words(plan: Plan) -> Text | None:
    """Return the simulated outcome for the limits, shown after the model's values; None: no simulation was wanted."""
    found = Verified.of(plan).verification
    if found is None:
        stopped = stopped_simulation_of(plan)
        if stopped is None:
            return None
        in_time = " in the time limit" if stopped.why == OUT_OF_TIME else ""
        if stopped.missed:
            words = f" at{stopped.missed.removeprefix(MISSES_AT)}; lower rates not decided{in_time}"
            return Text.assemble(("MISSED", "bold red"), words)
        words = f"not decided{in_time}" if in_time else "no: stopped before that"
        return Text(f"{words}; all values are the model's", "yellow")
    level = Requested.of(plan).service_level
    remarks = SimulationRemarks.of(found)
    if found.kept:
        shown = [one for one in Latency if one is Latency.TTFT or MadeFrom.of(plan).has_tpot()]
        limits_s = {} if level.attainment is not None else limits_of(plan.objective)

        def words_of(latency: Latency) -> str:
            value_s, limit_s = found.seconds(latency), limits_s.get(latency, math.inf)
            over = f" (over {seconds(limit_s)} by chance)" if value_s > limit_s else ""
            return f"{latency} {level.statistic(latency)} {seconds(value_s)}{over}"

        latencies = map(words_of, shown)
        return kept_words(found.rate_rps, latencies, attained(found, plan), found.kept_rps, remarks)
    return missed_words(found.rate_rps, misses(found, plan), found.kept_rps, remarks)


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
    rest = groups[shown:]
    if rest:
        count, rate = sum(len(group.numbers) for group in rest), sum(group.rate for group in rest)
        yield Text(
            f"\n… and {plural(len(rest), 'more shape')} with {plural(count, 'replica')}, {digits(rate)} requests/s "
            "together (-o wide lists all)",
            style="dim",
        )


def price_cells(plan: Plan) -> list[tuple[str, ...]]:
    """Return for every class how many of its GPUs exist, are used, are workers and are idle, and what one is worth.

    In the plan of a tenant, how many the other tenants hold comes before how many are idle.
    """
    is_shared, found = bool(plan.other_tenants()), list[tuple[str, ...]]()
    for price, held in zip(plan.prices, _held_by_others(plan), strict=True):
        counts = [price.available, price.used, price.as_attention_workers, *([held] if is_shared else [])]
        counts.append(price.available - price.used - held)
        found.append((*(f"{count:,}" for count in counts), worth(price.dual, plan)))
    return found


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


def _runners_up(plan: Plan) -> Table:
    made = table_of(
        distinct_runners_up(plan),
        ("'shape", lambda one: Unbroken([Text(stage) for stage in folded(one.shape).split(" | ")], " | ")),
        ("rate /s", lambda one: digits(one.rate)),
        ("'why not", lambda one: one.reason),
        fixed=True,
    )
    made.columns[0].ratio = made.columns[2].ratio = 3
    return made


def distinct_runners_up(plan: Plan) -> list[RunnerUp]:
    """Return the runners-up, those once that differ only in their zones or nodes."""
    return list({(one.shape, digits(one.rate), one.reason): one for one in plan.runners_up}.values())


def folded(shape: str) -> str:
    """Merge consecutive equal stages: ``A | A | B`` becomes ``2 × A | B``."""
    runs = [(stage, len(list(equal))) for stage, equal in itertools.groupby(shape.split(" | "))]
    return " | ".join(stage if count == 1 else f"{count} × {stage}" for stage, count in runs)


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


def render_constraint_prices(prices: Sequence[ConstraintPrice], unit: str) -> RenderableType:
    """Return a table of what the objective would gain without each constraint, and without all of them."""

    def name(kept: Sequence[Constraint]) -> str:
        return described(kept[0]) if len(kept) == 1 else f"all {len(kept)} together"

    rows = ((name(price.constraints), _interval(price)) for price in prices)
    return section("What the constraints cost", table("'without", f"gain, {unit}", rows=rows))


def _interval(price: ConstraintPrice) -> str:
    low, high = digits(price.least), digits(price.most)
    if not price.is_solved:
        return f"at most {high}, not solved again"
    return low if low == high else f"{low} to {high}"
