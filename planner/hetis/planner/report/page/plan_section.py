"""A plan as a section of a page: its rate and cost, its placement, its distance from the limits, and explanations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hetis.planner.report import promises
from hetis.planner.report.alternatives import class_grids, rung_grid, runners_up_grid
from hetis.planner.report.blocks import (
    PLAIN,
    Bar,
    Block,
    Charts,
    Grid,
    Segment,
    Sentences,
    Stack,
    Tiles,
    Waterfall,
    Waterfalls,
    grid_of,
)
from hetis.planner.report.explanation import explained_bottlenecks, memory_grid, memory_shares, time_shares
from hetis.planner.report.figures import digits, gigabytes, percent, plural, seconds, tokens
from hetis.planner.report.page.axes import chart_of
from hetis.planner.report.page.fleet_map import fleet_map
from hetis.planner.report.page.key_figures import key_tiles, limits_scale, worth_scale
from hetis.planner.report.plan import price_grid
from hetis.planner.report.replica import replica_name, stage_rows, unit_of_room
from hetis.planner.report.simulation.pictures import Panel
from hetis.planner.use_cases.grouping import ReplicaGroup, group_replicas
from hetis.planner.use_cases.record.parts import MadeFrom, Requested
from hetis.planner.use_cases.robustness.profile_errors import used_fits
from hetis.solver.placement.explanation import explain_plan
from hetis.solver.placement.explanation.facts import Explanation, MemoryBar
from hetis.solver.plan import Plan, ReplicaPlan, Role, parallel_sizes
from hetis.solver.problem import PlacementProblem

MAX_SHAPES = 12  # shapes of replicas that are described in full

_MEMORY_COLORS = {"unusable": PLAIN, "engine": 5, "weights": 0, "KV": 2, "activations": 1, "free": 7}
_TIME_COLORS = {
    "dense": 0, "all-reduce": 5, "prefill att.": 1, "decode att.": 2, "transfer": 3, "head": 4, "other": 7, "wait": 6,
}  # fmt: skip


def plan_blocks(
    plan: Plan, problem: PlacementProblem, panels: Sequence[Panel] = (), traffic: str = ""
) -> Iterator[Block]:
    """Yield everything known about a plan.

    ``panels`` are the curves of a simulation of ``traffic``.

    Raises:
        InvalidProblemError: the plan contains devices, layers or settings that its problem lacks.
    """
    explanation, groups = explain_plan(plan, problem), group_replicas(plan.replicas)
    if groups:
        yield Tiles(tiles=tuple(key_tiles(plan, problem)))
    yield worth_scale(plan)
    if (rungs := rung_grid(plan, on_page=True)) is not None:
        yield rungs
    yield from (grid for grid in class_grids(plan) if grid.rows)
    if groups:
        yield limits_scale(plan)
    yield fleet_map(plan, problem.cluster, explanation)
    if groups:
        yield _replicas(groups, unit_of_room(plan))
        yield _stages(groups)
    if panels:
        yield Charts(title="Under simulated traffic", intro=traffic, charts=[chart_of(one) for one in panels])
    if explanation.memory:
        yield _memory(explanation)
    if explanation.stage_times:
        yield _times(explanation, plan)
    yield Sentences(title="What limits it", terms=list(_limiting(explanation, plan)))
    if plan.prices:
        yield _prices(plan)
    yield Sentences(
        title="Simpler setups",
        lines=promises.simple_setups(plan),
        intro=f"One GPU type per replica and equal layers per stage{promises.by_unified(plan)}, "
        "the best of each under the same limits.",
    )
    if plan.runners_up:
        yield replace(runners_up_grid(plan), intro="The closest alternatives, each with its saturated rate.")
    yield _profiles(plan, problem)
    yield Sentences(title="Notes, and how to reproduce it", lines=plan.notes, terms=list(_made(plan)), folded=True)


def _limiting(explanation: Explanation, plan: Plan) -> Iterator[tuple[str, str]]:
    for number, sentence in explained_bottlenecks(explanation).items():
        yield replica_name(number, plan.replicas[number].role), sentence
    yield from (("Prefill to decode", route) for route in explanation.kv_routes)
    if explanation.attention_workers:
        yield "Attention workers", explanation.attention_workers


# --- replicas


def _replicas(groups: Sequence[ReplicaGroup], unit: str) -> Grid:
    """Return the table of replicas, their KV room in ``unit``."""

    def name(group: ReplicaGroup) -> str:
        equal = f" and {len(group.numbers) - 1:,} equal" if len(group.numbers) > 1 else ""
        return f"{replica_name(group.numbers[0], group.first.role)}{equal}"

    rest = groups[MAX_SHAPES:]
    return grid_of(
        [(name(group), group.first) for group in groups[:MAX_SHAPES]],
        ("'replica", lambda one: one[0]),
        ("requests/s saturated", lambda one: digits(one[1].rate, 4)),
        ("TTFT p95", lambda one: "" if one[1].role is Role.DECODE else seconds(one[1].ttft_s)),
        ("TPOT mean", lambda one: "" if one[1].role is Role.PREFILL else seconds(one[1].tpot_s)),
        ("seats × in flight", lambda one: "" if one[1].role is Role.PREFILL else _seats(one[1])),
        ("chunk", lambda one: "" if one[1].role is Role.DECODE else f"{one[1].chunk_tokens}"),
        (f"KV {unit}", lambda one: tokens(one[1].kv_tokens)),
        ("GPUs", lambda one: f"{len(one[1].devices()):,}"),
        title="Replicas",
        note=f"and {plural(len(rest), 'more shape')} of replicas" if rest else "",
    )


def _seats(replica: ReplicaPlan) -> str:
    """Return the requests that decode at once when the replica is saturated, and how many its engine may run."""
    more = "" if replica.seats == replica.planned_seats else f", up to {replica.seats}"
    return f"{replica.micro_batch} × {replica.in_flight}{more}"


def _stages(groups: Sequence[ReplicaGroup]) -> Grid:
    return Grid(
        title="Stages",
        columns=("'", "'GPU", "'shape", "layers", "KV head groups", "'devices"),
        rows=[
            (f"R{group.numbers[0]}, stage {number}" if number else "attention workers", *cells)
            for group in groups[:MAX_SHAPES]
            for number, *cells in stage_rows(group.first)
        ],
        folded=True,
    )


# --- memory and time


def _memory(explanation: Explanation) -> Waterfalls:
    """Return a waterfall for each GPU type, of the cards with the least memory left, and all parts in a table."""
    tightest = dict[str, MemoryBar]()
    for part in explanation.memory:
        if part.gpu not in tightest or part.free_bytes < tightest[part.gpu].free_bytes:
            tightest[part.gpu] = part
    return Waterfalls(
        title="Memory of one GPU, by type",
        intro="The memory of each GPU type, shown for the cards with the least room left.",
        falls=[
            Waterfall(
                gpu,
                f"{gigabytes(part.nominal_bytes)}; {_part_label(part)}, {plural(part.num_devices, 'card')}",
                list(_steps(part)),
            )
            for gpu, part in tightest.items()
        ],
        numbers=memory_grid(explanation.memory, [f"{_part_label(part)}, {part.gpu}" for part in explanation.memory]),
    )


def _part_label(part: MemoryBar) -> str:
    worker = ", attention worker" if part.role != "primary" else ""
    return f"R{part.replica} stage {part.stage + 1}{worker}"


def _steps(part: MemoryBar) -> Iterator[Bar]:
    amounts = {share.name: share.amount for share in memory_shares(part)} | {"free": part.free_bytes}
    begin = 0.0
    for name, amount in amounts.items():
        share = amount / part.nominal_bytes if part.nominal_bytes else 0.0
        yield Bar(name, gigabytes(amount), share, begin=begin, color=_MEMORY_COLORS[name])
        begin += share


def _times(explanation: Explanation, plan: Plan) -> Stack:
    slowest, rows, numbers = dict[int, float](), list[Bar](), list[tuple[str, dict[str, float], float]]()
    for part in explanation.stage_times:
        slowest[part.replica] = max(slowest.get(part.replica, 0.0), part.total_s / part.copies)
    for part in explanation.stage_times:
        amounts = {share.name: share.amount / part.copies for share in time_shares(part)}
        each, whole = part.total_s / part.copies, slowest[part.replica]
        label = f"R{part.replica} stage {part.stage + 1}"
        sizes = parallel_sizes(part.tp, part.copies, shares_experts=plan.replicas[part.replica].expert_parallel)
        segments = (Segment(name, s / whole if whole else 0.0, _TIME_COLORS[name]) for name, s in amounts.items())
        text = f"{seconds(each)}{', the bottleneck' if part.is_bottleneck else ''}"
        rows.append(Bar(f"{label}: {part.gpu} {sizes}", text, segments=tuple(segments)))
        numbers.append((label, amounts, each))
    names = list(dict.fromkeys(name for _, amounts, _ in numbers for name in amounts))
    table = Grid(
        title="As numbers",
        columns=("'stage", *names, "together"),
        rows=[
            (label, *(seconds(of[name]) if of.get(name) else "–" for name in names), seconds(each))
            for label, of, each in numbers
        ],
        folded=True,
    )
    intro = "The time that one request takes on each stage, per copy; the longest in a replica sets its rate."
    return Stack(title="Time per stage", intro=intro, rows=rows, numbers=table)


# --- the rest


def _prices(plan: Plan) -> Grid:
    note = "The marginal price is what one GPU of the class is worth where fractions of replicas are allowed."
    note += " What more GPUs are worth is found by solving again, by hetis-plan what-if --add."
    found = price_grid(plan)
    return replace(found, title="Value of the GPUs", note=" ".join(filter(None, (found.note, note))))


def _profiles(plan: Plan, problem: PlacementProblem) -> Grid:
    """Return the origins of the profiles and their known errors."""
    used = {gpu for price in plan.prices if price.used for gpu in [price.gpu]} or set(problem.profiles)
    origins = _mapping(MadeFrom.of(plan).origins.get("profiles"))
    expected = promises.range_of(plan)
    errors = {} if expected is None else expected.errors
    rows = list[tuple[str, ...]]()
    fits = used_fits({gpu: problem.profiles[gpu] for gpu in sorted(used)}, problem.model, problem.family.tp_sizes)
    for gpu, profile in fits.items():
        for op in dict.fromkeys(fit.op for fit in profile.fits):
            provenances = [fit.provenance for fit in profile.fits if fit.op is op]
            stated = [one.held_out_mape for one in provenances if one.held_out_mape is not None]
            assumed = _mapping(errors.get(gpu)).get(op.value)
            # Plans are trusted here, but a value that is not a number states no error.
            error = f"{percent(assumed)} assumed" if isinstance(assumed, int | float) else "not stated"
            error = percent(max(stated)) if stated else error
            source = ", ".join(dict.fromkeys(one.source.value for one in provenances))
            whence = "; ".join(dict.fromkeys(one.origin for one in provenances))
            rows.append((gpu, op.value.replace("_", " "), source, error, whence))
    given = "; ".join(f"{gpu}: {origin}" for gpu, origin in origins.items() if gpu in used)
    intro = "The assumed speed of each GPU type, its source, and its error on held-out points."
    return Grid(
        title="Profiles and their errors",
        intro=intro + (f" {given}." if given else ""),
        columns=("'GPU", "'operator", "'source", "error", "'from"),
        rows=rows,
        folded=True,
    )


def _made(plan: Plan) -> Iterator[tuple[str, str]]:
    made_from, requested, result = MadeFrom.of(plan), Requested.of(plan), plan.result
    yield "Strategy", f"{plan.strategy}; {result.status} in {seconds(result.solve_s)}"
    yield "Family", plan.family
    for name, found in (("Versions", made_from.versions), ("Digests", _mapping(made_from.digests))):
        if found:
            yield name, ", ".join(f"{one} {str(value)[:16]}" for one, value in found.items() if isinstance(value, str))
    named = ((name, getattr(requested, name)) for name in ("seed", "gap_target", "time_limit_s"))
    if settings := ", ".join(f"{name} {value}" for name, value in named if value is not None):
        yield "Settings", settings


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
