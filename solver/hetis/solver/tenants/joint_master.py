"""The master of several tenants in HiGHS: counts of every tenant's columns on one inventory.

    Sets       i tenants, k columns (replicas of one tenant i(k)), r rows of the shared inventory
               z places of a tenant, inside which its prefill and decode replicas exchange KV
    Variables  n_k >= 0 replicas (whole in the MILP);  f_iz >= 0 requests prefilled and decoded in place z
               u_i >= m_i normalised rates;  L level
    Maximise   sum_i g_i u_i                                    or   L, or least  sum_k GPUs_k n_k
    Such that  sum_k use_kr n_k <= limit_r                      every row r
               u_i <= sum_z f_iz + sum over unified k of i of rate_k n_k        every tenant
               f_iz <= sum over prefill k of i in z of rate_k n_k               every place
               f_iz <= sum over decode k of i in z of rate_k n_k                every place
               w_i L <= u_i                                     if a level is required

Rates are normalised: 1 is the rate that a tenant reaches alone on the whole fleet.

**Bounds.** Let y >= 0 be prices of the rows, a_i those of the rates, and alpha_iz and beta_iz those of what is sent and
received, with ``alpha_iz + beta_iz >= a_i``. If no replica of tenant i serves more than its GPUs pay for, ``rate_k a_i
<= use_k y`` (alpha or beta for a half), then any placement has ``sum a_i u_i <= y limits``. So

    u_i >= m_i, a_i >= g_i     :  sum g_i u_i  <=  y limits - sum (a_i - g_i) m_i
    u_i >= L w_i               :  L  <=  y limits / sum a_i w_i

The duals of the relaxation over all replicas of the tenants' families are such prices. Replicas are listed where the
prices of a smaller relaxation say that they improve it, as for a single model (`placement/enumeration.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from hetis.solver.backends.highs import linear_program, quiet_highs
from hetis.solver.placement.columns import Columns, padded
from hetis.solver.placement.fleet import IntArray, Routes
from hetis.solver.placement.replicas.tables import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class TenantsGoal:
    """The objective of the master: ``sum gains u`` with ``u >= floors``; with ``claims``, the least ``u / claims``.

    All arrays have shape [tenants], u being normalised rates.
    """

    gains: FloatArray
    floors: FloatArray
    claims: FloatArray | None = None

    def bound(self, row_prices: FloatArray, multipliers: FloatArray, limits: IntArray) -> float:
        """Return the bound that dual feasible prices prove."""
        worth = float(row_prices @ limits)
        if self.claims is None:
            return worth - float((multipliers - self.gains) @ self.floors)
        return worth / float(multipliers @ self.claims)


@dataclass(frozen=True, slots=True, eq=False)
class TenantColumns:
    """Columns of one tenant: normalised ``rates`` [K], ``uses`` [K, rows], ``sides`` [K] of its ``routes``."""

    rates: FloatArray
    uses: IntArray
    sides: IntArray
    routes: Routes

    @classmethod
    def of(cls, columns: Columns, routes: Routes, scale: float) -> TenantColumns:
        return cls(scale * columns.rates, columns.uses, columns.sides, routes)

    def some(self, which: IntArray) -> TenantColumns:
        """Return the columns with these numbers."""
        return TenantColumns(self.rates[which], self.uses[which], self.sides[which], self.routes)

    def undominated(self, which: IntArray) -> IntArray:
        """Return those of the columns that no other of them beats with at most its GPUs."""
        some = Columns(self.rates[which], np.zeros(len(which)), self.uses[which], self.sides[which])
        return np.asarray(which[some.undominated()])

    @property
    def num_places(self) -> int:
        """The number of places, each of which has a flow and two rows."""
        return len(self.routes.zones) if self.routes.splits_roles else 0

    @property
    def num_rows(self) -> int:
        return 1 + 2 * self.num_places

    def rows(self) -> IntArray:
        """Return the tenant's row to which each column contributes: its rate, then what places send, and receive."""
        # Sides by place are local senders, senders to all zones (none in one zone), receivers.
        place, block = (self.sides - 1) % max(1, self.num_places), (self.sides - 1) // max(1, self.num_places)
        return np.asarray(np.where(self.sides == 0, 0, 1 + place + self.num_places * (block // 2)))

    def flows(self, counts: IntArray) -> tuple[float, FloatArray]:
        """Return what unified replicas serve, and the flow in each place, for these counts of replicas."""
        unified, *halves = np.bincount(self.rows(), counts * self.rates, self.num_rows).tolist()
        sent, received = np.array(halves).reshape(2, self.num_places)
        return unified, np.minimum(sent, received)

    def served(self, counts: IntArray) -> float:
        """Return the normalised rate for these counts of replicas."""
        unified, flows = self.flows(counts)
        return float(unified + flows.sum())

    def rate_prices(self, duals: FloatArray) -> FloatArray:
        """Return the price of a normalised rate on each side, from the duals of the tenant's rows; [sides]."""
        sent, received = duals[1:].reshape(2, self.num_places)
        return np.concatenate([duals[:1], sent, sent, received])


@dataclass(frozen=True, slots=True, eq=False)
class TenantsRelaxation:
    """Optimum of the relaxation; ``row_prices`` [rows], ``multipliers`` [tenants] and ``rate_prices`` are its duals.

    ``rate_prices`` has [sides] of each tenant, for normalised rates.
    """

    value: float
    row_prices: FloatArray
    multipliers: FloatArray
    rate_prices: tuple[FloatArray, ...]
    counts: tuple[FloatArray, ...]

    def reduced(self, who: int, columns: TenantColumns) -> FloatArray:
        """Return the least that a placement with each of a tenant's columns loses; [K]."""
        paid = columns.uses @ self.row_prices
        return np.asarray(paid - self.rate_prices[who][columns.sides] * columns.rates)


@dataclass(frozen=True, slots=True, eq=False)
class TenantsChoice:
    """Whole counts of every tenant's columns, normalised rates [tenants], and a bound over whole counts of these."""

    counts: tuple[IntArray, ...]
    rates: FloatArray
    bound: float

    def of_more(self, blocks: Sequence[TenantColumns]) -> TenantsChoice:
        """Return the same choice after further columns were added to those it counts."""
        return TenantsChoice(tuple(_padded(blocks, self.counts)), self.rates, self.bound)

    def among(self, blocks: Sequence[TenantColumns], chosen: Sequence[IntArray]) -> TenantsChoice:
        """Return the same choice after the columns with these numbers were chosen of all ``blocks``."""
        counts = tuple(np.zeros(len(block.rates), dtype=np.int64) for block in blocks)
        for whole, numbers, part in zip(counts, chosen, self.counts, strict=True):
            whole[numbers] = part
        return TenantsChoice(counts, self.rates, self.bound)

    def value(self, goal: TenantsGoal) -> float:
        """Return the worth of the choice; -inf if a tenant has less than its floor."""
        if np.any(self.rates < goal.floors * (1.0 - 1e-9)):
            return -np.inf
        if goal.claims is not None:
            return float((self.rates / goal.claims).min())
        return float(goal.gains @ self.rates)


def solve_relaxation(blocks: Sequence[TenantColumns], limits: IntArray, goal: TenantsGoal) -> TenantsRelaxation | None:
    """Return the optimum of the relaxation; None if these columns cannot meet the floors."""
    highs = quiet_highs()
    highs.passModel(_model(blocks, limits, goal, whole=False))
    highs.run()
    if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    solution = highs.getSolution()
    duals = np.maximum(0.0, np.array(solution.row_dual))
    ends = len(limits) + np.cumsum([block.num_rows for block in blocks])
    of_tenants = np.split(duals[: ends[-1]], [len(limits), *ends[:-1]])[1:]
    return TenantsRelaxation(
        value=float(highs.getInfo().objective_function_value),
        row_prices=duals[: len(limits)],
        multipliers=np.array([of_tenant[0] for of_tenant in of_tenants]),
        rate_prices=tuple(block.rate_prices(own) for block, own in zip(blocks, of_tenants, strict=True)),
        counts=_split(np.array(solution.col_value), blocks),
    )


def choose_whole(
    blocks: Sequence[TenantColumns], limits: IntArray, goal: TenantsGoal, *, nodes: int, time_limit_s: float,
    gap: float, start: Sequence[IntArray] | None = None, least: Sequence[IntArray] | None = None,
    gpus: Sequence[FloatArray] | None = None, seed: int = 0,
) -> TenantsChoice | None:  # fmt: skip
    """Return whole counts within a relative gap; None if none was found.

    The search ends after ``nodes`` of its tree; the clock only guards.
    ``start`` is a known feasible choice of the first columns of each tenant. With ``least``, counts have that lower
    bound, and the returned bound is only for such counts. With ``gpus``, the number of GPUs of every column, the choice
    with the fewest GPUs is sought instead of the most valuable one.
    """
    model = _model(blocks, limits, goal, whole=True)
    if least is not None:
        lower = np.array(model.col_lower_)
        lower[: sum(map(len, least))] = np.concatenate(list(least))
        model.col_lower_ = lower
    if gpus is not None:
        model.col_cost_ = np.pad(np.concatenate(list(gpus)), (0, model.num_col_ - sum(map(len, gpus))))
        model.sense_ = highspy.ObjSense.kMinimize
    highs = quiet_highs(
        {"mip_rel_gap": gap, "mip_abs_gap": 0.0, "mip_max_nodes": nodes}, time_limit_s=time_limit_s, seed=seed
    )
    highs.passModel(model)
    if start is not None:
        highs.setSolution(_as_solution(blocks, goal, start))
    highs.run()
    info = highs.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    counts = tuple(np.rint(part).astype(np.int64) for part in _split(np.array(highs.getSolution().col_value), blocks))
    bound = float(info.mip_dual_bound) if gpus is None and np.isfinite(info.mip_dual_bound) else np.inf
    return TenantsChoice(counts, _rates(blocks, counts), bound)


def _rates(blocks: Sequence[TenantColumns], counts: Sequence[IntArray]) -> FloatArray:
    return np.array([block.served(count) for block, count in zip(blocks, counts, strict=True)])


def _padded(blocks: Sequence[TenantColumns], counts: Sequence[IntArray]) -> list[IntArray]:
    """Return counts of the first columns as counts of all columns."""
    return [padded(n, len(block.rates)) for block, n in zip(blocks, counts, strict=True)]


def _as_solution(blocks: Sequence[TenantColumns], goal: TenantsGoal, counts: Sequence[IntArray]) -> Any:
    whole = _padded(blocks, counts)
    rates = _rates(blocks, whole)
    flows = [block.flows(n)[1] for block, n in zip(blocks, whole, strict=True)]
    level = float((rates / goal.claims).min()) if goal.claims is not None else 0.0
    given = highspy.HighsSolution()
    given.col_value = np.concatenate([*whole, *flows, rates, [level]]).astype(float).tolist()
    return given


def _split(values: FloatArray, blocks: Sequence[TenantColumns]) -> tuple[FloatArray, ...]:
    """Return the values of the replicas' columns, tenant by tenant."""
    ends = np.cumsum([len(block.rates) for block in blocks])
    return tuple(np.split(values[: ends[-1]], ends[:-1]))


def _model(blocks: Sequence[TenantColumns], limits: IntArray, goal: TenantsGoal, *, whole: bool) -> Any:
    """Return the master as a HiGHS model: columns n, f, u, L; rows inventory, those of each tenant, levels."""
    tenants, replicas = len(blocks), sum(len(block.rates) for block in blocks)
    flows = sum(block.num_places for block in blocks)
    of_tenants = sum(block.num_rows for block in blocks)
    num_rows, num_columns = len(limits) + of_tenants + tenants, replicas + flows + tenants + 1
    matrix, first, mine, flow = np.zeros((num_columns, num_rows)), 0, len(limits), replicas
    for i, block in enumerate(blocks):
        last, rate, places = first + len(block.rates), replicas + flows + i, np.arange(block.num_places)
        matrix[first:last, : len(limits)] = block.uses
        matrix[np.arange(first, last), mine + block.rows()] = -block.rates
        matrix[flow + places, mine] = -1.0
        matrix[flow + places, mine + 1 + places] = matrix[flow + places, mine + 1 + len(places) + places] = 1.0
        matrix[rate, mine] = 1.0
        if goal.claims is not None:
            matrix[rate, len(limits) + of_tenants + i] = -1.0
            matrix[-1, len(limits) + of_tenants + i] = goal.claims[i]
        first, mine, flow = last, mine + block.num_rows, flow + block.num_places
    gain, lower, upper = np.zeros(num_columns), np.zeros(num_columns), np.full(num_columns, np.inf)
    lower[-1 - tenants : -1] = goal.floors
    if goal.claims is None:
        gain[-1 - tenants : -1], upper[-1] = goal.gains, 0.0
    else:
        gain[-1] = 1.0
    columns, rows = np.nonzero(matrix)
    row_upper = np.append(limits, np.zeros(of_tenants + tenants))
    return linear_program(
        gain, (lower, upper), (np.full(num_rows, -np.inf), row_upper), [(rows, columns, matrix[columns, rows])],
        whole=np.arange(num_columns) < replicas if whole else None, maximise=True,
    )  # fmt: skip
