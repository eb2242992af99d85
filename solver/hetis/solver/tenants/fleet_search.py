"""`FleetSearch`: a plan for each tenant on disjoint GPUs, by a rule, with a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.budget import Budget, Progress, Report, SearchSettings, silent
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.columns import columns_of, padded
from hetis.solver.placement.constrained_problem import restored
from hetis.solver.placement.enumeration import ColumnPrices
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.infeasible import ExplainedInfeasibleError, why_infeasible
from hetis.solver.placement.master import Master, settled
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.policy import RELAXATION_TOLERANCE
from hetis.solver.placement.replicas.tables import BoolArray, CostTables, FloatArray
from hetis.solver.placement.replicas.template import Template
from hetis.solver.placement.solve import plan_of
from hetis.solver.plan import OPTIMAL_GAP, Plan, Status
from hetis.solver.tenants.joint_master import (
    TenantColumns,
    TenantsChoice,
    TenantsGoal,
    TenantsRelaxation,
    choose_whole,
    solve_relaxation,
)
from hetis.solver.tenants.tenancy import (
    FleetShares,
    PriceProof,
    RowPrice,
    Tenancy,
    Tenant,
    TenantRule,
    TenantShare,
)
from hetis.solver.tenants.tenant_replicas import TenantReach, TenantReplicas, bind_together, part_of

SHARED = ("hetis", "hexgen", "hexgen2")  # strategies whose families can share a fleet
NODES = 2_000  # nodes of the search tree of each choice of whole counts, whose columns are likely ones
PROOF_NODES = 20_000  # the same of a choice that proves a bound
LEAST_S = 1.0  # seconds for a choice even after the time limit, since some counts are needed
PART_SECONDS = 10.0  # seconds for the rate of a tenant on a part of the fleet, its own or another tenant's
ROUNDING = 1e-9  # ratio by which a floor is lowered, so that a rate reached before can be reached again
MAX_ROUNDS = 100
LIKELY, MANY_LIKELY = 50, 400  # columns of each side of a tenant with the least reduced costs; a few soon do
MOST_PROVED = 2000  # maximum columns of a proof over whole counts


class FleetSearch:
    """The search on one fleet: each tenant's rate alone and on its part, then any rule; columns are kept between rules.

    Raises:
        InvalidProblemError: the strategy has no family that can be shared, or a tenant's has no engine.
        ExplainedInfeasibleError: it is proved that a tenant does not fit on the fleet, even alone.
        NoPlanFoundError: the budget was spent before every tenant had a plan alone.
    """

    def __init__(
        self, tenancy: Tenancy, *, strategy: str = "hetis", budget: Budget | None = None, gap_target: float = 0.005,
        seed: int = 0, report: Report = silent,
    ) -> None:  # fmt: skip
        if strategy not in SHARED:
            raise InvalidProblemError(f"strategy {strategy!r} cannot be shared, must be one of {', '.join(SHARED)}")
        self.budget = budget if budget is not None else Budget()
        self.settings = SearchSettings(strategy=strategy, gap_target=gap_target, seed=seed)
        self.report = report
        restrict = STRATEGIES[strategy].restrict
        self.tenants = tuple(
            replace(t, problem=replace(t.problem, family=restrict(t.problem.family))) for t in tenancy.tenants
        )
        self.tenancy = Tenancy(tenants=self.tenants)  # with the searched families
        self.replicas = [TenantReplicas(tenant, self.settings) for tenant in self.tenants]
        self.limits = self.replicas[0].costs.resources.limits
        self.alone = tuple(self._alone(one) for one in self.replicas)
        self.parts = tuple(
            self.reach(one, part_of(self.limits, claim), f"{one.tenant.name} on its part of the fleet")
            for one, claim in zip(self.replicas, tenancy.claims, strict=True)
        )
        for one, *reaches in zip(self.replicas, self.alone, self.parts, strict=True):
            one.keep(reaches)
        # The highest level, once it has been searched.
        self._highest: tuple[TenantsChoice, Proven] | None = None
        # Choices that may suit the next rule: every tenant on its part, as the incentive requires, and earlier rules'.
        counts = tuple(one.counts_of(part) for one, part in zip(self.replicas, self.parts, strict=True))
        self._known = [TenantsChoice(counts, self._normalised_parts, np.inf)]

    @property
    def _normalised_parts(self) -> FloatArray:
        """Return every tenant's rate on its part of the fleet relative to its rate alone, [tenants]."""
        return np.array([part.rate / alone.rate for part, alone in zip(self.parts, self.alone, strict=True)])

    def _alone(self, one: TenantReplicas) -> TenantReach:
        name = one.tenant.name
        found = self.reach(one, self.limits, f"{name} alone on the whole fleet")
        if found.rate > 0.0:
            return found
        if self.budget.is_spent() or found.bound > 0.0:
            raise NoPlanFoundError(f"no plan for {name} found within {self.budget.elapsed_s():.1f} s; allow more time")
        nobody = f"tenant {name} can be served by no replica on this fleet, even alone"
        settings = replace(self.settings, budget=self.budget, report=self.report)
        why = why_infeasible(one.tenant.problem, settings)
        raise ExplainedInfeasibleError((nobody, *why.reasons), why)

    def reach(self, one: TenantReplicas, limits: IntArray, phase: str) -> TenantReach:
        """Return a tenant's rate with these amounts of every row of the inventory."""
        self.report(Progress(phase=phase, elapsed_s=self.budget.elapsed_s()))
        budget = self.budget
        if not np.array_equal(limits, self.limits):
            time_limit_s = min(PART_SECONDS, max(0.0, budget.remaining_s()))
            budget = Budget(time_limit_s=time_limit_s, clock=budget.clock, cancelled=budget.cancelled)
        return one.reach(limits, budget)

    # --- one rule

    def share(self, rule: TenantRule) -> FleetShares:
        """Return replicas for every tenant under a rule.

        Raises:
            NoPlanFoundError: the budget was spent before whole replicas that satisfy the rule were found.
        """
        claims = np.array([tenant.weight for tenant in self.tenants])
        gains = np.array([worth(t, a) * a.rate for t, a in zip(self.tenants, self.alone, strict=True)])
        floors = none = np.zeros(len(claims))
        level, best_level = None, 0.0
        if rule.has_level:
            goal = TenantsGoal(gains, none, claims)
            if self._highest is None:  # both rules with a level raise it in the same way
                self._highest = self._solve(goal, "the least rate")
            choice, level = self._highest
            best_level = choice.value(goal)
            floors = claims * best_level
        elif rule is TenantRule.SHARING_INCENTIVE:
            floors = self._normalised_parts
        goal = TenantsGoal(gains, floors * (1.0 - ROUNDING))
        if rule is TenantRule.EQUAL_THROUGHPUT:
            assert level is not None, "the rule has a level"
            choice, granted = self._fewest(goal.floors, choice), claims * best_level
            value, proven = float(gains @ granted), Proven(float(gains @ claims) * level.bound, level.proof)
        else:
            choice, proven = self._solve(goal, "total value")
            value, granted = choice.value(goal), choice.rates
        return self._answer(rule, choice, granted, value, proven, level)

    def _solve(self, goal: TenantsGoal, phase: str) -> tuple[TenantsChoice, Proven]:
        """Return the best choice found, and what is proved: first by prices, then over whole counts."""
        relaxed, is_whole = self._relax(goal)
        proven = Proven(self._bound_alone(goal), None)
        if relaxed is not None and is_whole:
            proof = self._proof(goal, relaxed)
            proven = Proven(min(proven.bound, proof.bound), proof)
        choice = self._choose(goal, relaxed, proven.bound, phase)
        if relaxed is not None and is_whole and choice is not None:
            choice, proven = self._prove(goal, relaxed, choice, proven)
        if choice is None:
            raise NoPlanFoundError(f"no whole replicas found within {self.budget.elapsed_s():.1f} s; allow more time")
        return choice, replace(proven, bound=max(proven.bound, choice.value(goal)))

    def _relax(self, goal: TenantsGoal) -> tuple[TenantsRelaxation | None, bool]:
        """Return the relaxation, and whether it is that over all replicas of the tenants' families."""
        relaxed = None
        for _ in range(MAX_ROUNDS):
            relaxed = solve_relaxation(self._columns(), self.limits, goal)
            if relaxed is None or self.budget.is_spent():
                break
            self.report(Progress(phase="looking for better replicas of all tenants", elapsed_s=self.budget.elapsed_s()))
            prices = self._prices(relaxed)
            are_none = [
                one.enumerated.list_improving(own, self.budget) for one, own in zip(self.replicas, prices, strict=True)
            ]
            if all(are_none):
                return relaxed, True
        return relaxed, False

    def _prices(self, relaxed: TenantsRelaxation) -> list[ColumnPrices]:
        """Return the prices of each tenant's replicas, whose rates are saturated."""
        found = []
        for one, alone, rate_prices in zip(self.replicas, self.alone, relaxed.rate_prices, strict=True):
            side_prices = np.tile(relaxed.row_prices, (len(rate_prices), 1))
            found.append(ColumnPrices(side_prices, 0.0, one.scale / alone.rate * rate_prices))
        return found

    def _bound_alone(self, goal: TenantsGoal) -> float:
        """Return a bound known before any pricing: no tenant exceeds its bound alone."""
        most = np.array([reach.bound / reach.rate for reach in self.alone])
        return float(goal.gains @ most) if goal.claims is None else float((most / goal.claims).min())

    def _choose(
        self, goal: TenantsGoal, relaxed: TenantsRelaxation | None, bound: float, phase: str
    ) -> TenantsChoice | None:
        """Return whole counts of the likeliest columns; never worse than an earlier rule's choice."""
        columns = self._columns()
        earlier = [choice.of_more(columns) for choice in self._known]
        best = max(earlier, key=lambda choice: choice.value(goal))
        # First near the relaxation: of many replicas most are fixed. Then anywhere, while the gap is too large.
        for num, is_near in ((LIKELY, True), (LIKELY, False), (MANY_LIKELY, False)):
            if relaxed is not None and bound - best.value(goal) > self.settings.gap_target * best.value(goal):
                which = [likeliest(relaxed, i, block, num) for i, block in enumerate(columns)]
                best, _ = self._improved(goal, columns, which, best, relaxed if is_near else None)
        if best.value(goal) == -np.inf:
            return None
        self._known.append(best)
        value = best.value(goal)
        self.report(Progress(phase=f"whole counts: {phase}", elapsed_s=self.budget.elapsed_s(), incumbent=value))
        return best

    def _improved(
        self, goal: TenantsGoal, columns: Sequence[TenantColumns], which: Sequence[BoolArray], known: TenantsChoice,
        near: TenantsRelaxation | None = None, nodes: int = NODES,
    ) -> tuple[TenantsChoice, float]:  # fmt: skip
        """Return the better of a known choice and one of some columns, and HiGHS's bound on choices of these.

        If it is ``near`` a relaxation, most of its replicas are fixed, which voids the bound.
        """
        chosen = [
            np.union1d(block.undominated(np.flatnonzero(some)), np.flatnonzero(counts))
            for block, some, counts in zip(columns, which, known.counts, strict=True)
        ]
        some = [block.some(numbers) for block, numbers in zip(columns, chosen, strict=True)]
        least = None
        if near is not None:
            counts = [padded(n, len(block.rates)) for n, block in zip(near.counts, columns, strict=True)]
            least = settled([n[numbers] for n, numbers in zip(counts, chosen, strict=True)])
            if least is None:
                return known, np.inf
        is_start = least is None and known.value(goal) > -np.inf
        start = [counts[numbers] for counts, numbers in zip(known.counts, chosen, strict=True)] if is_start else None
        found = choose_whole(
            some, self.limits, goal, nodes=nodes, time_limit_s=self._choosing_s(), gap=self.settings.gap_target / 10,
            seed=self.settings.seed, least=least, start=start,
        )  # fmt: skip
        if found is None:
            return known, np.inf
        bound = np.inf if least is not None else found.bound
        return (found.among(columns, chosen), bound) if found.value(goal) > known.value(goal) else (known, bound)

    def _prove(
        self, goal: TenantsGoal, relaxed: TenantsRelaxation, choice: TenantsChoice, proven: Proven
    ) -> tuple[TenantsChoice, Proven]:
        """Choose among all replicas that may be in a better placement; HiGHS's bound on these holds for all."""
        value = choice.value(goal)
        distance = (proven.bound - value) * (1.0 + RELAXATION_TOLERANCE) + RELAXATION_TOLERANCE * abs(value)
        if proven.bound - value <= self.settings.gap_target * value or self.budget.is_spent():
            return choice, proven
        for one, prices in zip(self.replicas, self._prices(relaxed), strict=True):
            if not one.enumerated.list_within(prices, distance, self.budget):
                return choice, proven
        columns = self._columns()
        which = [relaxed.reduced(i, block) <= distance for i, block in enumerate(columns)]
        if (
            sum(len(block.undominated(np.flatnonzero(some))) for block, some in zip(columns, which, strict=True))
            > MOST_PROVED
        ):
            return choice, proven
        choice, bound = self._improved(goal, columns, which, choice.of_more(columns), nodes=PROOF_NODES)
        self._known.append(choice)
        return choice, replace(proven, bound=min(proven.bound, max(bound, choice.value(goal))))

    def _fewest(self, floors: FloatArray, choice: TenantsChoice) -> TenantsChoice:
        """Return the same level on the fewest GPUs: no tenant is granted more, so none needs more."""
        columns = self._columns()
        gpus = [block.uses @ self.replicas[0].costs.resources.counts_gpus for block in columns]
        goal = TenantsGoal(np.zeros(len(columns)), floors)
        found = choose_whole(
            columns, self.limits, goal, nodes=NODES, time_limit_s=self._choosing_s(), gap=1e-3, start=choice.counts,
            gpus=gpus, seed=self.settings.seed,
        )  # fmt: skip
        return found if found is not None and found.value(goal) > -np.inf else choice.of_more(columns)

    def _choosing_s(self) -> float:
        """Return the time that guards a search of whole counts, which ends by nodes."""
        return LEAST_S if self.budget.is_spent() else max(LEAST_S, self.budget.remaining_s())

    def _columns(self) -> list[TenantColumns]:
        return [one.columns(alone.rate) for one, alone in zip(self.replicas, self.alone, strict=True)]

    # --- the answer

    def _answer(
        self, rule: TenantRule, choice: TenantsChoice, granted: FloatArray, value: float, proven: Proven,
        level_proven: Proven | None,
    ) -> FleetShares:  # fmt: skip
        shares = []
        for i, (tenant, plan) in enumerate(zip(self.tenants, self._plans(choice, proven.proof), strict=True)):
            alone, part = self.alone[i], self.parts[i]
            shares.append(
                TenantShare(
                    name=tenant.name,
                    weight=tenant.weight,
                    worth=worth(tenant, alone),
                    plan=plan,
                    placed=float(choice.rates[i] * alone.rate),
                    rate=float(granted[i] * alone.rate),
                    alone=alone.rate,
                    alone_bound=alone.bound,
                    part=part.rate,
                    part_bound=part.bound,
                )
            )
        level = min(share.normalised / share.weight for share in shares)
        bound, level_bound = max(proven.bound, value), None if level_proven is None else max(level_proven.bound, level)
        gaps = [(bound, value)] + ([] if level_bound is None else [(level_bound, level)])
        status = Status.FEASIBLE
        if all(above - reached <= OPTIMAL_GAP * abs(reached) for above, reached in gaps):
            status = Status.OPTIMAL
        elif self.budget.cancelled.is_set():
            status = Status.INTERRUPTED
        return FleetShares(
            rule=rule,
            status=status,
            shares=tuple(shares),
            value=value,
            bound=bound,
            level=level,
            level_bound=level_bound,
            proof=proven.proof,
            level_proof=None if level_proven is None else level_proven.proof,
            solve_s=self.budget.elapsed_s(),
        )

    def _proof(self, goal: TenantsGoal, relaxed: TenantsRelaxation) -> PriceProof:
        """Return the relaxation's prices, raised by the ratio up to which replicas may still improve it."""
        costs, row_prices = self.replicas[0].costs, relaxed.row_prices * (1.0 + RELAXATION_TOLERANCE)
        rows = zip(costs.resources.rows, self.limits.tolist(), row_prices.tolist(), strict=True)
        return PriceProof(
            rows=tuple(
                RowPrice(
                    gpu=costs.classes[g].gpu,
                    gpus_per_node=costs.classes[g].gpus_per_node,
                    tp_at_least=p,
                    limit=limit,
                    price=price,
                )
                for (g, p), limit, price in rows
            ),
            multipliers=tuple(relaxed.multipliers.tolist()),
            floors=tuple(goal.floors.tolist()),
            bound=goal.bound(row_prices, relaxed.multipliers, self.limits),
        )

    # --- named GPUs

    def _plans(self, choice: TenantsChoice, proof: PriceProof | None) -> list[Plan | None]:
        """Return disjoint plans of all tenants on the whole cluster's GPUs; None for tenants without replicas.

        A plan's bound is the rate that its tenant could reach alone, which may be far above its rate; its prices are
        those of the shared inventory, in the tenant's own rate.
        """
        chosen = [
            [(one.template(int(k)), int(counts[k])) for k in np.flatnonzero(counts)]
            for one, counts in zip(self.replicas, choice.counts, strict=True)
        ]
        singles = [[template for template, n in parts for _ in range(n)] for parts in chosen]
        bound = bind_together([one.costs for one in self.replicas], singles, seed=self.settings.seed)
        prices = np.array([row.price for row in proof.rows]) if proof is not None else np.zeros(len(self.limits))
        plans: list[Plan | None] = []
        for i, (one, stages) in enumerate(zip(self.replicas, bound, strict=True)):
            multiplier = proof.multipliers[i] / self.alone[i].rate if proof is not None else 0.0
            own = prices / (multiplier * one.scale) if multiplier > 0.0 else 0.0 * prices
            outcome = self._outcome(one.costs, chosen[i], self.alone[i].bound / one.scale, own)
            plan = plan_of(one.costs, self.settings.strategy, outcome, singles[i], stages, self.budget)
            plans.append(restored(plan, one.costs.problem, one.tenant.problem) if singles[i] else None)
        return plans

    def _outcome(
        self, costs: CostTables, chosen: list[tuple[Template, int]], bound: float, prices: FloatArray
    ) -> Outcome:
        """Return a tenant's replicas with the rate they serve."""
        columns = columns_of(costs, [template for template, _ in chosen], np.zeros(len(prices)))
        counts = np.array([count for _, count in chosen], dtype=np.int64)
        master = Master(costs.resources.limits, None, costs.routes)
        flows = master.best_flows(columns, counts)
        value = master.served(columns, counts, flows)
        return Outcome(
            chosen=tuple(chosen),
            value=value,
            bound=sound_bound(bound, value, maximises=True),
            row_prices=prices,
            rate_prices=np.ones(costs.routes.num_sides),
            flows=flows,
            interrupted=self.budget.cancelled.is_set(),
        )


@dataclass(frozen=True, slots=True)
class Proven:
    """A bound on every placement, and the prices that prove it or a weaker one; None: no search ended in time."""

    bound: float
    proof: PriceProof | None


def likeliest(relaxed: TenantsRelaxation, who: int, columns: TenantColumns, num: int) -> BoolArray:
    """Return the ``num`` columns of every side of a tenant that lose least, and those of the relaxation; [K]."""
    reduced = relaxed.reduced(who, columns)
    inside = padded(relaxed.counts[who], len(reduced)) > 0.0
    for side in np.unique(columns.sides):
        here = np.flatnonzero(columns.sides == side)
        inside[here[np.argsort(reduced[here])[:num]]] = True
    return np.asarray(inside)


def worth(tenant: Tenant, alone: TenantReach) -> float:
    """Return the worth of a request/s."""
    return tenant.worth if tenant.worth is not None else 1.0 / alone.rate
