"""The master of several tenants in HiGHS: counts of every tenant's columns on one inventory; and bounds from prices.

    Sets       i tenants, k columns (replicas of one tenant i(k)), r rows of the shared inventory
    Variables  n_k >= 0 replicas (whole in the MILP);  f_i >= 0 requests with prefill and decode on different replicas;
               u_i >= m_i normalised rates;  L level
    Maximise   sum_i g_i u_i                                    or   L, or least  sum_k GPUs_k n_k
    Such that  sum_k use_kr n_k <= limit_r                      every row r
               u_i <= f_i + sum over unified k of i of rate_k n_k        every tenant
               f_i <= sum over prefill k of i of rate_k n_k
               f_i <= sum over decode k of i of rate_k n_k
               w_i L <= u_i                                     if a level is required

Rates are normalised: 1 is the rate that a tenant reaches alone on the whole fleet.

**Bounds.** Let y >= 0 be prices of the rows, W = y limits the worth of the whole fleet, and e_i(y) the highest
normalised rate that tenant i gets for a unit of worth: the best ratio ``rate / (use y)`` of its replicas, or of its
cheapest way through a prefill and a decode replica (`Routes.highest_rate`). A tenant on GPUs worth E_i serves
``u_i <= e_i E_i``, and ``sum E_i <= W``. So

    u_i >= m_i      costs tenant i at least m_i / e_i, and the rest gives ``max g_i e_i`` per unit of worth at most:
                    sum g_i u_i  <=  sum g_i m_i + max_i(g_i e_i) (W - sum m_i / e_i)

    u_i >= L w_i    costs L w_i / e_i:    L  <=  W / sum(w_i / e_i)

for every y: the multipliers of the rules need no search of their own. In terms of the dual, ``a_i = s / e_i`` with
``s = max g_i e_i`` is the price of tenant i's rate (for the level ``s = 1 / sum(w_i / e_i)``), and ``s y`` are the
prices of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from hetis.solver.highs import linear_program, quiet_highs
from hetis.solver.placement.fleet import UNIFIED, IntArray
from hetis.solver.placement.tables import FloatArray

ROWS_OF_TENANT = 3  # rows of each tenant: rate, sent, received


@dataclass(frozen=True, slots=True, eq=False)
class TenantsGoal:
    """The objective of the master: ``sum gains u`` with ``u >= floors``; with ``claims``, the least ``u / claims``.

    All arrays have shape [tenants], u being normalised rates.
    """

    gains: FloatArray
    floors: FloatArray
    claims: FloatArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TenantsBound:
    """Proof that no placement exceeds ``value``: dual feasible ``row_prices`` [rows] and ``multipliers`` [tenants]."""

    value: float
    row_prices: FloatArray
    multipliers: FloatArray


def bound_of(
    goal: TenantsGoal, row_prices: FloatArray, efficiency: FloatArray, limits: FloatArray
) -> TenantsBound | None:
    """Return the bound that prices prove, given e_i(y) [tenants]; None if they prove that the floors cannot be met.

    An efficiency is infinite if its search was stopped before it had a bound; a bound that depends on it is infinite.
    """
    worth = float(row_prices @ limits)
    effort = np.divide(1.0, efficiency, out=np.full(len(efficiency), np.inf), where=efficiency > 0.0)
    if goal.claims is not None:
        needed = float(goal.claims @ effort)  # value of the fleet that a level of 1 takes
        if needed == 0.0:
            return _nothing_proved(row_prices, efficiency)
        scale = 1.0 / needed if np.isfinite(needed) else 0.0
        multipliers = scale * np.where(np.isfinite(effort), effort, 0.0)
        return TenantsBound(scale * worth, scale * row_prices, multipliers)
    owing = goal.floors > 0.0
    if float(goal.floors[owing] @ effort[owing]) > worth:
        return None
    scale = float((goal.gains * efficiency).max())
    if np.isinf(scale):
        return _nothing_proved(row_prices, efficiency)
    # A tenant that can serve nothing needs no particular price: any price that is not below its gain is valid.
    multipliers = np.where(np.isfinite(effort), scale * np.where(np.isfinite(effort), effort, 1.0), goal.gains)
    value = scale * worth - float((multipliers - goal.gains) @ goal.floors)
    return TenantsBound(value, scale * row_prices, multipliers)


def _nothing_proved(row_prices: FloatArray, efficiency: FloatArray) -> TenantsBound:
    return TenantsBound(np.inf, row_prices, np.zeros_like(efficiency))


@dataclass(frozen=True, slots=True, eq=False)
class TenantColumns:
    """Columns of one tenant: normalised ``rates`` [K], ``uses`` [K, rows], ``sides`` [K] of its routes (one zone)."""

    rates: FloatArray
    uses: IntArray
    sides: IntArray

    def served(self, counts: IntArray) -> float:
        """Return the normalised rate for these counts of replicas."""
        unified, sent, received = np.bincount(self._rows(), counts * self.rates, ROWS_OF_TENANT)
        return float(unified + min(sent, received))

    def _rows(self) -> IntArray:
        """Return the tenant's row to which each column contributes: its rate itself, what is sent, what is received."""
        # Sides of one zone: unified, local senders, senders to all zones (none), receivers.
        return np.asarray(np.where(self.sides == UNIFIED, 0, np.where(self.sides <= 2, 1, 2)))


@dataclass(frozen=True, slots=True, eq=False)
class TenantsRelaxation:
    """Optimum of the relaxation: ``row_prices`` [rows] and ``multipliers`` [tenants] are its duals."""

    value: float
    row_prices: FloatArray
    multipliers: FloatArray
    counts: tuple[FloatArray, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TenantsChoice:
    """Whole counts of every tenant's columns, normalised rates [tenants], and a bound over whole counts of these."""

    counts: tuple[IntArray, ...]
    rates: FloatArray
    bound: float

    def of_more(self, blocks: Sequence[TenantColumns]) -> TenantsChoice:
        """Return the same choice after further columns were added to those it counts."""
        return TenantsChoice(tuple(_padded(blocks, self.counts)), self.rates, self.bound)

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
    of_tenants = duals[len(limits) : len(limits) + ROWS_OF_TENANT * len(blocks)].reshape(-1, ROWS_OF_TENANT)
    return TenantsRelaxation(
        value=float(highs.getInfo().objective_function_value),
        row_prices=duals[: len(limits)],
        multipliers=of_tenants[:, 0],
        counts=_split(np.array(solution.col_value), blocks),
    )


def choose_whole(
    blocks: Sequence[TenantColumns], limits: IntArray, goal: TenantsGoal, *, time_limit_s: float, gap: float,
    start: Sequence[IntArray] | None = None, least: Sequence[IntArray] | None = None,
    gpus: Sequence[FloatArray] | None = None, seed: int = 0,
) -> TenantsChoice | None:  # fmt: skip
    """Return whole counts within a relative gap; None if none was found in time.

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
        model.col_cost_ = np.concatenate([*gpus, np.zeros(2 * len(blocks) + 1)])
        model.sense_ = highspy.ObjSense.kMinimize
    highs = quiet_highs({"mip_rel_gap": gap, "mip_abs_gap": 0.0}, time_limit_s=time_limit_s, seed=seed)
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
    return [np.pad(n, (0, len(b.rates) - len(n))) for b, n in zip(blocks, counts, strict=True)]


def _as_solution(blocks: Sequence[TenantColumns], goal: TenantsGoal, counts: Sequence[IntArray]) -> Any:
    whole = _padded(blocks, counts)
    rates = _rates(blocks, whole)
    flows = [min(np.bincount(b._rows(), n * b.rates, ROWS_OF_TENANT)[1:]) for b, n in zip(blocks, whole, strict=True)]
    level = float((rates / goal.claims).min()) if goal.claims is not None else 0.0
    given = highspy.HighsSolution()
    given.col_value = [*np.concatenate(whole).astype(float).tolist(), *flows, *rates.tolist(), level]
    return given


def _split(values: FloatArray, blocks: Sequence[TenantColumns]) -> tuple[FloatArray, ...]:
    """Return the values of the replicas' columns, tenant by tenant."""
    ends = np.cumsum([len(block.rates) for block in blocks])
    return tuple(np.split(values[: ends[-1]], ends[:-1]))


def _model(blocks: Sequence[TenantColumns], limits: IntArray, goal: TenantsGoal, *, whole: bool) -> Any:
    """Return the master as a HiGHS model: columns n, f, u, L; rows inventory, three of each tenant, levels."""
    tenants = len(blocks)
    replicas = sum(len(block.rates) for block in blocks)
    num_rows, num_columns = len(limits) + (ROWS_OF_TENANT + 1) * tenants, replicas + 2 * tenants + 1
    matrix, first = np.zeros((num_columns, num_rows)), 0
    for i, block in enumerate(blocks):
        last, mine = first + len(block.rates), len(limits) + ROWS_OF_TENANT * i
        matrix[first:last, : len(limits)] = block.uses
        matrix[np.arange(first, last), mine + block._rows()] = -block.rates
        flow, rate = replicas + i, replicas + tenants + i
        matrix[flow, mine : mine + 3] = (-1.0, 1.0, 1.0)
        matrix[rate, mine] = 1.0
        if goal.claims is not None:
            matrix[rate, len(limits) + ROWS_OF_TENANT * tenants + i] = -1.0
            matrix[-1, len(limits) + ROWS_OF_TENANT * tenants + i] = goal.claims[i]
        first = last
    gain, lower, upper = np.zeros(num_columns), np.zeros(num_columns), np.full(num_columns, np.inf)
    lower[-1 - tenants : -1] = goal.floors
    if goal.claims is None:
        gain[-1 - tenants : -1], upper[-1] = goal.gains, 0.0
    else:
        gain[-1] = 1.0
    columns, rows = np.nonzero(matrix)
    row_upper = np.append(limits, np.zeros((ROWS_OF_TENANT + 1) * tenants))
    return linear_program(
        gain, (lower, upper), (np.full(num_rows, -np.inf), row_upper), [(rows, columns, matrix[columns, rows])],
        whole=np.arange(num_columns) < replicas if whole else None, maximise=True,
    )  # fmt: skip
