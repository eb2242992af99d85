"""A lower bound on the objective from multipliers alone, by weak duality and without trusting any solver.

For multipliers p of the affine pieces and nu of the network card (together at most 1), mu of the blocks (for one device
over the horizons together at most P_i) and eta of the budget, a head group of request j on device i costs
    w_ij = sum_k p_ik (alpha_ik + beta_ik l_j)  +  nu eta_0 [i worker]  +  mu_i b_j  +  sum_t mu_it m_jt

and leaves i for the device at which ``w + charge`` is least, if that is less than staying. So no placement beats

    sum_ik p_ik base_ik + nu nic_base - sum_i mu_i room_i - sum_it mu_it limit_i - eta budget
      + sum_ij now_ij min(w_ij,  charge_ij + min_k (w_kj + charge_kj + eta bytes_j))

while closed devices take nothing and everything leaves them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.column_sifting import BoolArray
from hetis.solver.dispatch.problem import FloatArray
from hetis.solver.redispatch.tables import RedispatchTables


class Prices(NamedTuple):
    """Multipliers: of pieces [D, K], the network card, blocks now [D], blocks at the horizons [H, D], the budget."""

    piece: FloatArray
    nic: float
    now: FloatArray
    later: FloatArray
    budget: float


def group_prices(tables: RedispatchTables, prices: Prices) -> FloatArray:
    """Return w, the cost of a head group of each request on each device, shape [N, D]."""
    w: FloatArray = np.outer(tables.context, (prices.piece * tables.beta).sum(axis=1)) + (
        prices.piece * tables.alpha
    ).sum(axis=1)
    w += np.outer(tables.blocks, prices.now) + tables.later.T @ prices.later
    if tables.primary >= 0:
        w += prices.nic * tables.nic_group_s * (np.arange(len(tables.unit)) != tables.primary)
    return w


def arrival_prices(tables: RedispatchTables, prices: Prices, is_open: BoolArray) -> FloatArray:
    """Return the cost of a head group that moves to a device, or infinity if it cannot; shape [N, D]."""
    arriving = group_prices(tables, prices) + tables.charge + prices.budget * tables.num_bytes[:, None]
    return np.where(tables.takes & is_open, arriving, np.inf)


def proven_bound(tables: RedispatchTables, prices: Prices, is_open: BoolArray) -> float:
    """Return the bound over placements on open devices for any multipliers; optimal ones give the highest."""
    fixed, bound = feasible(tables, prices, is_open), 0.0
    bound += float((fixed.piece * tables.base)[is_open].sum()) + fixed.nic * tables.nic_base
    bound -= float(fixed.now @ tables.room + (fixed.later * tables.limit).sum())
    if fixed.budget > 0:
        bound -= fixed.budget * tables.budget
    leaving = tables.charge + arrival_prices(tables, fixed, is_open).min(axis=1, initial=np.inf)[:, None]
    staying = np.where(is_open, group_prices(tables, fixed), np.inf)
    holds = tables.now > 0
    return bound + float((tables.now * np.minimum(staying, leaving, where=holds, out=np.zeros_like(staying))).sum())


def feasible(tables: RedispatchTables, prices: Prices, is_open: BoolArray) -> Prices:
    """Return the nearest multipliers within their limits: none below 0, and 0 for closed devices."""
    piece = np.maximum(0.0, prices.piece) * is_open[:, None]
    # The card's row holds only while workers are in use; if that is open, it may be slack for no reason.
    workers_open = np.any(is_open & (np.arange(len(is_open)) != tables.primary))
    nic = max(0.0, prices.nic) if tables.primary >= 0 and workers_open else 0.0
    shrink = 1.0 / max(1.0, float(piece.sum()) + nic)
    later = np.maximum(0.0, prices.later)
    later = later * np.minimum(1.0, tables.short_s / np.maximum(later.sum(axis=0), 1e-300))
    return Prices(
        piece=piece * shrink, nic=nic * shrink, now=np.maximum(0.0, prices.now), later=later,
        budget=max(0.0, prices.budget) if np.isfinite(tables.budget) else 0.0,
    )  # fmt: skip
