"""The master problem in HiGHS: how many replicas of each column, and where the KV of their prompts goes.

    max  sum over unified of rate_k n_k + sum F(z, y)            or   min  sum_k cost_k n_k
    s.t. sum_k use_kr n_k <= limit_r                             every row r
         sum_y F(z, y) <= rates of the prefill replicas in z     every zone z
         sum_(y != z) F(z, y) <= rates of the prefill replicas in z that may send to all zones
         sum_z F(z, y) <= rates of the decode replicas in y      every zone y
         F(z, y) <= capacity(z, y)                               every link
         n_k >= 0 (LP) and whole (MILP), F >= 0                  and, if cost is minimised, served rate >= demand
         sum_k GPUs_kt n_k <= GPUs_t q_dt                        every role d and GPU type t (`TypeOfRole`)
         sum_t q_dt <= 1, q_dt >= 0 (LP) and 0 or 1 (MILP)       every role d
         least_p <= sum_k count_kp n_k <= most_p                 every pin p (`Pins`)
         L <= sum over R with c of (U_R + f_R) / F_R             every class c of requests (`ClassRows`)

Pins are rows that constraints add: a minimum of GPUs in use, limits on replicas, and a maximum rent. A GPU that must be
used may have a negative price. In a family whose prefill replicas all have one GPU type, and decode replicas one, two
binaries q for each type say whether it has the role. If the workload has classes, L is maximised (or at least the
demand): U_R is the rate of the unified replicas that serve the classes of range R, f_R are the flows of its others, and
F_R is its share of the requests. With prices y of the rows and a_c of the classes, which sum to 1, no replica serves
more of R's requests than its GPUs pay for if each is worth ``sum over c in R of a_c / F_R``, so that L <= y limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import highspy
import numpy as np

from hetis.solver.backends.highs import linear_program, quiet_highs
from hetis.solver.placement.columns import Columns
from hetis.solver.placement.constraint_rows import ClassRows, Pins, TypeOfRole, class_rows, pins_of, type_of_role
from hetis.solver.placement.fleet import UNIFIED, IntArray, Routes
from hetis.solver.placement.replicas.tables import CostTables, FloatArray
from hetis.solver.placement.replicas.template import Template, use_of
from hetis.solver.problem import PlacementProblem

Charge = Callable[[float], object]  # counts work that was done

# HiGHS's statuses without a timeout. Nothing is unbounded here: replicas take GPUs, and flows need replicas.
SETTLED = (
    highspy.HighsModelStatus.kOptimal,
    highspy.HighsModelStatus.kInfeasible,
    highspy.HighsModelStatus.kUnboundedOrInfeasible,
)
UNDECIDED = "no plan was found, nor a proof that there is none; more time may find one"
MANY = 64  # replicas from which on whole counts stay close to the relaxation


@dataclass(frozen=True, slots=True)
class LpSolution:
    """Optimum of the relaxation with its duals.

    ``row_prices`` [rows] >= 0 and ``link_prices`` [Z, Z] >= 0. ``demand_price`` is 1 if the rate is maximised.
    ``rate_prices`` [sides] price each side's rate; ``counts`` is [K]. A replica on a side pays ``side_prices``
    [sides, rows] for what it takes, and ``replica_price``: pins and types of roles included, of any sign.
    """

    value: float
    row_prices: FloatArray
    link_prices: FloatArray
    demand_price: float
    rate_prices: FloatArray
    counts: FloatArray
    side_prices: FloatArray
    replica_price: float

    def worth(self, columns: Columns) -> FloatArray:
        """Return what columns take is worth, without their costs; [K]."""
        return np.asarray((columns.uses * self.side_prices[columns.sides]).sum(axis=1) + self.replica_price)

    def reduced(self, columns: Columns) -> FloatArray:
        """Return how much more each column's GPUs are worth than its rate: the least that a plan with it loses; [K]."""
        return np.asarray(self.worth(columns) + columns.costs - self.rate_prices[columns.sides] * columns.rates)


@dataclass(frozen=True, slots=True)
class MilpSolution:
    """Whole counts [K] and flows [Z, Z], their value, and HiGHS's proven bound over whole counts of these columns."""

    counts: IntArray
    flows: FloatArray
    value: float
    bound: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The best choice found that serves anything; if ``is_settled``, no better one exists (or none at all)."""

    found: MilpSolution | None
    is_settled: bool

    @property
    def proves_none(self) -> bool:
        return self.found is None and self.is_settled


@dataclass(frozen=True, slots=True)
class Master:
    """The rows of the master: limits, routes, types of roles, pins, and the demanded rate if cost is minimised.

    ``minimised`` [rows] is the cost of a unit of each row; None if the rate is maximised.
    """

    limits: IntArray
    demand: float | None  # None: maximise the rate
    routes: Routes
    pins: Pins | None = None
    minimised: FloatArray | None = None
    types: TypeOfRole | None = None
    classes: ClassRows | None = None

    @property
    def row_costs(self) -> FloatArray:
        """Return the cost of a unit of each row, 0 if the rate is maximised; [rows]."""
        return np.zeros(len(self.limits)) if self.minimised is None else self.minimised

    @property
    def maximises(self) -> bool:
        return self.demand is None

    @property
    def has_only_limits(self) -> bool:
        """Return whether fewer replicas always satisfy the rows but the demand's, and smaller ones, too."""
        return self.pins is None and self.types is None

    def solve_lp(self, columns: Columns, *, is_elastic: bool = False) -> LpSolution | None:
        """Solve the relaxation; return None if these columns cannot meet demand or pins.

        If it ``is_elastic``, minimise what is missing to meet them, instead of the objective: its value is 0 if they
        can be met, and columns of negative reduced cost are those that help.
        """
        highs = quiet_highs()
        highs.passModel(self._model(columns, whole=False, is_elastic=is_elastic))
        highs.run()
        if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        solution, maximises = highs.getSolution(), self.maximises and not is_elastic
        signed = (1.0 if maximises else -1.0) * np.array(solution.row_dual)
        duals = np.maximum(0.0, signed)
        num_rows, num_zones, num_sides = len(self.limits), len(self.routes.zones), self.routes.num_sides
        price = 1.0 if maximises else 0.0 if self.maximises else max(0.0, -float(signed[-1]))
        rate_prices, link_prices, end = np.full(num_sides, price), np.zeros((num_zones, num_zones)), num_rows
        if self.routes.splits_roles:
            sending, afar, receiving = duals[num_rows : num_rows + 3 * num_zones].reshape(3, num_zones)
            rate_prices[1 : 1 + 3 * num_zones] = np.concatenate([sending, sending + afar, receiving])
            end += 3 * num_zones
            if self.routes.has_links:
                link_prices[self._between()] = duals[end:][: num_zones * (num_zones - 1)]
                end += num_zones * (num_zones - 1)
        side_prices, replica_price = np.tile(duals[:num_rows], (num_sides, 1)), 0.0
        if self.types is not None:
            side_prices += self.types.prices(duals[end:][: self.types.num_binaries])
            end += self.types.num_binaries + 2
        if self.classes is not None:
            of_ranges = self.classes.rate_prices(duals[end:][: self.classes.covers.shape[1]])
            is_unified = self.classes.range_of_side >= 0
            rate_prices[is_unified] = of_ranges[self.classes.range_of_side[is_unified]]
            end += self.classes.covers.shape[1]
        if self.pins is not None:
            pin_prices = signed[end:][: len(self.pins.lower)]
            side_prices += self.pins.of_rows @ pin_prices
            replica_price = float(self.pins.each @ pin_prices)
        return LpSolution(
            value=float(highs.getInfo().objective_function_value),
            row_prices=duals[:num_rows],
            link_prices=link_prices,
            demand_price=price,
            rate_prices=rate_prices,
            counts=np.array(solution.col_value)[: len(columns.rates)],
            side_prices=side_prices,
            replica_price=replica_price,
        )

    def decide(
        self, columns: Columns, *, time_limit_s: float, seed: int = 0, nodes: int | None = None,
        extend: Callable[[Any], object] | None = None, charge: Charge = lambda _: None,
    ) -> Verdict:  # fmt: skip
        """Return the best whole counts, or a proof that these columns cannot serve anything or meet the demand.

        ``nodes``, ``extend`` and ``charge`` are as in `solve_milp`.
        """
        if not len(columns.rates):
            return Verdict(None, is_settled=True)
        found, is_settled = self.solve_milp(
            columns, time_limit_s=time_limit_s, gap=0.0, seed=seed, nodes=nodes, extend=extend, charge=charge
        )
        return Verdict(found if self.serves(found) else None, is_settled)

    def serves(self, found: MilpSolution | None) -> TypeGuard[MilpSolution]:
        """Return whether whole counts are a plan at all.

        If the rate is maximised, a value of 0 means that there is no replica. If cost is minimised, the demand rules
        that out, and GPUs already owned may well cost nothing.
        """
        return found is not None and (not self.maximises or found.value > 0.0)

    def solve_milp(
        self, columns: Columns, *, time_limit_s: float, gap: float, seed: int = 0, nodes: int | None = None,
        start: MilpSolution | None = None, least: IntArray | None = None, presolves: bool = True,
        stop: Callable[[], bool] | None = None, extend: Callable[[Any], object] | None = None,
        charge: Charge = lambda _: None,
    ) -> tuple[MilpSolution | None, bool]:  # fmt: skip
        """Return whole counts within a relative gap, and whether HiGHS finished: with an optimum, or proved infeasible.

        It ends after ``nodes`` of the search tree (None: no limit), which takes as long as it takes: the clock guards.
        Counts are None if none were found in time or before ``stop`` is true. ``start`` is a known feasible choice of
        the first columns; the result is never worse. With ``least`` [K], counts are at least this large, and the bound
        holds for such counts only. ``extend`` adds rows and further columns to the model. It may change the objective,
        which voids the bound. ``charge`` is called with the work that was done.
        """
        options: dict[str, str | int | float] = {"mip_rel_gap": gap, "mip_abs_gap": 0.0}
        if nodes is not None:
            options["mip_max_nodes"] = nodes
        if not presolves:  # presolve compares columns in pairs and ignores the time limit while doing so
            options["presolve"] = "off"
        highs = quiet_highs(options, time_limit_s=time_limit_s, seed=seed, stop=stop)
        model = self._model(columns, whole=True)
        if least is not None:
            lower = np.array(model.col_lower_)
            lower[: len(least)] = least
            model.col_lower_ = lower
        highs.passModel(model)
        if extend is not None:
            extend(highs)
        counts = None
        if start is not None:
            counts = np.zeros(len(columns.rates), dtype=np.int64)
            counts[: len(start.counts)] = start.counts
            given = highspy.HighsSolution()
            binaries = [] if self.types is None else self.types.chosen(columns, counts).tolist()
            flows = start.flows.ravel()[: self.routes.num_flows].tolist()
            level = [] if self.classes is None else [self.served(columns, counts, start.flows)]
            given.col_value = [*counts.astype(float).tolist(), *flows, *binaries, *level]
            highs.setSolution(given)
        highs.run()
        info, is_settled = highs.getInfo(), highs.getModelStatus() in SETTLED
        charge(max(0, info.simplex_iteration_count))
        if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
            found = np.array(highs.getSolution().col_value)[: len(columns.rates)]
            counts = np.rint(found).astype(np.int64)
        if counts is None:
            return None, is_settled
        if self.pins is not None and not self.pins.are_kept(columns.uses, counts):
            return None, False  # pins hold only within HiGHS's tolerance
        flows = self.best_flows(columns, counts)
        value = self.served(columns, counts, flows) if self.maximises else float(counts @ columns.costs)
        bound = float(info.mip_dual_bound)
        if not np.isfinite(bound):
            bound = np.inf if self.maximises else 0.0
        bound = max(bound, value) if self.maximises else min(bound, value)
        return MilpSolution(counts, flows, value, bound), is_settled

    def rounded_down(self, columns: Columns, relaxed: FloatArray) -> MilpSolution:
        """Return the floor of a relaxation's counts [K], which always fits."""
        counts = np.floor(relaxed + 1e-9).astype(np.int64)
        flows = self.best_flows(columns, counts)
        return MilpSolution(counts, flows, self.served(columns, counts, flows), np.inf)

    def prefers(self, value: float, incumbent: MilpSolution | None) -> bool:
        """Return whether a plan of this value is better than the incumbent."""
        if incumbent is None:
            return True
        return value > incumbent.value if self.maximises else value < incumbent.value

    def served(self, columns: Columns, counts: IntArray, flows: FloatArray) -> float:
        """Return the requests/s that whole replicas serve."""
        return float(self.served_of_each(columns, counts, flows).min())

    def served_of_each(self, columns: Columns, counts: IntArray, flows: FloatArray) -> FloatArray:
        """Return the requests/s that whole replicas serve, or those of each class over its share."""
        if self.classes is not None:
            return self.classes.served(columns, counts, flows)
        return np.array([(counts * columns.rates)[columns.sides == UNIFIED].sum() + flows.sum()])

    def best_flows(self, columns: Columns, counts: IntArray) -> FloatArray:
        """Return the largest flows between chosen replicas, none too large by a rounding error; [Z, Z]."""
        routes, count = self.routes, len(self.routes.zones)
        flows = np.zeros((count, count))
        rates: FloatArray = np.bincount(columns.sides, counts * columns.rates, routes.num_sides).astype(float)
        if not routes.splits_roles or not rates[1:].any():
            return flows
        local, afar, receiving = (part.copy() for part in routes.parts(rates))
        if routes.has_links:
            wanted = self._flows_by_lp(columns, counts)
            for z, y in zip(*self._between(), strict=True):
                flows[z, y] = max(0.0, min(wanted[z, y], afar[z], receiving[y], routes.capacity[z, y]))
                afar[z] -= flows[z, y]
                receiving[y] -= flows[z, y]
        np.fill_diagonal(flows, np.minimum(local + afar, receiving))
        return flows

    def _flows_by_lp(self, columns: Columns, counts: IntArray) -> FloatArray:
        model = replace(self, pins=None, types=None, classes=None)._model(columns, whole=False)
        num_columns, flows = len(columns.rates), np.ones(self.routes.num_flows)
        model.sense_ = highspy.ObjSense.kMaximize
        model.col_cost_ = np.concatenate([np.zeros(num_columns), flows])
        model.col_lower_ = np.concatenate([counts.astype(float), 0.0 * flows])
        model.col_upper_ = np.concatenate([counts.astype(float), highspy.kHighsInf * flows])
        model.row_lower_ = np.full(model.num_row_, -highspy.kHighsInf)
        highs = quiet_highs()
        highs.passModel(model)
        highs.run()
        return np.array(highs.getSolution().col_value)[num_columns:].reshape(self.routes.capacity.shape)

    def _between(self) -> Any:
        """Return the index of routes between different zones, in row-major order."""
        return np.nonzero(~np.eye(len(self.routes.zones), dtype=bool))

    def _model(self, columns: Columns, *, whole: bool, is_elastic: bool = False) -> Any:
        """Return the master as a HiGHS model, passed as column-wise arrays at once rather than term by term.

        Its columns are replicas, flows, binaries of types, and, if it ``is_elastic``, what is missing in each row.
        """
        num, flows = len(columns.rates), self.routes.num_flows
        binaries = 0 if self.types is None else self.types.num_binaries
        served = np.where(columns.sides == UNIFIED, columns.rates, 0.0)
        served = np.concatenate([served, np.ones(flows), np.zeros(binaries)])
        if self.classes is not None:
            served = np.append(0.0 * served, 1.0)
        blocks = [(columns.uses.astype(float), self.limits.astype(float))]
        if self.routes.splits_roles:
            blocks.append(self._flow_rows(columns))
        if self.types is not None:
            blocks.append(self.types.rows(columns, flows))
        if self.classes is not None:
            of_classes = self.classes.rows(columns, flows, binaries)
            blocks.append((of_classes, np.zeros(of_classes.shape[1])))
        lower = np.full(sum(len(limits) for _, limits in blocks), -highspy.kHighsInf)
        if self.pins is not None:
            blocks.append((self.pins.coefficients(columns.uses), self.pins.upper))
            lower = np.append(lower, self.pins.lower)
        if self.demand is not None:
            blocks.append((served[:, None], np.array([highspy.kHighsInf])))
            lower = np.append(lower, self.demand)
        rows = [np.pad(coefficients, ((0, len(served) - len(coefficients)), (0, 0))) for coefficients, _ in blocks]
        matrix, costs = np.concatenate(rows, axis=1), np.pad(columns.costs, (0, len(served) - num))
        most = np.full(len(matrix), highspy.kHighsInf)
        if whole and flows:
            most[num : num + flows] = self._more_than_flows(columns)
        most[num + flows : num + flows + binaries] = 1.0
        if is_elastic:
            required = np.flatnonzero(lower > 0.0)
            missing = np.zeros((len(required), len(lower)))
            missing[np.arange(len(required)), required] = 1.0
            matrix, most = np.concatenate([matrix, missing]), np.pad(most, (0, len(required)), constant_values=np.inf)
            costs = np.concatenate([np.zeros(len(served)), 1.0 / lower[required]])
        entry_columns, entry_rows = np.nonzero(matrix)
        is_whole = np.arange(len(matrix)) < num
        is_whole[num + flows : num + flows + binaries] = True
        upper = np.concatenate([limits for _, limits in blocks])
        maximises = self.maximises and not is_elastic
        return linear_program(
            served if maximises else costs, (np.zeros(len(matrix)), most), (lower, upper),
            [(entry_rows, entry_columns, matrix[entry_columns, entry_rows])],
            whole=is_whole if whole else None, maximise=maximises,
        )  # fmt: skip

    def _more_than_flows(self, columns: Columns) -> FloatArray:
        """Return a rate above every flow of whole counts that fit, infinite if columns take nothing; [flows].

        The rows imply such limits. Without them, HiGHS 1.12 to 1.15 may call a choice the optimum, presolve being off,
        that is far from it.
        """
        taken, most = columns.uses.sum(axis=1), np.zeros(self.routes.num_sides)
        if not taken.all():  # replicas that stay, in replanning
            return np.full(self.routes.num_flows, highspy.kHighsInf)
        np.maximum.at(most, columns.sides, columns.rates / taken)
        local, afar, receiving = self.routes.parts(2.0 * float(self.limits.sum()) * most)
        flows: FloatArray = np.minimum.outer(afar, receiving)
        np.fill_diagonal(flows, np.minimum(np.maximum(local, afar), receiving))
        return flows.ravel()

    def _flow_rows(self, columns: Columns) -> tuple[FloatArray, FloatArray]:
        """Return coefficients [K + flows, .] and upper limits of the rows that bind flows.

        Rows are, by zone: KV sent, KV sent to other zones, KV received; then the links.
        """
        routes, count = self.routes, len(self.routes.zones)
        sender, receiver = (index.ravel() for index in np.indices((count, count)))
        zones = np.arange(count)
        sent = (sender[:, None] == zones).astype(float)
        sent_afar = sent * (sender != receiver)[:, None]
        received = (receiver[:, None] == zones).astype(float)
        flows = np.concatenate([sent, sent_afar, received], axis=1)
        by_side = np.zeros((routes.num_sides, 3 * count))  # coefficients of a side's request/s in each row
        for z in range(count):
            by_side[[1 + z, 1 + count + z], z] = -1.0
            by_side[1 + count + z, count + z] = -1.0
            by_side[1 + 2 * count + z, 2 * count + z] = -1.0
        replicas = by_side[columns.sides] * columns.rates[:, None]
        limits = np.zeros(3 * count)
        if routes.has_links:
            between = self._between()
            flows = np.concatenate([flows, np.eye(count * count)[:, sender != receiver]], axis=1)
            replicas = np.pad(replicas, ((0, 0), (0, len(between[0]))))
            limits = np.concatenate([limits, routes.capacity[between]])
        return np.concatenate([replicas, flows]), limits


def master_of(costs: CostTables) -> Master:
    """Return the master of a problem, with its demand and the rows that its family and its constraints require."""
    demand = demanded_rate(costs.problem)
    return Master(
        costs.resources.limits,
        demand,
        costs.routes,
        pins=pins_of(costs.problem.constraint_index, costs.classes, costs.resources),
        minimised=None if demand is None else row_costs_of(costs),
        types=type_of_role(costs),
        classes=class_rows(costs),
    )


def demanded_rate(problem: PlacementProblem) -> float | None:
    """Return the saturated rate that the demanded goodput takes, or None if the rate is maximised."""
    objective = problem.objective
    if objective.maximises:
        return None
    assert objective.demand_rps is not None, "PlacementProblem checks it"
    return objective.demand_rps / problem.assumptions.planned_utilisation


def row_costs_of(costs: CostTables) -> FloatArray:
    """Return the cost of one unit of each row in the objective: that of a GPU for the rows that count GPUs; [rows]."""
    goal, types = costs.problem.objective.kind.goal, costs.problem.cluster.gpu_types
    each = [goal.cost(types[c.gpu], c.usd_per_hour) for c in costs.classes]
    return np.array([each[g] if p == 1 else 0.0 for g, p in costs.resources.rows])


def cost_of(costs: CostTables, chosen: Iterable[tuple[Template, int]]) -> float:
    """Return what replicas cost in the objective."""
    row_costs = row_costs_of(costs)
    return sum(float(row_costs @ use_of(costs, template)) * count for template, count in chosen)


def settled(blocks: Sequence[FloatArray], *, back: int = 1) -> list[IntArray] | None:
    """Return whole replicas that a search need not change: those of the relaxation, minus ``back`` of each column.

    Return None if the relaxation has so few replicas that all may be searched. ``blocks`` are counts of columns [K],
    whose replicas are counted together.
    """
    if sum(float(counts.sum()) for counts in blocks) < MANY:
        return None
    return [np.maximum(np.floor(counts + 1e-6).astype(np.int64) - back, 0) for counts in blocks]
