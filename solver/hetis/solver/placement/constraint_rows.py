"""Rows that constraints, families and classes of requests add to the master.

They are pins, one GPU type for each role, and what pools serve of each class.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from hetis.solver.constraints import ConstraintIndex, Sum
from hetis.solver.placement.columns import Columns
from hetis.solver.placement.fleet import DeviceClass, IntArray, Resources
from hetis.solver.placement.replicas.tables import BoolArray, CostTables, FloatArray
from hetis.solver.plan import Role

ROUNDING = 1e-6  # ratio by which HiGHS may violate a row


@dataclass(frozen=True, slots=True)
class Pins:
    """P rows ``lower <= sum_k (use_k of_rows + each) n_k <= upper``; ``of_rows`` is [rows, P], the others [P]."""

    of_rows: FloatArray
    each: FloatArray
    lower: FloatArray
    upper: FloatArray

    def coefficients(self, uses: IntArray) -> FloatArray:
        """Return the coefficients of columns with these uses [K, rows]; [K, P]."""
        return np.asarray(uses @ self.of_rows + self.each)

    def are_kept(self, uses: IntArray, counts: IntArray) -> bool:
        """Return whether these numbers of replicas of every column satisfy the rows."""
        sums = counts @ self.coefficients(uses)
        return bool(np.all(sums >= self.lower - _room(self.lower)) and np.all(sums <= self.upper + _room(self.upper)))

    def allow_one(self, uses: IntArray) -> BoolArray:
        """Return whether a single replica with these uses [K, rows] exceeds no upper limit; [K].

        No coefficient is negative, so a replica that exceeds one alone is in no plan.
        """
        return np.asarray(np.all(self.coefficients(uses) <= self.upper + _room(self.upper), axis=1))


def _room(limits: FloatArray) -> FloatArray:
    """Return by how much HiGHS may exceed limits; 0 where there is no limit."""
    return np.where(np.isfinite(limits), ROUNDING * np.maximum(1.0, np.abs(limits)), 0.0)


def pins_of(index: ConstraintIndex | None, classes: tuple[DeviceClass, ...], resources: Resources) -> Pins | None:
    """Return the rows that a problem's constraints require, or None without any."""
    if index is None or not index.has_rows:
        return None
    used, count = len(index.least), len(index.least) + len(index.most) + 1
    of_rows = np.zeros((len(resources.rows), count))
    for row, (g, p) in enumerate(resources.rows):
        if p == 1:
            of_rows[row, sorted(classes[g].constraints.counts_for)] = 1.0
            of_rows[row, used:-1] = [unit_of(classes[g], each.of) for each in index.most]
    each = np.zeros(count)
    each[-1] = 1.0
    least, most = index.replicas
    lower = np.array([*index.least, *[-np.inf] * len(index.most), least], dtype=float)
    upper = np.array([*[np.inf] * used, *[each.most for each in index.most], most], dtype=float)
    return Pins(of_rows, each, lower, upper)


def unit_of(c: DeviceClass, of: Sum) -> float:
    """Return what one GPU of a class adds to a sum."""
    return 1.0 if of is Sum.GPUS else c.usd_per_hour or 0.0


@dataclass(frozen=True, slots=True)
class TypeOfRole:
    """The rows that give all prefill replicas one GPU type, and all decode replicas one.

    ``gpus`` [rows, T] counts GPUs by type, ``limits`` [T] are those of the fleet, ``role_of_side`` [sides] is 0 on the
    sides of prefill replicas, 1 on those of decode replicas, and -1 otherwise.
    """

    gpus: FloatArray
    limits: FloatArray
    role_of_side: IntArray

    @property
    def num_binaries(self) -> int:
        return 2 * len(self.limits)

    def coefficients(self, columns: Columns) -> FloatArray:
        """Return the GPUs of each role and type that columns take; [K, 2 T]."""
        of_types, role = columns.uses @ self.gpus, self.role_of_side[columns.sides]
        return np.concatenate([of_types * (role == each)[:, None] for each in range(2)], axis=1)

    def rows(self, columns: Columns, num_flows: int) -> tuple[FloatArray, FloatArray]:
        """Return coefficients [K + flows + 2 T, 2 T + 2] and upper limits of the rows."""
        num = self.num_binaries
        replicas = np.pad(self.coefficients(columns), ((0, num_flows), (0, 2)))
        binaries = np.concatenate([-np.diag(np.tile(self.limits, 2)), np.repeat(np.eye(2), num // 2, axis=0)], axis=1)
        return np.concatenate([replicas, binaries]), np.concatenate([np.zeros(num), np.ones(2)])

    def chosen(self, columns: Columns, counts: IntArray) -> FloatArray:
        """Return the binaries of whole counts."""
        return np.asarray((counts @ self.coefficients(columns) > 0).astype(float))

    def prices(self, duals: FloatArray) -> FloatArray:
        """Return what each row costs on every side in addition, from the duals of the first 2 T rows; [sides, rows]."""
        of_roles = np.concatenate([duals.reshape(2, -1) @ self.gpus.T, np.zeros((1, len(self.gpus)))])
        return np.asarray(of_roles[self.role_of_side])


@dataclass(frozen=True, slots=True)
class ClassRows:
    """The rows ``L <= sum over ranges R with class k of (U_R + f_R) / F_R`` of every class k; L is one more column.

    U_R is the rate of unified replicas for the requests of range R, f_R the flows between its other replicas, and F_R
    its share of all requests. ``covers`` [ranges, classes] is 1 / F_R where R has class k, and 0 otherwise.
    ``range_of_side`` [sides] is that of unified replicas, and -1 on the sides of others; ``range_of_zone`` is [Z].
    """

    covers: FloatArray
    range_of_side: IntArray
    range_of_zone: IntArray

    def rows(self, columns: Columns, num_flows: int, num_binaries: int) -> FloatArray:
        """Return coefficients [K + flows + binaries + 1, classes] of the rows, whose upper limits are 0."""
        of_sides = np.concatenate([self.covers, np.zeros((1, self.covers.shape[1]))])[self.range_of_side]
        replicas = of_sides[columns.sides] * columns.rates[:, None]
        flows = np.repeat(self.covers[self.range_of_zone], len(self.range_of_zone), axis=0)[:num_flows]
        binaries, level = np.zeros((num_binaries, self.covers.shape[1])), np.ones((1, self.covers.shape[1]))
        return np.concatenate([-replicas, -flows, binaries, level])

    def served(self, columns: Columns, counts: IntArray, flows: FloatArray) -> FloatArray:
        """Return how much whole replicas serve of each class, over its share; [classes]. The least of these is L."""
        by_flows = (flows.sum(axis=1)[:, None] * self.covers[self.range_of_zone]).sum(axis=0)
        return np.asarray(by_flows - counts @ self.rows(columns, 0, 0)[: len(counts)])

    def rate_prices(self, duals: FloatArray) -> FloatArray:
        """Return what a request/s of each range is worth, from the duals of the rows; [ranges]."""
        return np.asarray(self.covers @ duals)


def class_rows(costs: CostTables) -> ClassRows | None:
    """Return the rows of the problem's classes of requests; None if it has none."""
    problem, routes = costs.problem, costs.routes
    if not problem.workload.classes:
        return None
    shares, ranges = problem.workload.shares, problem.ranges()
    serves = np.array([[not names or name in names for name in shares] for names in ranges], dtype=float)
    of_side = np.where([role is Role.UNIFIED for role in routes.roles], routes.ranges, -1)
    return ClassRows(serves / (serves @ np.array([*shares.values()]))[:, None], of_side, routes.ranges_of_zones)


def type_of_role(costs: CostTables) -> TypeOfRole | None:
    """Return the rows of a family with one GPU type for each role, or None if it is another family."""
    if not costs.problem.family.one_type_per_role:
        return None
    types = list(dict.fromkeys(c.gpu for c in costs.classes))
    gpus = np.array([[float(p == 1 and costs.classes[g].gpu == gpu) for gpu in types] for g, p in costs.resources.rows])
    routes = costs.routes
    roles = np.full(routes.num_sides, -1, dtype=np.int64)
    for role, of_side in enumerate(((False, True), (False,))):
        for zone, afar in itertools.product(range(len(routes.zones)), of_side):
            roles[routes.side((Role.PREFILL, Role.DECODE)[role], zone, sends_afar=afar)] = role
    return TypeOfRole(gpus, costs.resources.limits @ gpus, roles)
