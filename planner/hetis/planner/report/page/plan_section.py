"""A plan as a section of a page: its rate and cost, its placement, its distance from the limits, and explanations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hetis.planner.report import plan as plan_report
from hetis.planner.report import promises
from hetis.planner.report.alternatives import distinct_runners_up, reason_words, shape_words
from hetis.planner.report.classes import KEPT, LATENCIES, classes_words, latency_words
from hetis.planner.report.explanation import memory_shares, time_shares
from hetis.planner.report.figures import (
    digits,
    gigabytes,
    percent,
    plural,
    seconds,
    tokens,
)
from hetis.planner.report.page.axes import chart_of
from hetis.planner.report.page.blocks import (
    PLAIN,
    Block,
    ChangeStep,
    Charts,
    Grid,
    Segment,
    Sentences,
    Stack,
    StackRow,
    Tiles,
    Waterfall,
    Waterfalls,
    grid_of,
)
from hetis.planner.report.page.fleet_map import MAX_NAMED, fleet_map, replica_name, shape_letter
from hetis.planner.report.page.key_figures import key_tiles, limits_scale, worth_scale
from hetis.planner.report.replica import stage_rows, unit_of_room
from hetis.planner.report.rungs import LITTLE_LEFT, left_share, next_rung
from hetis.planner.report.simulation.pictures import Panel
from hetis.planner.use_cases.grouping import ReplicaGroup, group_replicas
from hetis.planner.use_cases.record.forms import RungFound
from hetis.planner.use_cases.record.parts import Classes, MadeFrom, Requested, Rungs
from hetis.planner.use_cases.robustness.profile_errors import used_fits
from hetis.solver.placement.explanation import explain_plan
from hetis.solver.plan import Explanation, MemoryBar, Plan, ReplicaPlan, Role, parallel_sizes
from hetis.solver.problem import PlacementProblem

MAX_SHAPES = 12  # shapes of replicas that are described in full

_MEMORY_COLORS = {"unusable": PLAIN, "engine": 5, "weights": 0, "KV": 2, "activations": 1, "free": 7}
_TIME_COLORS = {
    "dense": 0, "all-reduce": 5, "prefill att.": 1, "decode att.": 2, "transfer": 3, "head": 4, "other": 7, "wait": 6,
}  # fmt: skip


def plan_blocks(
    plan: Plan, problem: PlacementProblem, panels: Sequence[Panel] = (), traffic: str = "", *, has_market: bool = False
) -> Iterator[Block]:
    """Yield everything known about a plan.

    ``panels`` are the curves of a simulation of ``traffic``; ``has_market``: the page also shows what to buy next.

    Raises:
        InvalidProblemError: the plan contains devices, layers or settings that its problem lacks.
    """
    explanation = explain_plan(plan, problem)
    if plan.replicas:
        yield Tiles(tiles=tuple(key_tiles(plan, problem)))
    yield worth_scale(plan)
    rungs = Rungs.of(plan).found
    if any(one.is_chosen for one in rungs):
        yield _rungs(rungs, plan)
    of_classes = Classes.of(plan)
    if of_classes.kept:
        yield grid_of(of_classes.kept, *KEPT, title="Classes of requests", intro=classes_words(of_classes))
        yield grid_of(of_classes.ttft, *LATENCIES, title="Who gains and who pays", intro=latency_words(of_classes))
    if plan.replicas:
        yield limits_scale(plan)
    yield fleet_map(plan, problem.cluster, explanation)
    groups = group_replicas(plan.replicas)
    if groups:
        yield _replicas(groups, unit_of_room(plan), lettered=len(plan.replicas) > MAX_NAMED)
        yield _stages(groups)
    if panels:
        yield Charts(title="Under simulated traffic", intro=traffic, charts=tuple(chart_of(one) for one in panels))
    if explanation.memory:
        yield _memory(explanation)
    if explanation.stage_times:
        yield _times(explanation, plan)
    explained = dict.fromkeys(part.replica for part in explanation.stage_times)
    names = (replica_name(number, plan.replicas[number].role) for number in explained)
    terms = tuple(zip(names, explanation.bottlenecks, strict=False))
    workers = (("Attention workers", explanation.attention_workers),) if explanation.attention_workers else ()
    routes = tuple(("Prefill to decode", route) for route in explanation.kv_routes)
    yield Sentences(title="What limits it", terms=(*terms, *routes, *workers))
    if plan.prices:
        yield _prices(plan, has_market=has_market)
    yield Sentences(
        title="Simpler setups",
        lines=tuple(promises.simple_setups(plan)),
        intro=f"One GPU type per replica and equal layers per stage{promises.by_unified(plan)}, "
        "the best of each under the same limits.",
    )
    if plan.runners_up:
        yield _runners_up(plan)
    yield _profiles(plan, problem)
    yield Sentences(title="Notes, and how to reproduce it", lines=plan.notes, terms=tuple(_made(plan)), folded=True)


def _rungs(found: Sequence[RungFound], plan: Plan) -> Grid:
    """Return the rungs side by side."""
    planned = [one for one in found if one.value is not None and one.rate_rps is not None]

    def same(one: RungFound) -> bool:
        return one.of not in ("", one.name) and any(other.name == one.of for other in planned)

    return grid_of(
        planned,
        ("'rung", lambda one: f"{one.name}{', the plan' if one.is_chosen else ''}"),
        ("requests/s", lambda one: f"as {one.of}" if same(one) else digits(one.rate_rps or 0.0, 4)),
        ("at most", lambda one: "" if same(one) or one.bound is None else digits(one.bound, 4)),
        ("USD/h", lambda one: "unknown" if one.usd_per_hour is None else digits(one.usd_per_hour)),
        ("GPUs", lambda one: f"{one.gpus:,}"),
        ("left after the worst node", lambda one: percent(left_share(one))),
        ("nodes per replica", lambda one: "" if one.nodes is None else f"{one.nodes}"),
        ("shapes", lambda one: f"{one.shapes:,}"),
        ("'carried whole by", lambda one: "unknown" if one.targets is None else ", ".join(one.targets) or "no export"),
        title="Rungs of complexity",
        intro="The best plan of each: replicas in one node, layers over nodes, prefill and decode apart, workers.",
        note=next_rung(found, plan) or "",
        strong=next((number for number, one in enumerate(planned) if one.is_chosen), None),
        bad=tuple(number for number, one in enumerate(planned) if left_share(one) < LITTLE_LEFT and not one.is_chosen),
    )


# --- replicas


def _replicas(groups: Sequence[ReplicaGroup], unit: str, *, lettered: bool) -> Grid:
    """Return the table of replicas, their KV room in ``unit``; if ``lettered``, with the letters of the map."""

    def name(number: int, group: ReplicaGroup) -> str:
        letter = f"{shape_letter(number)}: " if lettered else ""
        equal = f" and {len(group.numbers) - 1:,} equal" if len(group.numbers) > 1 else ""
        return f"{letter}{replica_name(group.numbers[0], group.first.role)}{equal}"

    rest = groups[MAX_SHAPES:]
    return grid_of(
        [(name(number, group), group.first) for number, group in enumerate(groups[:MAX_SHAPES])],
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
    def name(group: ReplicaGroup, number: int | None) -> str:
        return f"R{group.numbers[0]}, stage {number}" if number else "attention workers"

    rows = (
        (name(group, number), *cells) for group in groups[:MAX_SHAPES] for number, *cells in stage_rows(group.first)
    )
    return Grid(
        title="Stages",
        columns=("'", "'GPU", "'shape", "layers", "KV head groups", "'devices"),
        rows=tuple(rows),
        folded=True,
    )


# --- memory and time


def _memory(explanation: Explanation) -> Waterfalls:
    """Return a waterfall for each GPU type, of the cards with the least memory left, and all parts in a table."""
    numbers, names, tightest = [], list[str](), dict[str, MemoryBar]()
    for part in explanation.memory:
        amounts = _amounts(part)
        names = names or list(amounts)
        cells = (f"{amount / 2**30:.1f}" for amount in (*amounts.values(), part.nominal_bytes))
        numbers.append((f"{_part_label(part)}, {part.gpu}", *cells))
        before = tightest.get(part.gpu)
        if before is None or part.free_bytes < before.free_bytes:
            tightest[part.gpu] = part
    table = Grid(title="All stages, in GiB", columns=("'GPU", *names, "nominal"), rows=tuple(numbers), folded=True)
    falls = []
    for gpu, part in tightest.items():
        steps, begin = list[ChangeStep](), 0.0
        for name, amount in _amounts(part).items():
            share = amount / part.nominal_bytes if part.nominal_bytes else 0.0
            text = f"{amount / 2**30:.1f} GiB"
            steps.append(ChangeStep(label=name, text=text, begin=begin, share=share, color=_MEMORY_COLORS[name]))
            begin += share
        note = f"{gigabytes(part.nominal_bytes)}; {_part_label(part)}, {plural(part.num_devices, 'card')}"
        falls.append(Waterfall(title=gpu, note=note, steps=tuple(steps)))
    intro = "The memory of each GPU type, shown for the cards with the least room left."
    return Waterfalls(title="Memory of one GPU, by type", intro=intro, falls=tuple(falls), numbers=table)


def _amounts(part: MemoryBar) -> dict[str, float]:
    return {share.name: share.amount for share in memory_shares(part)} | {"free": part.free_bytes}


def _part_label(part: MemoryBar) -> str:
    worker = ", attention worker" if part.role != "primary" else ""
    return f"R{part.replica} stage {part.stage + 1}{worker}"


def _times(explanation: Explanation, plan: Plan) -> Stack:
    slowest: dict[int, float] = {}
    for part in explanation.stage_times:
        slowest[part.replica] = max(slowest.get(part.replica, 0.0), part.total_s / part.copies)
    rows, numbers, names = [], [], list[str]()
    for part in explanation.stage_times:
        amounts = {share.name: share.amount / part.copies for share in time_shares(part)}
        names += [name for name in amounts if name not in names]
        each, whole = part.total_s / part.copies, slowest[part.replica]
        label = f"R{part.replica} stage {part.stage + 1}"
        sizes = parallel_sizes(part.tp, part.copies, shares_experts=plan.replicas[part.replica].expert_parallel)
        rows.append(
            StackRow(
                label=f"{label}: {part.gpu} {sizes}",
                text=f"{seconds(each)}{', the bottleneck' if part.is_bottleneck else ''}",
                segments=tuple(
                    Segment(name=name, share=amount / whole if whole else 0.0, color=_TIME_COLORS[name])
                    for name, amount in amounts.items()
                ),
            )
        )
        numbers.append((label, amounts, each))
    cells = tuple(
        (label, *(seconds(of[name]) if of.get(name) else "–" for name in names), seconds(each))
        for label, of, each in numbers
    )
    table = Grid(title="As numbers", columns=("'stage", *names, "together"), rows=cells, folded=True)
    intro = "The time that one request takes on each stage, per copy; the longest in a replica sets its rate."
    return Stack(title="Time per stage", intro=intro, rows=tuple(rows), numbers=table)


# --- the rest


def _prices(plan: Plan, *, has_market: bool) -> Grid:
    advice = "What to buy next is found by solving again for every type on the market: hetis-plan report --buy-next."
    zones = len({price.zone for price in plan.prices}) > 1
    where = ["'zone"] if zones else []
    others = ["other tenants'"] if plan.other_tenants() else []
    return Grid(
        title="Value of the GPUs",
        columns=("'GPU", *where, "there", "used", "as workers", *others, "idle", "marginal price"),
        rows=tuple(
            (price.gpu, *([price.zone] if zones else []), *cells)
            for price, cells in zip(plan.prices, plan_report.price_cells(plan), strict=True)
        ),
        note="The marginal price is what one GPU of the class is worth where fractions of replicas are allowed."
        + ("" if has_market else f" {advice}"),
    )


def _runners_up(plan: Plan) -> Grid:
    return grid_of(
        distinct_runners_up(plan),
        ("'a replica of", lambda one: shape_words(one.shape)),
        ("requests/s", lambda one: digits(one.rate)),
        ("'why not", lambda one: reason_words(one.reason, one.rate)),
        title="Not chosen",
        intro="The closest alternatives, each with its saturated rate.",
    )


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
        rows=tuple(rows),
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
