"""`FleetSearch`: a plan for each tenant on disjoint GPUs, by a rule, with a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hetis.solver.budget import Budget, Progress, Report, SearchSettings, silent
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.binding import BoundStage, bind
from hetis.solver.placement.exact import is_small
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.generation import Pool
from hetis.solver.placement.infeasible import ExplainedInfeasibleError, why_infeasible
from hetis.solver.placement.master import Master, settled
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.solve import OPTIMAL_GAP, plan_of
from hetis.solver.placement.tables import CostTables, FloatArray
from hetis.solver.placement.tabulation import build_cost_tables
from hetis.solver.placement.template import Template
from hetis.solver.plan import Plan, Status
from hetis.solver.tenants.master import (
    TenantColumns,
    TenantsBound,
    TenantsChoice,
    TenantsGoal,
    choose_whole,
    solve_relaxation,
)
from hetis.solver.tenants.problem import (
    EnvyCell,
    FleetShares,
    PriceProof,
    RowPrice,
    Tenancy,
    Tenant,
    TenantRule,
    TenantShare,
)
from hetis.solver.tenants.tenant_solver import (
    EnumeratedTenant,
    JointGeneration,
    PricedTenant,
    TenantReach,
    TenantSolver,
    templates_of,
    utilisation,
)

SHARED = ("hetis", "hexgen", "hexgen2")  # strategies whose families can share a fleet
MILP_SECONDS, LEAST_S = 10.0, 1.0  # maximum and minimum seconds for each choice of whole counts
PART_SECONDS = 10.0  # seconds for the rate of a tenant on a part of the fleet, its own or another tenant's
ROUNDING = 1e-9  # ratio by which a floor is lowered, so that a rate reached before can be reached again


class FleetSearch:
    """The search on one fleet: each tenant's rate alone and on its part, then any rule; columns are kept between rules.

    Raises:
        InvalidProblemError: the strategy has no family that can be shared.
        ExplainedInfeasibleError: it is proved that a tenant does not fit on the fleet, even alone.
        NoPlanFoundError: the budget was spent before every tenant had a plan alone.
    """

    def __init__(
        self, tenancy: Tenancy, *, strategy: str = "hetis", budget: Budget | None = None, gap_target: float = 0.005,
        seed: int = 0, threads: int = 1, report: Report = silent,
    ) -> None:  # fmt: skip
        if strategy not in SHARED:
            raise InvalidProblemError(f"strategy {strategy!r} cannot be shared, must be one of {', '.join(SHARED)}")
        self.budget = budget if budget is not None else Budget()
        self.settings = SearchSettings(strategy=strategy, gap_target=gap_target, seed=seed, threads=threads)
        self.report = report
        restrict = STRATEGIES[strategy].restrict
        self.tenants = tuple(
            replace(t, problem=replace(t.problem, family=restrict(t.problem.family))) for t in tenancy.tenants
        )
        self.tenancy = Tenancy(tenants=self.tenants)  # with the searched families
        tables = [build_cost_tables(tenant.problem) for tenant in self.tenants]
        self.limits = tables[0].resources.limits
        self.solvers: list[TenantSolver] = []
        pairs = list(zip(self.tenants, tables, strict=True))
        if all(is_small(costs) for costs in tables):
            listed = [EnumeratedTenant(*pair, self.settings, self.budget) for pair in pairs]
            if not all(one.complete for one in listed):
                raise NoPlanFoundError(f"no shares found within {self.budget.elapsed_s():.1f} s; allow more time")
            self.solvers.extend(listed)
        else:
            self.solvers.extend(PricedTenant(*pair, self.settings) for pair in pairs)
        self.alone = tuple(self._alone(solver) for solver in self.solvers)
        self.parts = tuple(
            self._reach(solver, part_of(self.limits, claim), f"{solver.tenant.name} on its part of the fleet")
            for solver, claim in zip(self.solvers, tenancy.claims, strict=True)
        )
        # The highest level, once it has been searched.
        self._highest: tuple[TenantsChoice, TenantsBound | None, float] | None = None
        # Choices that may suit the next rule: every tenant on its part, as the incentive requires, and earlier rules'.
        self._known: list[TenantsChoice] = []
        if priced := [c for c in self.solvers if isinstance(c, PricedTenant)]:
            counts = tuple(c.pool.counts_of(part.chosen) for c, part in zip(priced, self.parts, strict=True))
            self._known.append(TenantsChoice(counts, self._normalised_parts, np.inf))

    @property
    def _normalised_parts(self) -> FloatArray:
        """Return every tenant's rate on its part of the fleet relative to its rate alone, [tenants]."""
        return np.array([part.rate / alone.rate for part, alone in zip(self.parts, self.alone, strict=True)])

    def _alone(self, solver: TenantSolver) -> TenantReach:
        name = solver.tenant.name
        found = self._reach(solver, self.limits, f"{name} alone on the whole fleet")
        if found.rate > 0.0:
            return found
        if self.budget.is_spent():
            raise NoPlanFoundError(f"no plan for {name} found within {self.budget.elapsed_s():.1f} s; allow more time")
        nobody = f"tenant {name} can be served by no replica on this fleet, even alone"
        settings = replace(self.settings, budget=self.budget, report=self.report)
        why = why_infeasible(solver.tenant.problem, settings)
        raise ExplainedInfeasibleError((nobody, *why.reasons), why)

    def _reach(self, solver: TenantSolver, limits: IntArray, phase: str) -> TenantReach:
        self.report(Progress(phase=phase, elapsed_s=self.budget.elapsed_s()))
        budget = self.budget
        if not np.array_equal(limits, self.limits):
            time_limit_s = min(PART_SECONDS, max(0.0, budget.remaining_s()))
            budget = Budget(time_limit_s=time_limit_s, clock=budget.clock, cancelled=budget.cancelled)
        return solver.alone(limits, budget, silent) or TenantReach(rate=0.0, bound=0.0)

    # --- one rule

    def share(self, rule: TenantRule) -> FleetShares:
        """Return replicas for every tenant under a rule.

        Raises:
            NoPlanFoundError: the budget was spent before whole replicas that satisfy the rule were found.
        """
        claims = np.array([tenant.weight for tenant in self.tenants])
        gains = np.array([worth(t, a) * a.rate for t, a in zip(self.tenants, self.alone, strict=True)])
        floors = none = np.zeros(len(claims))
        level_bound, level_proof, best_level = None, None, 0.0
        if rule.has_level:
            goal = TenantsGoal(gains, none, claims)
            if self._highest is None:  # both rules with a level raise it in the same way
                self._highest = self._solve(goal, "the least rate")
            choice, bound, proven = self._highest
            best_level = choice.value(goal)
            level_bound = max(proven, best_level)
            level_proof = self._proof(bound, none)
            floors = claims * best_level
        elif rule is TenantRule.SHARING_INCENTIVE:
            floors = self._normalised_parts
        floors = floors * (1.0 - ROUNDING)
        goal = TenantsGoal(gains, floors)
        if rule is TenantRule.EQUAL_THROUGHPUT:
            assert level_bound is not None
            choice = self._fewest(floors, choice)
            granted, total = claims * best_level, float(gains @ claims)
            value, proven, proof = total * best_level, total * level_bound, level_proof
        else:
            choice, bound, proven = self._solve(goal, "total value")
            granted = choice.rates
            value, proof = choice.value(goal), self._proof(bound, floors)
        return self._answer(
            rule, choice, granted, value, max(proven, value), best_level, level_bound, proof, level_proof
        )

    def _solve(self, goal: TenantsGoal, phase: str) -> tuple[TenantsChoice, TenantsBound | None, float]:
        """Return the best choice found, the bound from prices, and the best value proved."""
        if isinstance(self.solvers[0], EnumeratedTenant):
            return self._pack(goal)
        priced = [c for c in self.solvers if isinstance(c, PricedTenant)]
        alone = np.array([reach.rate for reach in self.alone])
        joint = JointGeneration(priced, alone, goal, self.budget, self.report)
        joint.run(self.settings.gap_target / 2)
        joint.vary()
        choice = self._choose(goal, joint.bound.value if joint.bound is not None else np.inf, phase)
        if choice is None:
            raise NoPlanFoundError(f"no whole replicas found within {self.budget.elapsed_s():.1f} s; allow more time")
        return choice, joint.bound, joint.bound.value if joint.bound is not None else self._bound_alone(goal)

    def _bound_alone(self, goal: TenantsGoal) -> float:
        """Return a bound known before any pricing: no tenant exceeds its bound alone."""
        most = np.array([reach.bound / reach.rate for reach in self.alone])
        return float(goal.gains @ most) if goal.claims is None else float((most / goal.claims).min())

    def _pack(self, goal: TenantsGoal) -> tuple[TenantsChoice, None, float]:
        """Return the best packing of a small fleet's sub-fleets, and the bound from their ceilings."""
        listed = [c for c in self.solvers if isinstance(c, EnumeratedTenant)]
        ceilings = [c.ceilings(a.rate) for c, a in zip(listed, self.alone, strict=True)]
        choice, above = (
            choose_whole(columns, self.limits, goal, time_limit_s=np.inf, gap=0.0, seed=self.settings.seed)
            for columns in (self._columns(), ceilings)
        )
        assert choice is not None, "every tenant has its part of the fleet at once"
        assert above is not None, "ceilings are no lower"
        return choice, None, above.bound

    def _choose(self, goal: TenantsGoal, bound: float, phase: str) -> TenantsChoice | None:
        """Return whole counts over all columns seen; never worse than an earlier rule's choice."""
        columns, s = self._columns(), self.settings
        relaxed = solve_relaxation(columns, self.limits, goal)
        earlier = [choice.of_more(columns) for choice in self._known]
        best = max(earlier, key=lambda choice: choice.value(goal), default=None)
        if best is not None and best.value(goal) == -np.inf:
            best = None
        # First near the relaxation: of many replicas most are fixed. Then anywhere, while the gap is too large.
        for least in (settled(relaxed.counts) if relaxed is not None else None, None):
            if best is not None and bound - best.value(goal) <= s.gap_target * best.value(goal):
                break
            found = choose_whole(
                columns, self.limits, goal, time_limit_s=self._choosing_s(),
                gap=s.gap_target / 10, seed=s.seed, least=least,
                start=best.counts if least is None and best is not None else None,
            )  # fmt: skip
            if found is not None and found.value(goal) > (-np.inf if best is None else best.value(goal)):
                best = found
        if best is not None:
            self._known.append(best)
            value = best.value(goal)
            self.report(Progress(phase=f"whole counts: {phase}", elapsed_s=self.budget.elapsed_s(), incumbent=value))
        return best

    def _fewest(self, floors: FloatArray, choice: TenantsChoice) -> TenantsChoice:
        """Return the same level on the fewest GPUs: no tenant is granted more, so none needs more."""
        columns = self._columns()
        gpus = [block.uses @ self.solvers[0].costs.resources.counts_gpus for block in columns]
        goal = TenantsGoal(np.zeros(len(columns)), floors)
        found = choose_whole(
            columns, self.limits, goal, time_limit_s=self._choosing_s(), gap=1e-3, start=choice.counts, gpus=gpus,
            seed=self.settings.seed,
        )  # fmt: skip
        return found if found is not None and found.value(goal) > -np.inf else choice.of_more(columns)

    def _choosing_s(self) -> float:
        """Return the time for a search of whole counts; above 0 even after the time limit, since some are needed."""
        return LEAST_S if self.budget.is_spent() else max(LEAST_S, min(MILP_SECONDS, self.budget.remaining_s()))

    def _columns(self) -> list[TenantColumns]:
        return [solver.columns(alone.rate) for solver, alone in zip(self.solvers, self.alone, strict=True)]

    # --- the answer

    def _answer(
        self, rule: TenantRule, choice: TenantsChoice, granted: FloatArray, value: float, bound: float, level: float,
        level_bound: float | None, proof: PriceProof | None, level_proof: PriceProof | None,
    ) -> FleetShares:  # fmt: skip
        multipliers = proof.multipliers if proof is not None else (1.0,) * len(self.tenants)
        prices = np.array([row.price for row in proof.rows]) if proof is not None else np.zeros(len(self.limits))
        plans = plans_of(
            self.solvers, choice, self.alone, prices=prices, multipliers=multipliers, budget=self.budget,
            strategy=self.settings.strategy, seed=self.settings.seed,
        )  # fmt: skip
        shares = []
        for i, (tenant, plan) in enumerate(zip(self.tenants, plans, strict=True)):
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
            proof=proof,
            level_proof=level_proof,
            solve_s=self.budget.elapsed_s(),
        )

    def _proof(self, bound: TenantsBound | None, floors: FloatArray) -> PriceProof | None:
        if bound is None:
            return None
        costs = self.solvers[0].costs
        of_rows = zip(costs.resources.rows, self.limits.tolist(), bound.row_prices.tolist(), strict=True)
        classes = ((costs.classes[g], p, limit, price) for (g, p), limit, price in of_rows)
        rows = tuple(
            RowPrice(gpu=c.gpu, gpus_per_node=c.gpus_per_node, tp_at_least=p, limit=limit, price=price)
            for c, p, limit, price in classes
        )
        return PriceProof(
            rows=rows, multipliers=tuple(bound.multipliers.tolist()), floors=tuple(floors.tolist()), bound=bound.value
        )

    # --- envy

    def envy(self, shares: FleetShares) -> tuple[tuple[EnvyCell, ...], ...]:
        """Return each tenant's (row) rate on as many GPUs of each class as each tenant (column) has.

        The diagonal is the rate that the tenant has. Searches end with the budget: a cell is then the best rate until
        then.
        """
        uses = [self._use_of(share) for share in shares.shares]

        def cell(solver: TenantSolver, own: TenantShare, other: TenantShare, use: IntArray) -> EnvyCell:
            if own is other:
                return EnvyCell(rate=own.placed, bound=own.placed)
            reach = self._reach(solver, use, f"{solver.tenant.name} with the GPUs of {other.name}")
            return EnvyCell(rate=reach.rate, bound=reach.bound)

        return tuple(
            tuple(cell(solver, own, other, use) for other, use in zip(shares.shares, uses, strict=True))
            for solver, own in zip(self.solvers, shares.shares, strict=True)
        )

    def _use_of(self, share: TenantShare) -> IntArray:
        """Return the amount of every row of the inventory that a share's GPUs allow."""
        used = [price.used for price in share.plan.prices] if share.plan is not None else [0] * len(self.limits)
        rows = self.solvers[0].costs.resources.rows
        return np.array([min(limit, used[g]) for (g, _), limit in zip(rows, self.limits, strict=True)], dtype=np.int64)


def part_of(limits: IntArray, claim: float) -> IntArray:
    """Return a tenant's part of every inventory row, rounded down: all parts together fit in the fleet's nodes."""
    return np.asarray(np.floor(limits * claim + ROUNDING), dtype=np.int64)


def worth(tenant: Tenant, alone: TenantReach) -> float:
    """Return the worth of a request/s."""
    return tenant.worth if tenant.worth is not None else 1.0 / alone.rate


# --- named GPUs


def plans_of(
    solvers: Sequence[TenantSolver], choice: TenantsChoice, alone: Sequence[TenantReach], *, prices: FloatArray,
    multipliers: Sequence[float], budget: Budget, strategy: str, seed: int,
) -> list[Plan | None]:  # fmt: skip
    """Return disjoint plans of all tenants on the whole cluster's GPUs; None for tenants without replicas.

    A plan's bound is the rate that its tenant could reach alone, which may be far above its rate; its prices are those
    of the shared inventory, in the tenant's own rate.
    """
    chosen = [templates_of(c, counts.tolist()) for c, counts in zip(solvers, choice.counts, strict=True)]
    singles = [[template for template, n in parts for _ in range(n)] for parts in chosen]
    bound = bind_together([c.costs for c in solvers], singles, seed=seed)
    plans: list[Plan | None] = []
    for i, (solver, stages) in enumerate(zip(solvers, bound, strict=True)):
        if not singles[i]:
            plans.append(None)
            continue
        unit, costs = utilisation(solver.tenant), solver.costs
        outcome = _outcome(
            costs, chosen[i], bound=alone[i].bound / unit,
            prices=prices / (multipliers[i] * unit / alone[i].rate) if multipliers[i] > 0.0 else 0.0 * prices,
            interrupted=budget.cancelled.is_set(),
        )  # fmt: skip
        plans.append(plan_of(costs, strategy, outcome, singles[i], stages, budget))
    return plans


def bind_together(
    tables: Sequence[CostTables], templates: Sequence[Sequence[Template]], *, seed: int
) -> list[list[list[BoundStage]]]:
    """Return named GPUs for the stages of every tenant's templates; tenants number their ranks differently."""
    ranks = tuple(dict.fromkeys(rank for costs in tables for rank in costs.ranks))
    place = {rank: s for s, rank in enumerate(ranks)}
    together = [
        replace(t, stages=tuple(replace(stage, rank=place[costs.ranks[stage.rank]]) for stage in t.stages))
        for costs, own in zip(tables, templates, strict=True)
        for t in own
    ]
    bound = iter(bind(replace(tables[0], ranks=ranks), together, seed=seed))
    return [[next(bound) for _ in own] for own in templates]


def _outcome(
    costs: CostTables, chosen: tuple[tuple[Template, int], ...], *, bound: float, prices: FloatArray, interrupted: bool
) -> Outcome:
    """Return a tenant's replicas with the rate they serve; prefill and decode replicas use the fleet's only zone."""
    pool = Pool(costs)
    pool.add([template for template, _ in chosen])
    counts = pool.counts_of(chosen)
    master, columns = Master(costs.resources.limits, None, costs.routes), pool.columns()
    flows = master.best_flows(columns, counts)
    value = master.served(columns, counts, flows)
    return Outcome(
        chosen=chosen,
        value=value,
        bound=sound_bound(bound, value, maximises=True),
        row_prices=prices,
        rate_prices=np.ones(costs.routes.num_sides),
        flows=flows,
        interrupted=interrupted,
    )
