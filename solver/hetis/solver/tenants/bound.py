"""Bounds for several tenants from any prices of the shared inventory, in closed form.

Let y >= 0 be prices of the master's rows, W = y limits the worth of the whole fleet, and e_i(y) the highest normalised
rate that tenant i gets for a unit of worth: the best ratio ``rate / (use y)`` of its replicas, or of its cheapest way
through a prefill and a decode replica (`Routes.highest_rate`). A tenant on GPUs worth E_i serves ``u_i <= e_i E_i``,
and ``sum E_i <= W``. So

    u_i >= m_i      costs tenant i at least m_i / e_i, and the rest gives ``max g_i e_i`` per unit of worth at most:
                    sum g_i u_i  <=  sum g_i m_i + max_i(g_i e_i) (W - sum m_i / e_i)

    u_i >= L w_i    costs L w_i / e_i:    L  <=  W / sum(w_i / e_i)

for every y: the multipliers of the rules need no search of their own. In terms of the dual, ``a_i = s / e_i`` with
``s = max g_i e_i`` is the price of tenant i's rate (for the level ``s = 1 / sum(w_i / e_i)``), and ``s y`` are the
prices of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.placement.tables import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class TenantsGoal:
    """The objective of the master: ``sum gains u`` with ``u >= floors``; with ``claims`` the least ``u / claims``.

    All arrays have shape [tenants], u being normalised rates.
    """

    gains: FloatArray
    floors: FloatArray
    claims: FloatArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TenantsBound:
    """No placement has a higher ``value``: by ``row_prices`` [rows] and ``multipliers`` [tenants], dual feasible."""

    value: float
    row_prices: FloatArray
    multipliers: FloatArray


def bound_of(
    goal: TenantsGoal, row_prices: FloatArray, efficiency: FloatArray, limits: FloatArray
) -> TenantsBound | None:
    """Return the bound that prices prove, given e_i(y) [tenants]; None if they prove that the floors cannot be met.

    An efficiency is infinite if its search was stopped before it had any bound. A bound that depends on it is infinite.
    """
    worth = float(row_prices @ limits)
    effort = np.divide(1.0, efficiency, out=np.full(len(efficiency), np.inf), where=efficiency > 0.0)
    if goal.claims is not None:
        needed = float(goal.claims @ effort)  # worth of a level of 1
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
