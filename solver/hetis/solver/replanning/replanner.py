"""`solve_replanning`: the best plan on the fleet as it is now, starting from the plan that runs, with change costs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from hetis.solver.budget import Budget, Report, SearchSettings, silent
from hetis.solver.cluster import Cluster
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.constrained_problem import apply_constraints, is_nothing_left, restored
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.infeasible import infeasible
from hetis.solver.placement.master import demanded_rate
from hetis.solver.placement.outcome import Outcome, is_out_of_reach, sound_bound
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import Template
from hetis.solver.placement.solve import objective_scale, plan_of
from hetis.solver.plan import Plan, Role, served_with_classes
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.change import (
    HALF_DONE,
    Fate,
    PlanChange,
    ReplanningProblem,
    holdings,
    plan_change,
)
from hetis.solver.replanning.fresh import Fresh, bound_of, search_fresh, search_left_over
from hetis.solver.replanning.naming import name_gpus
from hetis.solver.replanning.net_master import ColumnChoice, NetMaster, ProgramLimits, inventory_of
from hetis.solver.replanning.running import (
    Candidate,
    Continuations,
    has_lost,
    new_replica,
    places_of,
)
from hetis.solver.replanning.transition import Start, Transition, plan_transition
from hetis.solver.replanning.whole_counts import WholeCounts

FRESH_SHARE = 0.75  # share of the time for the fleet as if nothing ran on it; then of the rest, for the remaining GPUs
CHOICE_NODES = 10_000  # nodes of the search tree of each mixed program; most end at their gap after a few
ENDLESS_S = 1e15  # horizon over which no start is worth anything
MOVE_PENALTY = 1e-7  # share of the value per GPU of the fleet: a tie-break between equally good plans


@dataclass(frozen=True, slots=True, kw_only=True)
class Continued:
    """A replica of the new plan: ``old`` is the running one (None: it is new), ``start_s`` the time until it serves."""

    old: int | None
    fate: Fate
    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanning:
    """The new plan, its value including the change, and the steps to it.

    Attributes:
        plan: the new plan; its value is that once it runs, its bound that of all plans if no change cost anything.
        value: value net of the change, spread over the horizon, in the objective's unit.
        bound: no re-planning is better; ``gap`` is the distance from ``value``.
        fresh_value: value of the best plan found for the fleet as if nothing ran on it; None if none was found.
        continued: what each replica of the plan continues, in the plan's order.
        lost: running replicas that lost GPUs.
        change: the changes that the plan requires, GPU by GPU.
        transition: the order of steps; capacities are in requests/s as the objective counts them.
    """

    plan: Plan
    value: float
    bound: float
    gap: float
    fresh_value: float | None
    continued: tuple[Continued, ...]
    lost: tuple[int, ...]
    change: PlanChange
    transition: Transition


def solve_replanning(
    given: ReplanningProblem, *, strategy: str = "hetis", budget: Budget | None = None, gap_target: float = 0.001,
    seed: int = 0, report: Report = silent,
) -> Replanning:  # fmt: skip
    """Choose which running replicas continue and which new ones join them, and prove how good the choice is.

    The family is that of ``strategy`` with its replicas kept, reset, repaired and shrunk among them
    (`running.py`). With the same arguments and no time limit the answer is the same.

    Raises:
        InvalidProblemError: the strategy has no re-planning, or it cannot respect a constraint (`keeps`).
        InfeasibleError: proved that the fleet has no plan, or none within ``max_moves``.
        NoPlanFoundError: no plan was found, nor proved impossible, mostly because the budget was spent.
    """
    settings = SearchSettings(
        strategy=strategy, budget=budget or Budget(), gap_target=gap_target, seed=seed, report=report
    )
    known = [s.name for s in STRATEGIES.values() if not s.is_published and s.name != "splitwise"]
    if strategy not in known:
        raise InvalidProblemError(f"strategy {strategy!r} has no re-planning, must be one of {', '.join(known)}")
    whole = replace(given.problem, family=STRATEGIES[strategy].restrict(given.problem.family))
    problem, quiet = apply_constraints(whole), replace(settings, report=silent)
    if not keeps(whole, problem):
        raise InvalidProblemError("re-planning does not support all constraints of the problem")
    if is_nothing_left(problem):
        raise infeasible(whole, quiet)
    given = replace(given, problem=problem)
    costs = build_cost_tables(problem)
    settings.tell("cost tables")
    if not costs.ranks or is_out_of_reach(costs, demanded_rate(problem) or 0.0):
        raise infeasible(problem, quiet)
    running = Survivors(given, costs, whole.cluster)
    settings.tell("the fleet as if it were idle")
    fresh = search_fresh(costs, quiet.within(FRESH_SHARE))
    net = running.master(demanded_rate(problem))
    settings.tell("the GPUs that running replicas leave over")
    left_over = running.left_over(net, quiet.within(FRESH_SHARE))
    candidates = [*running.candidates, *_new(net, [*fresh.templates, *left_over])]
    settings.tell("which replicas to keep")
    choice = _choose(net, candidates, running, fresh, settings)
    if choice is None:
        raise _none(given, fresh, net, candidates, quiet)
    bound = bound_of(net, running.candidates, fresh, running.busy, _ends(settings))
    if fresh.prices is not None:
        settings.tell("bound over whole counts")
        proofs = WholeCounts(costs, fresh.prices, net.row_costs, quiet)
        bound, of_plan = _over_whole_counts(proofs, net, running, fresh, choice, bound, quiet)
        fresh = replace(fresh, bound=of_plan)
    answer = _answer(given, running, net, fresh, choice, bound, settings)
    plan = answer.plan if problem is whole else restored(answer.plan, problem, whole)
    return replace(answer, plan=replace(plan, family=whole.describe_family()))


def keeps(problem: PlacementProblem, searched: PlacementProblem | None = None) -> bool:
    """Return whether re-planning can respect the constraints: they only remove GPUs or sizes, or forbid duties."""
    index = (searched or apply_constraints(problem)).constraint_index
    return index is None or not index.has_rows


def _ends(settings: SearchSettings, gap: float = 1e-6) -> ProgramLimits:
    """Return when a mixed program ends; some time is left for it even after the time limit."""
    time_limit_s = max(0.5, settings.budget.remaining_s())
    return ProgramLimits(gap=gap, nodes=CHOICE_NODES, time_limit_s=time_limit_s, seed=settings.seed)


def _new(net: NetMaster, templates: Sequence[Template]) -> list[Candidate]:
    """Return the replicas that may join at all, each shape once."""
    by_shape = {template.shape: template for template in templates}
    candidates = [new_replica(t, net.start_s(t)) for t in by_shape.values()]
    most = net.inventory.limits[net.inventory.rows["moves",]] if ("moves",) in net.inventory.rows else None
    return [c for c in candidates if most is None or c.num_moved(net.costs) <= most]


def _choose(
    net: NetMaster, candidates: Sequence[Candidate], running: Survivors, fresh: Fresh, settings: SearchSettings
) -> ColumnChoice | None:
    """Return the best choice found; never worse than keeping all replicas that can be kept."""
    if not candidates:
        return None
    num_gpus = sum(c.available for c in net.costs.classes)
    penalty = MOVE_PENALTY * abs(fresh.value or 0.0) / max(1, num_gpus)
    found = net.choose(candidates, _ends(settings, gap=min(1e-6, settings.gap_target / 10)), penalty)
    if not net.master.maximises:
        return found
    unchanged = dict[int, Candidate]()
    for candidate in (each for each in running.candidates if each.fate is Fate.KEPT):
        unchanged.setdefault(candidate.running, candidate)  # the first serves what it did
    kept = tuple((c, 1) for c in unchanged.values())
    if kept and (found is None or net.value_of(found.chosen) <= net.value_of(kept)):
        return ColumnChoice(chosen=kept, value=net.value_of(kept), bound=np.inf)
    return found if found is not None and net.rate_of(found.chosen) > 0.0 else None


def _over_whole_counts(
    proofs: WholeCounts, net: NetMaster, running: Survivors, fresh: Fresh, choice: ColumnChoice, bound: float,
    settings: SearchSettings,
) -> tuple[float, float]:  # fmt: skip
    """Return better bounds on every re-planning, and on every plan if no change cost anything, in the master's unit.

    The second, which is often proved sooner, is also one on re-plannings: the costs of a change only take away.
    """
    options, busy = running.candidates, running.busy
    then = running.master(net.master.demand, changes_cost=False)
    of_plan = bound_of(then, options, fresh, busy, _ends(settings))
    of_plan = proofs.bound(then, options, busy, then.value_of(choice.chosen), of_plan)
    dropped = running.all_dropped(net)
    bound = min(bound, of_plan + dropped) if net.master.maximises else max(bound, of_plan - dropped)
    return proofs.bound(net, options, busy, net.value_of(choice.chosen), bound), of_plan


def _none(
    given: ReplanningProblem, fresh: Fresh, net: NetMaster, candidates: Sequence[Candidate], settings: SearchSettings
) -> InfeasibleError | NoPlanFoundError:
    """Return the error that explains why there is nothing to choose."""
    if fresh.value is not None and _starts_too_late(net, candidates):
        least = f"every start takes at least {net.least_start_s():.4g} s"
        return InfeasibleError((f"nothing serves within {given.costs.horizon_s:.4g} s: {least}",))
    # Without candidates there was nothing to settle: every replica moves a GPU, or every shape of the family was seen.
    is_settled = net.is_settled or (not candidates and (given.max_moves == 0 or fresh.enumerated is not None))
    is_proved = fresh.is_empty if fresh.value is None else given.max_moves is not None and is_settled
    # A limited search gives its parts shares of its time, so one of them may have ended early.
    if settings.budget.is_spent() or (not is_proved and math.isfinite(settings.budget.time_limit_s)):
        return settings.stopped()
    if not is_proved:
        return NoPlanFoundError("no plan was found, nor was it proved that there is none")
    if fresh.value is None:
        return infeasible(given.problem, settings)
    demand = given.problem.objective.demand_rps
    serving = "" if demand is None or given.problem.objective.maximises else f" that serves {demand:.4g} requests/s"
    reason = f"at most {given.max_moves} GPUs may change their work, and no plan{serving} needs so few"
    return InfeasibleError((reason,))


def _starts_too_late(net: NetMaster, candidates: Sequence[Candidate]) -> bool:
    """Return whether it is proved that nothing serves within the horizon: all replicas would have to start first."""
    horizon_s, starts_s = net.change_costs.horizon_s, [candidate.start_s for candidate in candidates]
    return net.master.maximises and min([net.least_start_s(), *starts_s]) >= horizon_s


def _answer(
    given: ReplanningProblem, running: Survivors, net: NetMaster, fresh: Fresh, choice: ColumnChoice, bound: float,
    settings: SearchSettings,
) -> Replanning:  # fmt: skip
    costs, problem, scale = net.costs, given.problem, objective_scale(given.problem)
    value = net.value_of(choice.chosen)
    bound = sound_bound(bound, value, maximises=net.master.maximises)
    dropped = running.all_dropped(net)
    value, bound = (v - dropped if net.master.maximises else v + dropped for v in (value, bound))
    chosen = [candidate for candidate, count in choice.chosen for _ in range(count)]
    bound_stages = name_gpus(costs, running.places, chosen, holdings(given.running))
    outcome = _outcome(net, fresh, choice, interrupted=settings.budget.cancelled.is_set())
    templates = [c.template for c in chosen]
    plan = plan_of(costs, settings.strategy, outcome, templates, bound_stages, settings.budget)
    change = plan_change(given.running, plan, problem.model, problem.moments_of_ranges())
    return Replanning(
        plan=plan,
        value=scale * value,
        bound=scale * bound,
        gap=abs(bound - value) / abs(value) if value else 0.0,
        fresh_value=None if fresh.value is None else scale * fresh.value,
        continued=tuple(Continued(old=c.old, fate=c.fate, start_s=c.start_s) for c in chosen),
        lost=running.lost,
        change=change,
        transition=_transition(given, running, net, plan, chosen),
    )


def _outcome(net: NetMaster, fresh: Fresh, choice: ColumnChoice, *, interrupted: bool) -> Outcome:
    """Return the choice as an outcome of a placement search: its worth once it runs, and the bound on all plans."""
    maximises, prices = net.master.maximises, fresh.prices
    by_template = Counter[Template]()
    for candidate, count in choice.chosen:
        by_template[candidate.template] += count
    value = net.rate_of(choice.chosen) if maximises else net.rent_of(choice.chosen)
    return Outcome(
        chosen=tuple(by_template.items()),
        value=value,
        bound=sound_bound(fresh.bound, value, maximises=maximises),
        row_prices=prices.row_prices if prices is not None else fresh.row_prices,
        rate_prices=prices.rate_prices if prices is not None else np.ones(net.costs.routes.num_sides),
        flows=net.flows_of(choice.chosen),
        interrupted=interrupted,
    )


def _transition(
    given: ReplanningProblem, running: Survivors, net: NetMaster, plan: Plan, chosen: Sequence[Candidate]
) -> Transition:  # fmt: skip
    """Return the order of steps; capacities are goodputs, or saturated rates if throughput is the objective.

    Routers send replicas that stay the requests of their new classes from the first step on.
    """
    scale = given.problem.planned_share
    replicas, shares = given.running.replicas, given.running.class_shares()
    runs = [i for i in range(len(replicas)) if i not in running.lost]
    stays = {c.running: c.template for c in chosen if c.fate is Fate.KEPT}
    owner = {device: i for i in runs for device in replicas[i].devices()}
    starts = [
        Start(
            replica=number,
            needs=frozenset(owner[device] for device in plan.replicas[number].devices() if device in owner),
            start_s=candidate.start_s,
        )
        for number, candidate in enumerate(chosen)
        if candidate.fate is not Fate.KEPT
    ]

    def served(templates: Sequence[Template | None], olds: frozenset[int], news: frozenset[int]) -> float:
        serving = [t for i in sorted(olds) if (t := templates[i]) is not None]
        serving += [chosen[number].template for number in sorted(news)]
        # Those without a template have the rate that the running plan states, if they serve by themselves.
        stated = defaultdict[tuple[str, ...], float](float)
        for replica in (replicas[i] for i in olds if templates[i] is None and replicas[i].role is Role.UNIFIED):
            stated[replica.classes] += replica.rate
        return scale * (net.rate_of([(new_replica(t), 1) for t in serving]) + served_with_classes(shares, stated))

    then = [stays.get(i, template) for i, template in enumerate(running.templates)]
    found = plan_transition(runs, [*stays], starts, cache(partial(served, then)))
    return found.since(served(running.templates, frozenset(runs), frozenset()))


# --- running replicas: how each may continue, the worth of staying, the GPUs they leave free


class Survivors:
    """The replicas of a running plan.

    Attributes:
        places: the place of every GPU that exists now and may be used.
        lost: replicas that lost GPUs. All others run.
        templates: each running replica as a template; None: it lost GPUs, or the family and fleet have none like it,
            for example because a stage is on nodes that differ now. It cannot continue then.
        candidates: every way in which a replica may continue.
        stay_rates, stay_shares: requests/s over the horizon that are not lost if a replica stays; the same relative to
            its rate, of those that have a template.
        keepable: replicas that may continue unchanged.
        busy: GPUs of each class that do something in the running plan.
    """

    def __init__(self, given: ReplanningProblem, costs: CostTables, fleet: Cluster | None = None) -> None:
        """``fleet``: the GPUs that exist, if constraints exclude some of those of the problem as it is searched."""
        self.given, self.costs = given, costs
        self.places = places_of(given.problem.cluster, costs)
        self.continuations = Continuations(costs, self.places, given.costs, given.running)
        replicas = given.running.replicas
        self.templates = [self.continuations.template_now(i, replica) for i, replica in enumerate(replicas)]
        self.candidates = [o for i, replica in enumerate(replicas) for o in self.continuations.options(i, replica)]
        horizon_s = given.costs.horizon_s
        there = {device.name: device.gpu for device in (fleet or given.problem.cluster).devices()}
        self.lost = tuple(i for i, replica in enumerate(replicas) if has_lost(replica, there))
        whole = {i: template for i, template in enumerate(self.templates) if template is not None}
        runs = (i for i in range(len(replicas)) if i not in self.lost)
        self.stay_rates = {i: HALF_DONE * replicas[i].planned_seats / horizon_s for i in runs}
        self.stay_shares = {i: min(1.0, self.stay_rates[i] / template.rate) for i, template in whole.items()}
        held = holdings(given.running)
        self.busy = Counter(p.device_class for d, p in self.places.items() if d in held and held[d].gpu == p.gpu)
        self.keepable = {option.running for option in self.candidates if option.fate is Fate.KEPT}

    def master(self, demand: float | None, *, changes_cost: bool = True) -> NetMaster:
        """Return the master of the re-planning; without costs of change, that of what runs once it is done."""
        if not changes_cost:
            costs = replace(self.given.costs, horizon_s=ENDLESS_S)
            return NetMaster(inventory_of(self.costs, self.places, self.candidates, (), None), costs, demand, {}, {})
        stays = {old: self.stay_rates[old] for old in self.keepable} if demand is None else {}
        inventory = inventory_of(self.costs, self.places, self.candidates, stays, self.given.max_moves)
        return NetMaster(inventory, self.given.costs, demand, stays, self.stay_shares)

    def all_dropped(self, net: NetMaster) -> float:
        """Return the loss if no running replica is kept, relative to which the master counts gains, in net's unit."""
        if net.master.maximises:
            return sum(self.stay_rates.values())
        rent = {i: net.rent_of([(new_replica(t), 1)]) for i, t in enumerate(self.templates) if t is not None}
        return sum(share * rent[i] for i, share in self.stay_shares.items())

    def left_over(self, net: NetMaster, settings: SearchSettings) -> tuple[Template, ...]:
        """Return new replicas to add to all whole running ones; none if those already serve the whole demand."""
        stay: dict[int, Candidate] = {}
        for option in (option for option in self.candidates if option.fate is not Fate.CHANGED):
            best = stay.setdefault(option.running, option)
            ranges = {self.costs.scopes[each.template.scope].number for each in (option, best)}
            if len(ranges) == 1 and option.template.rate > best.template.rate:
                stay[option.running] = option
        if not stay or self.given.max_moves == 0:
            return ()
        taken = {name for option in stay.values() for name in option.named()}
        problem, demand_rps = self.given.problem, None
        if not problem.objective.maximises:
            served = net.rate_of([(c, 1) for c in stay.values()]) * problem.assumptions.planned_utilisation
            assert problem.objective.demand_rps is not None
            demand_rps = problem.objective.demand_rps - served
            if demand_rps <= 0.0:
                return ()
        return search_left_over(self.costs, taken, demand_rps, settings)
