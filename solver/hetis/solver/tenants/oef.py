"""OEF's shares of GPUs (Middleware'24, arXiv 2403.18545), from one speed-up of every tenant per class of GPUs.

With tenants l of weight pi_l, rates w_l per GPU over those on the slowest class on which l runs, shares x_l [classes]
in GPUs (fractions are shares of time), and the fleet m:

    cooperative       max sum_l w_l x_l   s.t.  w_l x_l / pi_l >= w_l x_i / pi_i   all l, i        (no envy)
    non-cooperative   max sum_l w_l x_l   s.t.  w_l x_l / pi_l equal for all l                      (equal value)
    both              sum_l x_l <= m,  x >= 0

The paper defines weights by cloning a tenant pi_l times; clones with equal shares satisfy its rows exactly if these
hold, so weights need not be whole here.

**Bounds.** Rows in the objective with multipliers (Lagrange) leave only the fleet's limits, so that every class goes to
the tenant with the largest coefficient: for any mu >= 0 (any nu with sum 0)

    cooperative       sum_j m_j max_l max(0, w_lj (1 + sum_i mu_li / pi_l) - sum_i mu_il w_ij / pi_l)
    non-cooperative   sum_j m_j max_l max(0, w_lj (1 + nu_l / pi_l))

is at least the total value of all such shares. HiGHS's duals are such multipliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import highspy
import numpy as np

from hetis.solver.backends.highs import linear_program, quiet_highs
from hetis.solver.errors import BrokenProofError
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.tables import FloatArray
from hetis.solver.tenants.fleet_search import FleetSearch, worth

ROUNDING = 1e-6  # of a GPU
FEASIBILITY = {"primal_feasibility_tolerance": 1e-10}


class OefRule(StrEnum):
    COOPERATIVE = "oef-cooperative"
    NON_COOPERATIVE = "oef-non-cooperative"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OefShares:
    """Shares in GPUs, [tenants, classes], their total value, and what no shares under this rule exceed."""

    rule: OefRule
    amounts: FloatArray
    value: float
    bound: float


def solve_oef(rule: OefRule, counts: FloatArray, rates: FloatArray, weights: FloatArray) -> OefShares:
    """Return the shares with the most total value under a rule.

    Args:
        counts: GPUs of every class, [classes].
        rates: every tenant's rate per GPU on each class alone, in a unit of its own, [tenants, classes]; 0 where it
            does not run, but no tenant runs nowhere.
        weights: [tenants].
    """
    speedups = rates / np.where(rates > 0.0, rates, np.inf).min(axis=1, keepdims=True)
    tenants, classes = speedups.shape
    is_cooperative = rule is OefRule.COOPERATIVE
    if is_cooperative:
        own, other = np.nonzero(~np.eye(tenants, dtype=bool))
    else:
        own, other = np.arange(1, tenants), np.zeros(tenants - 1, dtype=np.int64)
    of_class = speedups * counts  # columns are shares of a class
    mine = of_class[own] / weights[own, None]
    theirs = of_class[own if is_cooperative else other] / weights[other, None]
    unit, row_units = of_class.max(), np.maximum(mine, theirs).max(axis=1, initial=0.0)
    cell = np.arange(tenants * classes).reshape(tenants, classes)
    row = classes + np.arange(len(own))
    program = linear_program(
        of_class.ravel() / unit,
        (np.zeros(of_class.size), np.ones(of_class.size)),
        (
            np.append(np.full(classes, -np.inf), np.zeros(len(own))),
            np.append(np.ones(classes), np.full(len(own), np.inf if is_cooperative else 0.0)),
        ),
        [
            (np.arange(classes), cell, 1.0),
            (row[:, None], cell[own], mine / row_units[:, None]),
            (row[:, None], cell[other], -theirs / row_units[:, None]),
        ],
        maximise=True,
    )
    highs = quiet_highs(FEASIBILITY)
    highs.passModel(program)
    highs.run()
    if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        status = highs.modelStatusToString(highs.getModelStatus())
        raise BrokenProofError(
            f"HiGHS ends a program of shares with {status}: perhaps rates and weights are too unlike"
        )
    solution = highs.getSolution()
    duals = -np.array(solution.row_dual)[classes:] * unit / row_units
    if is_cooperative:
        multipliers = np.zeros((tenants, tenants))
        multipliers[own, other] = np.maximum(0.0, duals)
        bound = cooperative_bound(counts, speedups, weights, multipliers)
    else:
        bound = non_cooperative_bound(counts, speedups, weights, np.append(-duals.sum(), duals))
    amounts = np.maximum(0.0, 0.0 + np.array(solution.col_value).reshape(tenants, classes)) * counts
    value = float((speedups * amounts).sum())
    return OefShares(rule=rule, amounts=amounts, value=value, bound=max(bound, value))


def cooperative_bound(counts: FloatArray, speedups: FloatArray, weights: FloatArray, multipliers: FloatArray) -> float:
    """Return a bound on the total value without envy; ``multipliers`` [tenants, tenants] are any >= 0 of l envies i."""
    own = speedups * (1.0 + multipliers.sum(axis=1) / weights)[:, None]
    return float(counts @ np.maximum(0.0, own - (multipliers.T @ speedups) / weights[:, None]).max(axis=0))


def non_cooperative_bound(
    counts: FloatArray, speedups: FloatArray, weights: FloatArray, multipliers: FloatArray
) -> float:
    """Return a bound on the total of equal values; multipliers [tenants] are arbitrary, and reduced by their mean."""
    nu = multipliers - multipliers.mean()
    return float(counts @ np.maximum(0.0, speedups * (1.0 + nu / weights)[:, None]).max(axis=0))


# --- at the rates that replicas reach


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OefOutcome:
    """OEF's shares rounded down to whole GPUs, on which every tenant is placed separately.

    ``rates`` [tenants] are in requests/s, ``normalised`` over those that each reaches alone on the whole fleet,
    ``over_part`` over those of its own part; ``value`` is as that of `FleetShares`.
    """

    shares: OefShares
    classes: tuple[str, ...]  # GPU type and GPUs per node
    gpus: IntArray  # [tenants, classes]
    limits: IntArray  # [tenants, rows of the inventory]
    rates: FloatArray
    normalised: FloatArray
    over_part: FloatArray
    value: float
    level: float  # the least normalised rate per part of weight

    @property
    def rule(self) -> OefRule:
        return self.shares.rule


def oef_outcomes(search: FleetSearch) -> tuple[OefOutcome, ...]:
    """Return what the shares of both rules are at real rates; nothing if a tenant runs on no class of GPUs alone."""
    resources, classes = search.replicas[0].costs.resources, search.replicas[0].costs.classes
    class_of_row = np.array([g for g, _ in resources.rows])
    counts = np.array([float(each.available) for each in classes])
    rates = np.zeros((len(search.tenants), len(classes)))
    for i, one in enumerate(search.replicas):
        for g, each in enumerate(classes):
            limits = np.where(class_of_row == g, search.limits, 0)
            rates[i, g] = search.reach(one, limits, f"{one.tenant.name} on {each.gpu} alone").rate / max(1.0, counts[g])
    if not rates.any(axis=1).all():
        return ()
    weights = np.array([tenant.weight for tenant in search.tenants])
    return tuple(_outcome(search, solve_oef(rule, counts, rates, weights), class_of_row) for rule in OefRule)


def _outcome(search: FleetSearch, shares: OefShares, class_of_row: IntArray) -> OefOutcome:
    gpus = np.floor(shares.amounts + ROUNDING).astype(np.int64)
    limits = np.minimum(search.limits, gpus[:, class_of_row])
    rates = np.array(
        [
            search.reach(one, own, f"{one.tenant.name} on its share by {shares.rule}").rate
            for one, own in zip(search.replicas, limits, strict=True)
        ]
    )
    parts, worths = np.array([part.rate for part in search.parts]), map(worth, search.tenants, search.alone)
    normalised = rates / np.array([alone.rate for alone in search.alone])
    return OefOutcome(
        shares=shares,
        classes=tuple(f"{each.gpu} x{each.gpus_per_node}" for each in search.replicas[0].costs.classes),
        gpus=gpus,
        limits=limits,
        rates=rates,
        normalised=normalised,
        over_part=np.divide(rates, parts, out=np.full(len(rates), np.inf), where=parts > 0.0),
        value=float(rates @ np.array(list(worths))),
        level=min(own / tenant.weight for own, tenant in zip(normalised.tolist(), search.tenants, strict=True)),
    )
