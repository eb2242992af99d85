"""Shares by any rule: OEF's two, Gavel's max-min, Gandiva_fair's trading and an equal split.

OEF (Middleware'24, arXiv 2403.18545) has two fair rules that maximise total value. With claimants l of weight pi_l,
speed-ups w_l and shares x_l [types], m the fleet:

    cooperative       max sum_l w_l x_l   s.t.  w_l x_l / pi_l >= w_l x_i / pi_i   all l, i        (no envy)
    non-cooperative   max sum_l w_l x_l   s.t.  w_l x_l / pi_l equal for all l                      (equal value)
    both              sum_l x_l <= m,  x >= 0

The paper defines weights by cloning a claimant pi_l times; clones with equal shares satisfy its rows exactly if these
hold, so weights need not be whole here.

**Bounds.** Rows in the objective with multipliers (Lagrange) leave only the fleet's limits, so that every type goes to
the claimant with the largest coefficient: for any mu >= 0 (any nu with sum 0)

    cooperative       sum_j m_j max_l max(0, w_lj (1 + sum_i mu_li / pi_l) - sum_i mu_il w_ij / pi_l)
    non-cooperative   sum_j m_j max_l max(0, w_lj (1 + nu_l / pi_l))

is at least the total value of all fair shares. HiGHS's duals are such multipliers.

**Ties.** Of shares of equal total value, a claimant should have few GPU types, adjacent in speed, because a job on fast
and slow GPUs waits for the slow ones. OEF's paper states that its optimum gives every claimant adjacent types; for
arbitrary speed-ups a vertex of the program does not (190 of 300 random instances do), so ties are broken.

The other rules are as `SYSTEMS.md` section 2 defines them. If one leaves a tie open, the shares with the highest total
value are used: the baseline in its best case.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import highspy
import numpy as np

from hetis.solver.errors import BrokenProofError
from hetis.solver.highs import linear_program, quiet_highs
from hetis.solver.shares.share_problem import BoolArray, FairnessRule, FloatArray, IntArray, ShareProblem, Shares

TIE_SECONDS = 2.0
SHARE_OF_NOTHING = 1e-7  # share of a type's GPUs below which anything is rounding
LOSS = 1e-9  # share of the total value within which shares count as equal
LEAST_SPEED = 1e-2  # speed, relative to the slowest type on which a job runs, of a type on which it does not run
LEVEL_LOSS = 1e-9  # share of the level that is given up so that the second program has room for rounding
FEASIBILITY = 1e-10  # by how much HiGHS may break a row or bound: less than these losses


def solve_shares(problem: ShareProblem, rule: FairnessRule) -> Shares:
    """Return shares of a fleet under a rule; the same for the same input."""
    solvers = {
        FairnessRule.COOPERATIVE: cooperative,
        FairnessRule.NON_COOPERATIVE: non_cooperative,
        FairnessRule.MAX_MIN: max_min,
        FairnessRule.TRADING: trading,
        FairnessRule.EQUAL: equal_split,
    }
    return solvers[rule](problem)


# --- programs over shares


@dataclass(slots=True)
class Program:
    """``max gain x`` over shares x [claimants, types] in multiples of an equal split, and a few more columns >= 0.

    Rows are added in groups. HiGHS receives them and the objective divided by their largest coefficients: its
    tolerances are absolute, while GPUs, speed-ups and weights may differ by orders of magnitude.
    """

    gain: FloatArray
    upper: FloatArray
    whole: BoolArray
    rows: list[tuple[float, float]] = field(default_factory=list)  # lower and upper limits
    entries: list[tuple[Any, Any, Any]] = field(default_factory=list)

    def add_rows(self, columns: IntArray, values: Any, *, low: float = -np.inf, high: float = np.inf) -> None:
        """Add rows ``low <= sum values x[columns] <= high``; columns and values have shape [rows, entries]."""
        self.entries.append((len(self.rows) + np.arange(len(columns))[:, None], columns, values))
        self.rows += [(low, high)] * len(columns)

    def widened(self, gain: FloatArray) -> Program:
        """Return the same rows with another objective over these columns and further ones."""
        more = len(gain) - len(self.gain)
        upper, whole = np.append(self.upper, np.full(more, np.inf)), np.append(self.whole, np.zeros(more, bool))
        return replace(self, gain=gain, upper=upper, whole=whole, rows=[*self.rows], entries=[*self.entries])

    def solve(
        self, *, time_limit_s: float = np.inf, start: FloatArray | None = None
    ) -> tuple[FloatArray, FloatArray] | None:
        """Return the columns of an optimum and the duals of the rows (meaningless for a program with whole numbers).

        ``start`` is a feasible choice of all columns. Returns None if no solution was found in time.

        Raises:
            BrokenProofError: HiGHS finds no optimum of a program without whole numbers.
        """
        is_whole = bool(self.whole.any())
        largest, unit = np.zeros(len(self.rows)), float(np.abs(self.gain).max())
        for rows, _, values in self.entries:
            np.maximum.at(largest, *np.broadcast_arrays(rows, np.abs(values)))
        low, high = zip(*self.rows, strict=True)
        model = linear_program(
            self.gain / unit,
            (np.zeros(len(self.gain)), self.upper),
            (np.array(low) / largest, np.array(high) / largest),
            [(rows, columns, values / largest[rows]) for rows, columns, values in self.entries],
            whole=self.whole if is_whole else None,
            maximise=True,
        )
        options = {"mip_rel_gap": 0.0, "mip_abs_gap": 1e-9, "primal_feasibility_tolerance": FEASIBILITY}
        highs = quiet_highs(options, time_limit_s=time_limit_s)
        highs.passModel(model)
        if start is not None:
            given = highspy.HighsSolution()
            given.col_value = start.tolist()
            highs.setSolution(given)
        highs.run()
        optimal = highspy.HighsModelStatus.kOptimal
        if not is_whole and highs.getModelStatus() != optimal:  # presolve may lose a program of very unlike numbers
            highs.setOptionValue("presolve", "off")
            highs.clearSolver()
            highs.run()
        if not is_whole and highs.getModelStatus() != optimal:
            status, worths = highs.modelStatusToString(highs.getModelStatus()), self.gain[self.gain > 0.0]
            raise BrokenProofError(
                f"HiGHS ends a program of shares with {status}: an equal split of a type is worth from "
                f"{worths.min():.3g} to {worths.max():.3g}, perhaps too unlike: let speed-ups and weights differ less"
            )
        if highs.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        solution = highs.getSolution()
        return np.array(solution.col_value), np.array(solution.row_dual) * unit / largest


def share_program(problem: ShareProblem, extra_columns: int = 0) -> Program:
    """Return the program that all rules share: total value, and the fleet's limits as its first rows."""
    count, types = problem.speedups.shape
    gain = np.append((problem.speedups * problem.equal_split).ravel(), np.zeros(extra_columns))
    program = Program(gain, np.full(len(gain), np.inf), np.zeros(len(gain), bool))
    for j in range(types):
        program.add_rows((np.arange(count) * types + j)[None, :], problem.equal_split[:, j], high=problem.counts[j])
    return program


def amounts_of(problem: ShareProblem, columns: FloatArray) -> FloatArray:
    """Return the GPUs in the first columns of a program, [V, K]."""
    multiples = columns[: problem.speedups.size].reshape(problem.speedups.shape)
    return np.asarray(np.maximum(0.0, multiples) * problem.equal_split)


# --- OEF


def cooperative(problem: ShareProblem, *, tie_seconds: float = TIE_SECONDS) -> Shares:
    """Return the envy-free shares with the highest total value; none is worth less than an equal split to its claimant.

    Among shares with the same total, those that span few adjacent types are preferred, searched for during at most
    ``tie_seconds`` (0: no search).
    """
    count = len(problem.weights)
    apart = ~np.eye(count, dtype=bool)  # rows w_l x_l / pi_l - w_l x_i / pi_i >= 0 for l != i, by l and then i
    own, other = np.nonzero(apart)
    worth = (problem.speedups * problem.counts)[own] / problem.weights.sum()
    values = np.concatenate([worth, -worth], axis=1)
    program = share_program(problem)
    _add_comparisons(program, problem, own, other, values, high=np.inf)
    found = program.solve()
    assert found is not None, "an equal split is without envy"
    multipliers = np.zeros((count, count))
    multipliers[apart] = np.maximum(0.0, -found[1][len(problem.counts) :])
    bound = cooperative_bound(problem, multipliers)
    return _settled(problem, FairnessRule.COOPERATIVE, program, found[0], bound, multipliers, tie_seconds)


def non_cooperative(problem: ShareProblem, *, tie_seconds: float = TIE_SECONDS) -> Shares:
    """Return the shares with the highest total value in which all claimants have equal value per part.

    No claimant gains by overstating its speed-ups. There is no other guarantee: understating them does pay, and a
    claimant may be worse off than with an equal split.
    """
    others = np.arange(1, len(problem.weights))  # rows w_l x_l / pi_l = w_0 x_0 / pi_0 for l > 0
    per_part = problem.speedups * problem.counts / problem.weights.sum()
    values = np.concatenate([per_part[1:], -np.broadcast_to(per_part[0], per_part[1:].shape)], axis=1)
    program = share_program(problem)
    _add_comparisons(program, problem, others, 0 * others, values, high=0.0)
    found = program.solve()
    assert found is not None, "no shares at all are equal"
    multipliers = np.zeros(len(problem.weights))
    multipliers[1:] = -found[1][len(problem.counts) :]
    multipliers[0] = -multipliers[1:].sum()
    bound = non_cooperative_bound(problem, multipliers)
    return _settled(problem, FairnessRule.NON_COOPERATIVE, program, found[0], bound, multipliers, tie_seconds)


def _add_comparisons(
    program: Program, problem: ShareProblem, own: IntArray, other: IntArray, values: FloatArray, *, high: float
) -> None:
    """Add a row >= 0 for each pair of claimants, over the shares of both."""
    types = problem.speedups.shape[1]
    cells = np.concatenate([own[:, None] * types + np.arange(types), other[:, None] * types + np.arange(types)], axis=1)
    program.add_rows(cells, values, low=0.0, high=high)


def cooperative_bound(problem: ShareProblem, multipliers: FloatArray) -> float:
    """Return a bound on the total value of envy-free shares; ``multipliers`` [V, V] are any >= 0 of ``l envies i``."""
    mu = np.maximum(0.0, multipliers)
    w, pi = problem.speedups, problem.weights
    coefficients = w * (1.0 + mu.sum(axis=1) / pi)[:, None] - (mu.T @ w) / pi[:, None]
    return float(problem.counts @ np.maximum(0.0, coefficients).max(axis=0))


def non_cooperative_bound(problem: ShareProblem, multipliers: FloatArray) -> float:
    """Return a bound on the total value of equal shares; multipliers [V] are arbitrary, and reduced by their mean."""
    nu = multipliers - multipliers.mean()
    coefficients = problem.speedups * (1.0 + nu / problem.weights)[:, None]
    return float(problem.counts @ np.maximum(0.0, coefficients).max(axis=0))


def _settled(
    problem: ShareProblem, rule: FairnessRule, program: Program, columns: FloatArray, bound: float,
    multipliers: FloatArray, tie_seconds: float,
) -> Shares:  # fmt: skip
    """Return the shares of an optimum, or of an equally good one with fewer types."""
    amounts = amounts_of(problem, columns)
    if tie_seconds > 0:
        amounts = fewest_types(problem, program, amounts, time_limit_s=tie_seconds)
    return _shares(problem, rule, amounts, bound, multipliers)


def _shares(
    problem: ShareProblem, rule: FairnessRule, amounts: FloatArray, bound: float, multipliers: FloatArray | None = None
) -> Shares:
    value = float(problem.values(amounts).sum())
    multipliers = np.zeros(0) if multipliers is None else multipliers
    return Shares(rule=rule, amounts=amounts, value=value, bound=max(bound, value), multipliers=multipliers)


# --- ties


def by_speed(problem: ShareProblem) -> IntArray:
    """Return GPU types from slow to fast, by their mean speed-up over claimants, [K]."""
    return np.asarray(np.argsort(problem.speedups.mean(axis=0), kind="stable"))


def spans(problem: ShareProblem, amounts: FloatArray) -> IntArray:
    """Return the number of types from the slowest to the fastest, both included, in each claimant's share, [V]."""
    used = amounts[:, by_speed(problem)] > SHARE_OF_NOTHING * problem.counts[by_speed(problem)]
    first = np.argmax(used, axis=1)
    last = used.shape[1] - 1 - np.argmax(used[:, ::-1], axis=1)
    return np.where(used.any(axis=1), last - first + 1, 0)


def fewest_types(problem: ShareProblem, program: Program, amounts: FloatArray, *, time_limit_s: float) -> FloatArray:
    """Return shares as good as ``amounts`` under the rows of ``program`` with the fewest types found in the time.

    A mixed program over x and three marks per claimant and type, in order of speed: *used* or faster than a used one,
    *used* or slower than one, and both: between the ends. The sum of the last is minimised.
    """
    count, types = amounts.shape
    if types < 2 or int(spans(problem, amounts).sum()) <= count:
        return amounts
    cells = count * types
    gain = np.concatenate([np.zeros(3 * cells), np.full(cells, -1.0)])
    wider = program.widened(gain)
    wider.upper[cells:] = 1.0
    wider.whole[cells : 3 * cells] = 1
    order = by_speed(problem)
    cell = np.arange(cells).reshape(count, types)[:, order]
    above, below, between = cell + cells, cell + 2 * cells, cell + 3 * cells
    limits = np.broadcast_to(problem.counts[order], (count, types))
    for mark in (above, below):  # x_lj <= m_j mark
        wider.add_rows(_table(cell, mark), _table(problem.equal_split[:, order], -limits), high=0.0)
    ones = np.ones((count, types - 1))
    wider.add_rows(_table(above[:, :-1], above[:, 1:]), _table(ones, -ones), high=0.0)  # stays set towards fast
    wider.add_rows(_table(below[:, 1:], below[:, :-1]), _table(ones, -ones), high=0.0)  # and towards slow
    wider.add_rows(  # between >= above + below - 1
        np.stack([between.ravel(), above.ravel(), below.ravel()], axis=1), np.array([1.0, -1.0, -1.0]), low=-1.0
    )
    value = float(problem.values(amounts).sum())
    wider.add_rows(np.arange(cells)[None, :], program.gain[None, :cells], low=value * (1.0 - LOSS))
    found = wider.solve(time_limit_s=time_limit_s, start=_marked(problem, amounts))
    if found is None:
        return amounts
    better = amounts_of(problem, found[0])
    return better if int(spans(problem, better).sum()) < int(spans(problem, amounts).sum()) else amounts


def _table(first: Any, second: Any) -> Any:
    """Return two entries per row, from arrays of equal shape."""
    return np.stack([first.ravel(), second.ravel()], axis=1)


def _marked(problem: ShareProblem, amounts: FloatArray) -> FloatArray:
    """Return the columns of the program that represent ``amounts``."""
    order = by_speed(problem)
    used = (amounts > 0.0)[:, order]
    above, below = np.logical_or.accumulate(used, axis=1), np.logical_or.accumulate(used[:, ::-1], axis=1)[:, ::-1]
    back = np.argsort(order)
    marks = (mark[:, back].ravel().astype(float) for mark in (above, below, above & below))
    return np.concatenate([(amounts / problem.equal_split).ravel(), *marks])


# --- other published rules


def equal_split(problem: ShareProblem) -> Shares:
    """Return the same part of every GPU type for every claimant, by weight."""
    return _shares(problem, FairnessRule.EQUAL, problem.equal_split, 0.0)


def max_min(problem: ShareProblem) -> Shares:
    """Return Gavel's (OSDI'20) shares: the least value relative to an equal split is as large as possible.

    Among those shares, the ones with the highest total value. ``bound`` is that of the second program.
    """
    count, types = problem.speedups.shape
    over_equal = problem.speedups / problem.values(problem.equal_split)[:, None]
    cells = count * types
    columns = np.concatenate([np.arange(cells).reshape(count, types), np.full((count, 1), cells)], axis=1)
    levels = share_program(problem, extra_columns=1)
    levels.gain = np.concatenate([np.zeros(cells), [1.0]])
    levels.add_rows(columns, np.concatenate([over_equal * problem.equal_split, -np.ones((count, 1))], axis=1), low=0.0)
    found = levels.solve()
    assert found is not None, "nobody having anything is a solution"
    program = share_program(problem)
    program.add_rows(columns[:, :-1], over_equal * problem.equal_split, low=float(found[0][cells]) * (1.0 - LEVEL_LOSS))
    best = program.solve()
    assert best is not None, "the level was reached"
    amounts = amounts_of(problem, best[0])
    # Weak duality: claimants that must reach a level pay for it, and each type goes to the claimant of highest worth.
    multipliers = np.maximum(0.0, -best[1][types:])
    paid = float(found[0][cells]) * float(multipliers.sum())
    bound = float(problem.counts @ (problem.speedups + multipliers[:, None] * over_equal).max(axis=0)) - paid
    return _shares(problem, FairnessRule.MAX_MIN, amounts, bound, multipliers)


def trading(problem: ShareProblem) -> Shares:
    """Return Gandiva_fair's (EuroSys'20) shares: pairs trade fast GPUs of one for slow ones of the other.

    Trading starts from an equal split. The pair whose speed-ups between two types differ most trades first, at the mean
    of the two speed-ups as the price, until one of them has nothing to trade. Both gain by every trade, so no claimant
    has less than an equal split at the end. A job sells GPUs on which it cannot run at any price, and is not paid in
    such GPUs for those on which it runs.
    """
    amounts, nothing = problem.equal_split.copy(), 1e-12 * problem.counts
    types, runs = range(len(problem.counts)), problem.speedups > 0.0
    speeds = np.maximum(problem.speedups, LEAST_SPEED)
    while True:
        best_gain, trade = 1e-9, None
        for slow in types:
            for fast in types:
                ratio = speeds[:, fast] / speeds[:, slow]
                sells = (amounts[:, fast] > nothing[fast]) & (runs[:, slow] | ~runs[:, fast])
                buys = (amounts[:, slow] > nothing[slow]) & (runs[:, fast] | ~runs[:, slow])
                sellers = np.where(sells, ratio, np.inf)  # sellers gain little by fast GPUs
                buyers = np.where(buys, ratio, -np.inf)
                gain = float(buyers.max() - sellers.min())
                if np.isfinite(gain) and gain > best_gain * (1.0 + 1e-12):
                    best_gain, trade = gain, (slow, fast, int(sellers.argmin()), int(buyers.argmax()))
        if trade is None:
            return _shares(problem, FairnessRule.TRADING, amounts, np.inf)
        _trade(speeds, amounts, *trade)


def _trade(speedups: FloatArray, amounts: FloatArray, slow: int, fast: int, seller: int, buyer: int) -> None:
    """Move as many fast GPUs to the buyer, and slow ones to the seller, as both can trade."""
    price = (speedups[seller, fast] / speedups[seller, slow] + speedups[buyer, fast] / speedups[buyer, slow]) / 2.0
    given, paid = amounts[seller, fast], amounts[seller, fast] * price
    if paid > amounts[buyer, slow]:
        given, paid = min(given, amounts[buyer, slow] / price), amounts[buyer, slow]
    for claimant, sign in ((seller, -1.0), (buyer, 1.0)):  # the one with less to trade keeps exactly nothing
        amounts[claimant, fast] += sign * given
        amounts[claimant, slow] -= sign * paid
