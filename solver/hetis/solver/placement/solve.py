"""`solve_family`: from a problem to a plan with named GPUs, a value and a bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np

from hetis.solver import mixes
from hetis.solver.budget import Budget, Progress, Report, SearchSettings
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.binding import BoundStage, bind
from hetis.solver.placement.constrained_problem import apply_constraints, is_nothing_left, restored
from hetis.solver.placement.constraint_rows import pins_of
from hetis.solver.placement.explanation.alternatives import notes_on_search, runners_up_of
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.fleet import FloatArray, class_prices
from hetis.solver.placement.infeasible import Market, infeasible
from hetis.solver.placement.master import cost_of, demanded_rate
from hetis.solver.placement.outcome import Beyond, Outcome, is_out_of_reach
from hetis.solver.placement.replicas.kinds import Layout
from hetis.solver.placement.replicas.stage_cost import state_on_rank
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import (
    Template,
    fixed_bytes,
    gpus_of,
    kv_tokens_held,
    landing_s,
    ttft_s,
    use_of,
    with_fewest_in_flight,
)
from hetis.solver.placement.rungs import Known
from hetis.solver.placement.search import bound_of, equal_stages, search
from hetis.solver.placement.utilisation import KeptOutcome, Unbeaten, chooses_utilisation, loosest, search_kept
from hetis.solver.placement.waits import Kept, kept_by, lanes_of
from hetis.solver.plan import (
    OPTIMAL_GAP,
    AttentionWorkerPool,
    ClassPrice,
    KvRoute,
    Plan,
    ReplicaPlan,
    Role,
    SolveResult,
    StagePlan,
    Status,
)
from hetis.solver.problem import PlacementProblem


def solve_family(
    problem: PlacementProblem, settings: SearchSettings, market: Market | None = None, known: Known | None = None
) -> Plan:
    """Solve as `hetis.solver.planning.solve_placement` does, with one of our own strategies and the problem's family.

    The search ends when the gap is small enough, the time is up or no remaining column could help. If the family only
    adds attention workers to that of a known plan, these must improve a relaxation before whole counts are searched.

    Raises:
        InvalidProblemError: the family has no engine's rules.
    """

    known = known if chooses_utilisation(problem) and problem.objective.maximises else None
    kept = 0.0 if known is None else known.plan.result.value
    adds_workers = (
        known is not None
        and replace(known.family, max_pool=problem.family.max_pool) == problem.family
        and known.plan.classes == problem.class_shares()
    )

    def found_by(costs: CostTables, settings: SearchSettings) -> KeptOutcome | Unbeaten | None:
        def find(tables: CostTables, above: float = 0.0, gap: float = 0.0) -> Outcome | None:
            own = replace(settings, gap_target=max(settings.gap_target, gap))
            return search(tables, own, beyond=Beyond(above, adds_workers))

        if not chooses_utilisation(problem):
            outcome = find(costs)
            return None if outcome is None else KeptOutcome(costs, outcome)
        is_unified = problem.family.roles == (Role.UNIFIED,) and problem.family.uneven_layers
        quick = partial(equal_stages, settings=settings) if is_unified else None
        return search_kept(costs, settings, find, lambda tables: bound_of(tables, settings), kept, quick)

    found = solved_by(problem, settings, market, found_by)
    if not isinstance(found, Unbeaten):
        return found[0]
    assert known is not None, "it is not beaten"
    return replace(known.plan, result=known.plan.result.bounded_by(found.bound))


def solved_by(
    problem: PlacementProblem, settings: SearchSettings, market: Market | None,
    found_by: Callable[[CostTables, SearchSettings], KeptOutcome | Unbeaten | None], *, survives: bool = False,
) -> tuple[Plan, Outcome] | Unbeaten:  # fmt: skip
    """Return the outcome of a search as a plan with named GPUs, and the outcome itself, or that a plan is unbeaten.

    Raises:
        InvalidProblemError: the family has no engine's rules.
        InfeasibleError, NoPlanFoundError: as `hetis.solver.planning.solve_placement`.
    """
    chooses = not survives and chooses_utilisation(problem)
    if problem.family.engine is None:
        raise InvalidProblemError(f"strategy {settings.strategy} plans for an engine: give the family its rules")
    searched = apply_constraints(problem)
    settings = replace(settings, report=in_objective_units(settings.report, problem))
    if is_nothing_left(searched):
        raise infeasible(problem, settings, market)
    costs = replace(build_cost_tables(searched), evaluated=settings.evaluated)
    most = loosest(costs) if chooses else costs
    if is_out_of_reach(most, demanded_rate(most.problem) or 0.0):
        raise infeasible(problem, settings, market)
    settings.tell("cost tables")
    found = found_by(costs, settings)
    if found is None:
        raise settings.stopped() if settings.budget.is_spent() else infeasible(problem, settings, market)
    if isinstance(found, Unbeaten):
        return found
    costs, outcome = found

    spreads = survives or outcome.simplicity is not None
    tables, serving, kv_spreads = _serving(costs, outcome, settings, spreads=spreads)
    keeps = Kept(tables.problem.assumptions.planned_utilisation, {})
    if chooses:
        keeps = kept_by(tables, serving, keeps.utilisation)
        tables = tables.at(keeps.utilisation, lanes_of(tables, serving))
    chosen = [(with_fewest_in_flight(tables, template), count) for template, count in serving.chosen]
    templates = [template for template, count in chosen for _ in range(count)]
    layouts = [layout for template, count in serving.chosen for layout in _layouts(serving, template, count)]
    roles = [tables.mixes[template.mix].role for template in templates]
    bound_stages = bind(
        tables, templates, seed=settings.seed, budget=settings.budget, spreads=spreads, layouts=layouts, roles=roles
    )
    plan = plan_of(tables, settings.strategy, serving, templates, bound_stages, settings.budget, spreads=kv_spreads)
    plan = replace(plan, result=replace(plan.result, queued_ttft_s=keeps.ttft_s))
    plan = _with_seats(plan, [keeps.seats.get(template, 0) for template in templates])
    return (plan if searched is problem else restored(plan, searched, problem)), outcome


def _layouts(outcome: Outcome, template: Template, count: int) -> list[Layout]:
    """Return the nodes of so many replicas; one without them may be anywhere."""
    known = outcome.layouts.get(template, ())
    return [known[i] if i < len(known) else () for i in range(count)]


def _with_seats(plan: Plan, sizes: Sequence[int]) -> Plan:
    """Return the plan with engines that may run as many requests in a micro-batch (0: as many as planned)."""
    replicas = tuple(
        replace(one, max_num_seqs=size * one.in_flight) if size > one.micro_batch else one
        for one, size in zip(plan.replicas, sizes, strict=True)
    )
    return replace(plan, replicas=replicas)


def _serving(
    costs: CostTables, outcome: Outcome, settings: SearchSettings, *, spreads: bool = False
) -> tuple[CostTables, Outcome, bool]:  # fmt: skip
    """Return the outcome with replicas that serve only, its tables, and whether KV must spread over all of these.

    A search does not distinguish replicas that serve from idle ones, which may be all that keeps a pin. If no flow of
    KV can change that, the best unified replicas that keep the pins are searched. The bound holds all the same. If KV
    ``spreads`` anyway, replicas that serve more after a loss stay.

    Raises:
        NoPlanFoundError: the pins are kept by no plan found whose replicas all serve.
    """
    pins = pins_of(costs.problem.constraint_index, costs.classes, costs.resources)
    for spread in (True,) if spreads else (False, True):
        serving = without_idle(costs, outcome, spreads=spread)
        uses = np.zeros((len(serving.chosen), len(costs.resources.rows)), dtype=np.int64)
        for k, (template, _) in enumerate(serving.chosen):
            uses[k] = use_of(costs, template)
        if pins is None or pins.are_kept(uses, np.array([count for _, count in serving.chosen])):
            return costs, serving, spread
    family = replace(costs.problem.family, roles=(Role.UNIFIED,))
    tables = build_cost_tables(replace(costs.problem, family=family))
    unified = search(tables, settings) if Role.UNIFIED in costs.problem.family.roles else None
    if unified is None:
        raise NoPlanFoundError("no plan was found that keeps the pins with replicas that all serve requests")
    return tables, replace(unified, bound=outcome.bound), False


def without_idle(costs: CostTables, outcome: Outcome, *, spreads: bool = False) -> Outcome:
    """Return the outcome without prefill and decode replicas that no KV leaves or reaches.

    Where GPUs cost nothing a search may choose such replicas, because they neither help nor hurt.
    """
    templates = [template for template, count in outcome.chosen for _ in range(count)]
    routes = kv_routes(costs, templates, outcome.flows, spreads=spreads)
    ends = {end for route in routes for end in (route.prefill, route.decode)}
    unified = [costs.mixes[template.mix].role is Role.UNIFIED for template in templates]
    kept = Counter(template for number, template in enumerate(templates) if number in ends or unified[number])
    saved = cost_of(costs, (Counter(templates) - kept).items())
    return replace(outcome, chosen=tuple(kept.items()), value=outcome.value - saved)


def equal_stages_value(problem: PlacementProblem, settings: SearchSettings) -> float | None:
    """Return the value of the best plan of equal stages, in the objective's unit, or None if none was found in time."""
    searched = apply_constraints(replace(problem, family=STRATEGIES["uniform"].restrict(problem.family)))
    if is_nothing_left(searched):
        return None
    costs, settings = build_cost_tables(searched), replace(settings, gap_target=np.inf)  # of what no bound is needed
    found: KeptOutcome | Unbeaten | None = None
    if chooses_utilisation(problem):
        with suppress(NoPlanFoundError):  # of those found none keeps the limits
            found = search_kept(
                costs,
                settings,
                lambda tables, *_: equal_stages(tables, settings),
                lambda tables: bound_of(tables, settings),
            )
    elif (outcome := equal_stages(costs, settings)) is not None:
        found = KeptOutcome(costs, outcome)
    assert not isinstance(found, Unbeaten), "no plan is known"
    return None if found is None else objective_scale(found.costs.problem) * found.outcome.value


def in_objective_units(report: Report, problem: PlacementProblem) -> Report:
    """Return a report that converts progress to the unit of the objective (searches count saturated rates)."""
    scale = objective_scale(problem)

    def scaled(progress: Progress) -> None:
        known = progress.incumbent, progress.bound
        incumbent, bound = (None if value is None else scale * value for value in known)
        report(replace(progress, incumbent=incumbent, bound=bound))

    return scaled


def objective_scale(problem: PlacementProblem) -> float:
    """Return the factor from a saturated rate to the objective."""
    goal = problem.objective.kind.goal
    return problem.assumptions.planned_utilisation if goal.maximises and goal.is_planned else 1.0


def plan_of(
    costs: CostTables, strategy: str, outcome: Outcome, templates: list[Template], bound_stages: list[list[BoundStage]],
    budget: Budget, *, spreads: bool = False,
) -> Plan:  # fmt: skip
    """Return the outcome of a search as a plan on named GPUs; ``templates`` lists its replicas in plan order.

    Its KV ``spreads`` over the replicas, or fills them in turn (`kv_routes`).
    """
    problem, kind, scale = costs.problem, costs.problem.objective.kind, objective_scale(costs.problem)
    value, bound = float(scale * outcome.value), float(scale * outcome.bound)
    bound = kind.goal.tightened(bound, value)
    gap = abs(bound - value) / abs(value) if value else 0.0
    status = Status.OPTIMAL if gap <= OPTIMAL_GAP else Status.FEASIBLE
    if outcome.interrupted and status is not Status.OPTIMAL:
        status = Status.INTERRUPTED
    shapes: dict[Template, ReplicaPlan] = {}
    replicas = []
    for template, stages in zip(templates, bound_stages, strict=True):
        if template not in shapes:
            shapes[template] = replica_plan(costs, template, stages)
        replicas.append(_with_devices(shapes[template], stages))
    return Plan(
        strategy=strategy,
        family=problem.family.describe(problem.model),
        result=SolveResult(
            status=status,
            objective=kind,
            value=value,
            bound=bound,
            gap=gap,
            unit=problem.objective.unit,
            solve_s=budget.elapsed_s(),
            utilisation=problem.assumptions.planned_utilisation,
            unified_lanes=problem.assumptions.lanes.unified,
            prefill_lanes=problem.assumptions.lanes.prefill,
            prefill_load=problem.assumptions.lanes.prefill_load,
        ),
        objective=problem.objective,
        replicas=tuple(replicas),
        kv_routes=kv_routes(costs, templates, outcome.flows, spreads=spreads),
        prices=_prices(costs, outcome, scale),
        runners_up=runners_up_of(costs, outcome, status),
        notes=notes_on_search(problem, costs.routes.num_left_out),
        classes=problem.class_shares(),
    )


def replica_plan(costs: CostTables, template: Template, stages: list[BoundStage]) -> ReplicaPlan:
    """Return a template on named GPUs, with the numbers of the cost model."""
    own, m = costs.of_scope(template.scope), costs.problem.family.in_flight[template.in_flight_index]
    mix = own.mixes[template.mix]
    zones = costs.routes.whole_zones if mix.sends_afar else costs.scopes[template.scope].zones
    tables = costs.scopes[template.scope].tables
    plans, pools, first_layer = [], [], 0
    for index, (stage, bound) in enumerate(zip(template.stages, stages, strict=True)):
        device_class, size = costs.ranks[stage.rank]
        layers = stage.layers + (tables.prefix_layers if index == 0 else 0)
        plans.append(
            StagePlan(
                gpu=costs.classes[device_class].gpu,
                tp=size // mix.attention_dp,
                copies=mix.attention_dp,
                first_layer=first_layer,
                num_layers=layers,
                devices=tuple(bound.devices),
                kv_head_groups_kept=int(tables.rank_groups[stage.rank]) - stage.pool_groups,
            )
        )
        first_layer += layers
        if stage.pool_class >= 0:
            gpu = costs.classes[stage.pool_class].gpu
            workers, groups = tuple(bound.workers), stage.pool_groups
            pools.append(AttentionWorkerPool(stage=index, gpu=gpu, devices=workers, kv_head_groups=groups))
    return ReplicaPlan(
        rate=template.rate,
        ttft_s=ttft_s(costs, template) + landing_s(costs, template),
        tpot_s=template.interval_s * mixes.tpot_per_interval(costs.problem.model, mix, m),
        micro_batch=mix.micro_batch,
        in_flight=m * mix.attention_dp,
        chunk_tokens=mix.chunk_tokens,
        kv_tokens=int(min(_kv_room(costs, template, i) for i in range(len(template.stages)))),
        stages=tuple(plans),
        attention_workers=tuple(pools),
        role=mix.role,
        expert_parallel=mix.attention_dp > 1,
        kv_zones=zones if mix.role is Role.PREFILL else (),
        classes=costs.problem.ranges()[costs.scopes[template.scope].number],
    )


def _with_devices(shape: ReplicaPlan, stages: list[BoundStage]) -> ReplicaPlan:
    """Return the same replica on other GPUs."""
    plans = (replace(plan, devices=tuple(bound.devices)) for plan, bound in zip(shape.stages, stages, strict=True))
    pools = (replace(pool, devices=tuple(stages[pool.stage].workers)) for pool in shape.attention_workers)
    return replace(shape, stages=tuple(plans), attention_workers=tuple(pools))


def _kv_room(costs: CostTables, template: Template, index: int) -> float:
    """Return the number of tokens whose KV fits on all copies of a stage together."""
    t, stage = costs.scopes[template.scope].tables, template.stages[index]
    layers = stage.layers + (t.prefix_layers if index == 0 else 0)
    if index == len(template.stages) - 1:
        layers += t.draft_layers
    room = t.room_bytes[stage.rank] - fixed_bytes(costs, template, index) - stage.layers * t.layer_bytes[stage.rank]
    kept = t.rank_groups[stage.rank] - stage.pool_groups
    prompts = float(t.prompt_tokens[template.mix, template.in_flight_index])
    room -= layers * stage.pool_groups * prompts * t.kv_group_bytes
    room -= layers * state_on_rank(t, template.mix, template.in_flight_index, stage.rank)
    tokens = room / (layers * kept * t.kv_group_bytes) if kept else np.inf
    if stage.pool_class >= 0:
        held, _ = kv_tokens_held(costs, template, stage)
        requests = held * int(t.micro_batch[template.mix])
        pairs = np.ceil(requests * stage.pool_groups * t.rank_tp[stage.rank] / stage.pool_cards - 1e-9)
        per_token = layers * pairs / requests * t.kv_group_bytes
        tokens = min(tokens, t.worker_room_bytes[stage.pool_class] / per_token)
    return float(costs.rank_dp[stage.rank] * min(tokens, costs.problem.most_kv_tokens))


def _prices(costs: CostTables, outcome: Outcome, scale: float) -> tuple[ClassPrice, ...]:
    used, workers = Counter[int](), Counter[int]()
    for template, count in outcome.chosen:
        for g, n in gpus_of(costs, template).items():
            used[g] += count * n
        for stage in template.stages:
            if stage.pool_class >= 0:
                workers[stage.pool_class] += count * stage.pool_cards
    rows = [costs.resources.rows.index((g, 1)) for g in range(len(costs.classes))]
    return class_prices(costs.classes, used, workers, (scale * outcome.row_prices[rows]).tolist())


DUST = 1e-12  # share of a flow that rounding may leave


def kv_routes(
    costs: CostTables, templates: Sequence[Template], flows: FloatArray, *, spreads: bool = False
) -> tuple[KvRoute, ...]:
    """Split ``flows`` [Z, Z] over the replicas of their zones so that none sends or receives more than its rate.

    ``templates`` are the plan's replicas in order. Flows between zones come first and use replicas that may send to
    all zones; the remaining capacity of these joins that of replicas that send to their own zone only. Replicas are
    filled in turn, which gives few routes: fewer than there are replicas, for every pair of zones. If it ``spreads``,
    each replica takes its share instead, and none is idle if any on its side is not.
    """
    load = costs.problem.assumptions.lanes.load
    left = [template.rate * load(costs.mixes[template.mix].role) for template in templates]
    on_side: dict[int, list[int]] = {}
    for i, template in enumerate(templates):
        on_side.setdefault(costs.side_of(template.scope, template.mix), []).append(i)
    rates: dict[tuple[int, int], float] = {}
    zones = range(len(costs.routes.zones))
    for z, y in sorted(((z, y) for z in zones for y in zones), key=lambda pair: pair[0] == pair[1]):
        senders = on_side.get(costs.routes.side(Role.PREFILL, z, sends_afar=True), [])
        if z == y:
            senders = on_side.get(costs.routes.side(Role.PREFILL, z), []) + senders
        receivers = on_side.get(costs.routes.side(Role.DECODE, y), [])
        flow = float(flows[z, y])
        parts = _in_shares(flow, senders, receivers, left) if spreads else _in_turn(flow, senders, receivers, left)
        for pair, rate in parts:
            rates[pair] = rates.get(pair, 0.0) + rate
    return tuple(KvRoute(prefill=i, decode=j, rate=rate) for (i, j), rate in sorted(rates.items()))


def _in_turn(
    flow: float, senders: Sequence[int], receivers: Sequence[int], left: list[float]
) -> Iterator[tuple[tuple[int, int], float]]:
    """Yield pairs of replicas with their part of a flow, and take it from the rates that they have left."""
    dust, send, receive = DUST * flow, iter(senders), iter(receivers)
    i, j = next(send, -1), next(receive, -1)
    while flow > dust and i >= 0 and j >= 0:
        rate = min(flow, left[i], left[j])
        if rate > dust:
            yield (i, j), rate
        flow, left[i], left[j] = flow - rate, left[i] - rate, left[j] - rate
        i = next(send, -1) if left[i] <= dust else i
        j = next(receive, -1) if left[j] <= dust else j


def _in_shares(
    flow: float, senders: Sequence[int], receivers: Sequence[int], left: list[float]
) -> Iterator[tuple[tuple[int, int], float]]:
    """Yield all pairs of replicas with parts of a flow in proportion to what they have left, and take it from that."""
    sending, receiving = sum(left[i] for i in senders), sum(left[j] for j in receivers)
    if not flow > 0.0 or not sending > 0.0 or not receiving > 0.0:
        return
    flow = min(flow, sending, receiving)
    parts = {(i, j): flow * (left[i] / sending) * (left[j] / receiving) for i in senders for j in receivers}
    for (i, j), rate in parts.items():
        if rate > DUST * flow:
            yield (i, j), rate
        left[i], left[j] = left[i] - rate, left[j] - rate
