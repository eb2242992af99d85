"""Climbing rungs: the best plan of each rung, each with its own bound, and the rung whose complexity is worth it.

A rung above another is chosen by default only if its plan gains at least a share of what is kept, also under errors of
the profiles (the same draws for both plans), if no less is left without the worst node, nor less than half of its
service, and if an export carries it. A rung that keeps several times as much is worth it whatever is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.planner.use_cases.grouping import group_replicas, shapes_of
from hetis.planner.use_cases.prices import price_of_plan
from hetis.planner.use_cases.record.forms import LITTLE_LEFT, RungFound
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan, Profiles
from hetis.planner.use_cases.robustness.profile_errors import scaled_by, tp_sizes, used_fits
from hetis.profiler.ranges import range_factors
from hetis.solver.advice import worst_loss
from hetis.solver.budget import Budget
from hetis.solver.cluster import node_of
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.placement.rungs import RUNGS, Known, lowest_rung, rungs_of
from hetis.solver.plan import AttentionWorkerPool, Plan, ReplicaPlan, StagePlan
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit

DEFAULT_WORTH = 0.1
WORTH_A_LOSS = 3.0  # gain from which the simpler plan, even whole, serves too little to be kept for what a loss leaves
LEAST_LAYERS = 4  # of each of several stages, unless no other plan fits
DRAWS = 21  # profiles with errors under which two plans are compared
MISSED = 2  # of these in which a rung may gain too little
MOST_FEW = 2  # nodes of a replica, to which those of a rung's plan are limited if more are not worth it
MOST_WIDE = 0.5  # of the rate: if replicas of more nodes have a larger share of it, fewer nodes are not tried
FALLS_SHORT = 0.75  # of its planned value: a simulated plan that keeps less is compared with those of higher rungs
SAME = 1e-6  # ratio below which two values are the same
HIGHEST = next(reversed(RUNGS))

# Returns the best plan of a problem, which may be that of a smaller family; raises InfeasibleError, NoPlanFoundError.
Find = Callable[[PlacementProblem, Budget, Known | None], Plan]
Simplify = Callable[[Plan, PlacementProblem], Plan]  # the simplest of the plans that lose little against one
Carriers = Callable[[Plan, PlacementProblem], Mapping[str, Sequence[str]]]  # by export target: why not all of a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Climbing:
    """How rungs are chosen.

    Attributes:
        rung: the rung that was requested; empty: the one that is worth it.
        worth: the share of the kept rate (or of the cost) that a rung must gain over a simpler one.
        target: the export target that must carry the plan; empty: any one.
        least_layers: layers of each of several stages, unless nothing else fits.
        survive: ``node`` or ``zone`` if plans survive the loss of one; empty: they need not.
        by_what_is_left: whether a rung's gain is what is left after the loss, if the rate is maximised.
        carriers: what each export target cannot carry; None: not known, and not required.
    """

    rung: str = ""
    worth: float = DEFAULT_WORTH
    target: str = ""
    least_layers: int = 1
    survive: str = ""
    by_what_is_left: bool = False
    carriers: Carriers | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Climbed:
    """The chosen plan, the problem of its rung, what all rungs reach, and the best plans of others that are permitted.

    ``rung`` is empty if rungs were not climbed. The simplest of the ``others`` comes last.
    """

    plan: Plan
    problem: PlacementProblem
    rung: str = ""
    rungs: tuple[RungFound, ...] = ()
    others: tuple[Climbed, ...] = ()


def climb(
    find: Find, budget: Budget, problem: PlacementProblem, strategy: str, how: Climbing,
    simplify: Simplify = lambda plan, _: plan,
) -> Climbed:  # fmt: skip
    """Search each rung of a problem of an engine, and choose one, whose plan is simplified.

    If no rung has a plan, the whole problem, up to the requested rung, is searched to say why.

    Raises:
        InfeasibleError: no rung has a plan, or none up to the requested one, or that the target carries.
        NoPlanFoundError: none was found in time.
    """
    strict = with_least_layers(problem, how.least_layers)
    found = _Rungs(find, budget, strict, strategy, how)
    if not found.plans and strict is not problem:
        found = _Rungs(find, budget, problem, strategy, how)
    if found.plans:
        return found.chosen(simplify)
    families = found.families
    top = next((name for name in reversed(families) if _is_up_to(name, how.rung)), [*families][-1])
    posed = replace(problem, family=families[top])
    return Climbed(plan=simplify(find(posed, budget, None), posed), problem=posed, rung=top)


def _is_below(name: str, other: str) -> bool:
    return name != other and _is_up_to(name, other)


def _is_up_to(name: str, other: str) -> bool:
    order = list(RUNGS)
    return other in order and order.index(name) <= order.index(other)


def may_replace(other: Climbed, found: Climbed, worth: float, within: float = 0.0) -> bool:
    """Return whether the plan of another rung, by its value, is to be used instead of a simulated one.

    A simpler one is if it keeps more, or keeps its demand where the other misses it; of a higher rung, if the simulated
    one keeps far less than planned, by the rule for rungs.
    """
    plan, simulated = other.plan, Verified.of(found.plan)
    if simulated.verification is None:
        return False
    if not plan.objective.maximises:
        missed = Verified.of(plan).verification
        return not simulated.verification.kept and (missed is None or missed.kept)
    if _is_below(other.rung, found.rung):
        return found.plan.result.value < (1.0 - within) * plan.result.value
    if found.plan.result.value > FALLS_SHORT * (simulated.model_value or 0.0):
        return False
    rows = {row.name: row for row in found.rungs}
    row, mine, gain = rows[other.rung], rows[found.rung], gain_of(plan, found.plan)
    leaves = row.left_share * plan.result.value >= mine.left_share * found.plan.result.value
    return gain >= WORTH_A_LOSS or (gain >= worth and leaves and not _leaves_little(row, mine))


def _leaves_little(row: RungFound, other: RungFound) -> bool:
    return row.left_share < min(LITTLE_LEFT, other.left_share * (1.0 - SAME))


def with_least_layers(problem: PlacementProblem, least: int) -> PlacementProblem:
    """Return the problem without stages of fewer layers, of which a small model has at most two."""
    engine = problem.family.engine
    least = min(least, problem.model.num_layers // 2)
    if engine is None or least <= engine.min_layers:
        return problem
    return replace(problem, family=replace(problem.family, engine=replace(engine, min_layers=least)))


def _no_worse(plan: Plan, below: Plan, how: Climbing) -> Plan:
    """Return the plan of a rung, or that of the rung below if it is better, with the bound of this one."""
    if how.survive or gain_of(below, plan) <= SAME:
        return plan
    tightest = max if plan.objective.maximises else min
    bound = tightest(plan.result.bound, below.result.value)
    return replace(below, family=plan.family, result=below.result.bounded_by(bound))


class _Rungs:
    """The plans of the rungs of one problem."""

    def __init__(self, find: Find, budget: Budget, problem: PlacementProblem, strategy: str, how: Climbing) -> None:
        self._problem, self._how, self._find, self._budget = problem, how, find, budget
        self.families = rungs_of(problem.family, strategy)
        self.plans = dict[str, Plan]()
        self._why_not = dict[str, str]()
        for number, (name, family) in enumerate(self.families.items()):
            own = budget.share(1.0 / (len(self.families) - number), explains=False)
            below = next(reversed(self.plans), "")
            known = Known(self.plans[below], self.families[below]) if below else None
            try:
                plan = find(replace(problem, family=family), own, known)
            except (InfeasibleError, NoPlanFoundError) as error:
                self._why_not[name] = str(error)
                continue
            self.plans[name] = plan if known is None else _no_worse(plan, known.plan, how)

    def chosen(self, simplify: Simplify) -> Climbed:
        """Return the plan of the requested rung, or of the highest that is worth it."""
        rows = dict[str, RungFound]()
        for name in RUNGS:
            rows[name] = self._row(name, self.plans.get(name), rows)
        name = self._requested() if self._how.rung else self._worthwhile(rows)
        simple = simplify(self.plans[name], self._climbed(name).problem)
        if simple is not self.plans[name]:
            self.plans[name] = simple
            rows[name] = self._row(name, simple, {})
        self._require_target(rows[name])
        marked = tuple(replace(row, is_chosen=row.name == name) for row in rows.values())
        others = tuple(self._climbed(row.name) for row in reversed(marked) if self._is_another(row, rows[name]))
        return replace(self._climbed(name), rungs=marked, others=others)

    def _climbed(self, name: str) -> Climbed:
        return Climbed(plan=self.plans[name], problem=replace(self._problem, family=self.families[name]), rung=name)

    def _is_another(self, row: RungFound, chosen: RungFound) -> bool:
        """Return whether a rung has a plan of its own that may be used instead of the chosen one."""
        is_own = row.of == row.name != chosen.of
        return is_own and self._is_carried(row) and not (self._how.rung and _is_up_to(chosen.name, row.name))

    def _requested(self) -> str:
        """Return the highest rung with a plan that is not above the requested one.

        Raises:
            InfeasibleError: only higher rungs have plans.
        """
        rung = self._how.rung
        up_to = [name for name in self.plans if _is_up_to(name, rung)]
        if not up_to:
            higher = next(iter(self.plans))
            why = self._why_not.get(rung, "its strategy and roles have no such replicas")
            raise InfeasibleError((f"no plan is on rung {rung}: {why}", f"rung {higher} has one: --rung {higher}"))
        return up_to[-1]

    def _require_target(self, row: RungFound) -> None:
        """Raise InfeasibleError if the requested export target does not carry the rung's plan."""
        target, carriers = self._how.target, self._how.carriers
        if target and carriers is not None and target not in (row.targets or ()):
            reasons = carriers(self.plans[row.name], self._problem).get(target, ())
            raise InfeasibleError((f"export target {target} does not carry the plan of rung {row.name}", *reasons))

    def _worthwhile(self, rows: dict[str, RungFound]) -> str:
        best = ""
        for name, plan in [*self.plans.items()]:
            if not self._is_carried(rows[name]):
                continue
            if not best or not self._why_not_worth(plan, self.plans[best], rows[name], rows[best]):
                self._use_fewer_nodes(name, best, rows)
                best = name
        return best or next(iter(self.plans))

    def _use_fewer_nodes(self, name: str, best: str, rows: dict[str, RungFound]) -> None:
        """Replace a rung's plan by one whose replicas have fewer nodes each, if more are not worth it.

        As between rungs, it must be worth it over the ``best`` plan of simpler ones. Nothing is searched where replicas
        of more nodes carry most of the traffic.
        """
        plan, row, family = self.plans[name], rows[name], self.families[name]
        if row.of != name or self._how.survive or self._how.by_what_is_left or family.engine is None:
            return
        known = Known(self.plans["node"], self.families["node"]) if "node" in self.plans else None
        for most in range(1, min(row.nodes or 1, MOST_FEW + 1)):
            narrow = replace(family, engine=replace(family.engine, max_nodes=most))
            wide = sum(one.rate for one in plan.replicas if _nodes_of(one) > most)
            if narrow in self.families.values() or wide > MOST_WIDE * sum(one.rate for one in plan.replicas):
                continue
            budget = self._budget.share(0.5, explains=False)
            try:
                fewer = self._find(replace(self._problem, family=narrow), budget, known)
            except (InfeasibleError, NoPlanFoundError):
                continue
            known, result = Known(fewer, narrow), fewer.result.bounded_by(plan.result.bound)
            fewer = replace(fewer, family=plan.family, result=result)
            own = self._row(name, fewer, {})
            is_better = not best or not self._why_not_worth(fewer, self.plans[best], own, rows[best])
            if is_better and self._is_carried(own) and (why := self._why_not_worth(plan, fewer, row, own)):
                note = f"replicas over up to {row.nodes} nodes instead of {most} would gain {why}: --rung {name}"
                self.plans[name], rows[name] = replace(fewer, notes=(*fewer.notes, note)), own
                return

    def _is_carried(self, row: RungFound) -> bool:
        if self._how.carriers is None:
            return True
        return self._how.target in (row.targets or ()) if self._how.target else bool(row.targets)

    def _why_not_worth(self, plan: Plan, simpler: Plan, row: RungFound, other: RungFound) -> str:
        """Return what a plan gains over a simpler one, and why that is not enough; empty: it is worth it."""
        gain = gain_of(plan, simpler)
        if self._how.by_what_is_left and plan.objective.maximises and other.left_rps:
            gain = (row.left_rps or 0.0) / other.left_rps - 1.0
        counts_losses = self._how.survive or self._how.by_what_is_left or gain < WORTH_A_LOSS
        posed = replace(self._problem, objective=plan.objective)
        if gain < self._how.worth:
            return f"{gain:.1%}"
        if counts_losses and self._leaves_less(row, other):
            return f"{gain:.1%}, and a loss leaves {row.left_share:.0%} instead of {other.left_share:.0%}"
        if not gains_under_errors(plan, simpler, posed, self._how.worth):
            return f"{gain:.1%}, but under the profiles' errors often less than {self._how.worth:.0%}"
        return ""

    def _leaves_less(self, row: RungFound, other: RungFound) -> bool:
        """Return whether a rung leaves less than a simpler one after the worst loss, or too little of its service."""
        leaves_fewer = (row.left_rps or 0.0) < (other.left_rps or 0.0) * (1.0 - SAME)
        return leaves_fewer or (not self._how.by_what_is_left and _leaves_little(row, other))

    def _row(self, name: str, plan: Plan | None, lower: Mapping[str, RungFound]) -> RungFound:
        if plan is None:
            why = "the same as the rung below" if name not in self.families else self._why_not[name]
            return RungFound(name=name, why_not=why)
        of = lowest_rung(plan.replicas).name
        if of in lower and lower[of].value is not None and shapes_of(plan) == shapes_of(self.plans[of]):
            return replace(lower[of], name=name, bound=plan.result.bound)
        lost = worst_loss(plan, self._problem, self._how.survive or "node")
        rate = plan.planned_rate()
        carriers = self._how.carriers
        return RungFound(
            name=name,
            value=plan.result.value,
            bound=plan.result.bound,
            rate_rps=rate,
            usd_per_hour=price_of_plan(plan, self._problem.cluster),
            gpus=len(set(plan.devices())),
            left_rps=0.0 if lost is None else rate * lost.share,
            shapes=len(set(shapes_of(plan))),
            nodes=max(map(_nodes_of, plan.replicas)),
            of=of,
            targets=None
            if carriers is None
            else tuple(name for name, lost in carriers(_one_of_each(plan), self._problem).items() if not lost),
        )


def _nodes_of(replica: ReplicaPlan) -> int:
    return len({node_of(device) for device in replica.devices()})


def _one_of_each(plan: Plan) -> Plan:
    """Return the plan with one of its replicas of each shape, as far as that says which targets carry all of it.

    That is so if no replica exchanges KV, and no node has several GPU types, for which targets have reasons.
    """
    types = defaultdict[str, set[str]](set)
    for replica in plan.replicas:
        parts: list[StagePlan | AttentionWorkerPool] = [*replica.stages, *replica.attention_workers]
        for part in parts:
            for device in part.devices:
                types[node_of(device)].add(part.gpu)
    if plan.kv_routes or plan.classes or max(map(len, types.values()), default=0) > 1:
        return plan
    kept = dict[object, ReplicaPlan]()
    for group in group_replicas(plan.replicas):
        for number in group.numbers:
            replica = plan.replicas[number]
            nodes = dict.fromkeys(map(node_of, replica.devices()))
            order = {node: i for i, node in enumerate(nodes)}
            kept.setdefault((group.numbers[0], *(order[node_of(name)] for name in replica.devices())), replica)
    return replace(plan, replicas=tuple(kept.values()))


def gain_of(plan: Plan, other: Plan) -> float:
    """Return what a plan gains over another, as a ratio: more rate, or the same demand for less."""
    one, two = plan.result.value, other.result.value
    if plan.objective.maximises:
        return one / two - 1.0 if two else float("inf")
    return two / one - 1.0 if one else 0.0


def gains_under_errors(plan: Plan, other: Plan, problem: PlacementProblem, worth: float, seed: int = 0) -> bool:
    """Return whether a plan gains a share over another if profiles are off by the errors that they state.

    Both are priced with the same draws, in which every fit has a factor of its own, and the plan may gain too little in
    a few. A plan for a demand counts with what it serves of the demand for its cost.

    Rates fall with all times. So no draw is needed if the plan gains enough with every fit as slow, and the other with
    every fit as fast, as their errors allow; or if it gains too little the other way round.
    """
    mine, its = FixedPlan(plan, problem), FixedPlan(other, problem)
    gpus = sorted(mine.gpus | its.gpus)
    sizes = tp_sizes(plan, problem) | tp_sizes(other, problem)
    profiles = used_fits({gpu: problem.profiles[gpu] for gpu in gpus}, problem.model, sizes)
    fastest = scaled_by(profiles, lambda _gpu, fit: range_factors(fit)[0])
    slowest = scaled_by(profiles, lambda _gpu, fit: range_factors(fit)[1])

    def gains(under: Profiles, others: Profiles) -> bool:
        rate, least = _worth_of(mine.planned_rate(under), plan), _worth_of(its.planned_rate(others), other)
        return rate >= (1.0 + worth) * least

    if gains(slowest, fastest):
        return True
    if not gains(fastest, slowest):
        return False
    rng, missed = np.random.default_rng(seed), 0

    def factor(_gpu: str, fit: Fit) -> float:
        low, high = range_factors(fit)
        return float(rng.uniform(low, high))

    for _ in range(DRAWS):
        drawn = scaled_by(profiles, factor)
        missed += not gains(drawn, drawn)
        if missed > MISSED:
            return False
    return True


def _worth_of(rate: float, plan: Plan) -> float:
    """Return a plan's rate, or of a plan for a demand what it serves of it for its cost."""
    if plan.objective.maximises:
        return rate
    demand = plan.objective.demand_rps or 0.0
    return min(rate, demand) / plan.result.value if plan.result.value else rate
