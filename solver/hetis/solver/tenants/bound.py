"""Bounds for several tenants from any prices of the shared inventory, in closed form.

Let y >= 0 be prices of the master's rows, W = y limits what the whole fleet is worth, and e_i(y) the most normalised
rate that a unit of worth buys tenant i: the best ratio ``rate / (use y)`` of its replicas, or of its cheapest way
through a prefill and a decode replica (`Routes.highest_rate`). A tenant on GPUs worth E_i serves ``u_i <= e_i E_i``,
and ``sum E_i <= W``. So

    u_i >= m_i      costs tenant i at least m_i / e_i, what is left buys ``max g_i e_i`` at most:
                    sum g_i u_i  <=  sum g_i m_i + max_i(g_i e_i) (W - sum m_i / e_i)

    u_i >= L w_i    costs L w_i / e_i:    L  <=  W / sum(w_i / e_i)

whatever y is: the multipliers of the rules need no search of their own. In the words of a dual, ``a_i = s / e_i`` with
``s = max g_i e_i`` is the price of tenant i's rate (for the level ``s = 1 / sum(w_i / e_i)``), and ``s y`` are the
prices of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.placement.tables import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class TenantsGoal:
    """What the master maximises: ``sum gains u`` with ``u >= floors``; with ``claims`` the least ``u / claims``.

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
    """The bound that prices prove, given e_i(y) [tenants]; None: they prove that the floors cannot be met.

    An efficiency is infinite where its search was cut off before it knew any. What that leaves unbounded is infinite.
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
    # Who can serve nothing has no price to speak of: any that is not below its gain will do.
    multipliers = np.where(np.isfinite(effort), scale * np.where(np.isfinite(effort), effort, 1.0), goal.gains)
    value = scale * worth - float((multipliers - goal.gains) @ goal.floors)
    return TenantsBound(value, scale * row_prices, multipliers)


def _nothing_proved(row_prices: FloatArray, efficiency: FloatArray) -> TenantsBound:
    return TenantsBound(np.inf, row_prices, np.zeros_like(efficiency))
