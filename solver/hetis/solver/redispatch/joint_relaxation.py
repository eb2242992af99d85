"""The relaxation over all choices of devices in use: fractions to round from, and a bound on every placement.

**Choices.** An idle device offers nothing until the makespan exceeds its constants. Between two such thresholds the
usable devices are known and the relaxation is one linear program. Dispatch of all running requests to idle devices
bounds the makespan from below, and the objective of the programs solved so far bounds it from above. Few thresholds,
usually none, lie between.

**Program.** Columns are departures (d_ij, at most what is there) and arrivals (a_ij); doing nothing is all zeros. Most
requests never move, and those that do have one good target. The model therefore starts with the targets that are cheap
at dispatch's prices and receives others as `sift_columns` finds them missing.

**Bound.** It follows from multipliers alone, by weak duality and without trusting any solver. For multipliers p of the
affine pieces and nu of the network card (together at most 1), mu of the blocks (for one device over the horizons
together at most P_i) and eta of the budget, a head group of request j on device i costs

    w_ij = sum_k p_ik (alpha_ik + beta_ik l_j)  +  nu eta_0 [i worker]  +  mu_i b_j  +  sum_t mu_it m_jt

and leaves i for the device at which ``w + charge`` is least, if that is less than staying. So no placement beats

    sum_ik p_ik base_ik + nu nic_base - sum_i mu_i room_i - sum_it mu_it limit_i - eta budget
      + sum_ij now_ij min(w_ij,  charge_ij + min_k (w_kj + charge_kj + eta bytes_j))

while closed devices take nothing and everything leaves them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import highspy
import numpy as np

from hetis.solver.backends.highs import GROWING_SIMPLEX, linear_program, quiet_highs
from hetis.solver.dispatch.dispatch_problem import BoolArray, FloatArray, IntArray
from hetis.solver.dispatch.lp import sift_columns
from hetis.solver.redispatch.redispatch_tables import RedispatchTables, device_seconds, objective_s

NEAR = 0.02  # ratio by which arrivals in the initial model may cost more than the cheapest of their request
CHEAPER = 1e-7  # ratio by which an arrival must be cheaper than what its request pays, to join


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
    # The card's row holds only while workers are in use; if that is open, the row may be slack without a reason.
    workers_open = np.any(is_open & (np.arange(len(is_open)) != tables.primary))
    nic = max(0.0, prices.nic) if tables.primary >= 0 and workers_open else 0.0
    shrink = 1.0 / max(1.0, float(piece.sum()) + nic)
    later = np.maximum(0.0, prices.later)
    later = later * np.minimum(1.0, tables.short_s / np.maximum(later.sum(axis=0), 1e-300))
    return Prices(
        piece=piece * shrink, nic=nic * shrink, now=np.maximum(0.0, prices.now), later=later,
        budget=max(0.0, prices.budget) if np.isfinite(tables.budget) else 0.0,
    )  # fmt: skip


class RedispatchLpSolution(NamedTuple):
    """Fractional groups x [N, D], the objective in seconds, and the multipliers."""

    x: FloatArray
    value_s: float
    prices: Prices


class MoveLp:
    """HiGHS, set up once and reused; not to be shared between threads."""

    def __init__(self) -> None:
        self._highs = quiet_highs(GROWING_SIMPLEX)

    def solve(self, tables: RedispatchTables, is_open: BoolArray, guess: Prices) -> RedispatchLpSolution | None:
        """Return the optimum with these devices open, or None if closed ones cannot be emptied.

        ``guess`` are prices near the optimal ones, which choose the first columns.
        """
        program = _Program(tables, is_open)
        cost = arrival_prices(tables, guess, is_open)
        targets = np.isfinite(cost)
        chosen = targets & (cost <= cost.min(axis=1, keepdims=True, initial=np.inf) * (1 + NEAR))
        self._highs.passModel(program.start())
        program.add(self._highs, *np.nonzero(chosen))
        sifted = sift_columns(self._highs, program, chosen=chosen, allowed=targets)
        if sifted is None:
            return None
        prices, _ = program.prices(sifted.row_duals)
        values = sifted.values
        x = tables.now.astype(np.float64)
        x[program.sources] -= values[program.first : program.first_arrival]
        np.add.at(x, (sifted.requests, sifted.devices), values[program.first_arrival :])
        value = float(self._highs.getInfo().objective_function_value) / program.scale
        return RedispatchLpSolution(x=np.maximum(0.0, x), value_s=value, prices=prices)


class _Program:
    """The program with rows balance [N], pieces [D, K], network card, blocks now [D], blocks later [H, D], budget.

    Columns are z, s [D], departures, then arrivals in order of joining. Seconds are multiplied by ``scale``.
    """

    def __init__(self, tables: RedispatchTables, is_open: BoolArray) -> None:
        self.tables, self.is_open = tables, is_open
        self.N, self.D = tables.now.shape
        self.K, self.H = tables.alpha.shape[1], len(tables.later)
        seconds = device_seconds(tables, tables.now)
        self.scale = 1.0 / max(float(seconds.max()), 1e-12)
        self.has_budget = bool(np.isfinite(tables.budget))
        self.bytes_scale = 1.0 / max(tables.budget, 1.0) if self.has_budget else 0.0
        self.sources = np.nonzero(tables.now)
        self.first = 1 + self.D
        self.first_arrival = self.first + len(self.sources[0])
        sizes = (self.N, self.D * self.K, 1, self.D, self.H * self.D, 1)
        self.rows = np.concatenate([[0], np.cumsum(sizes)])

    def start(self) -> Any:
        """Return the model without arrivals."""
        t, D = self.tables, self.D
        balance, pieces, card, now, later, budget, end = self.rows
        groups, tokens = t.now.sum(axis=0), t.context @ t.now
        upper = np.full(end, highspy.kHighsInf)
        lower = np.full(end, -highspy.kHighsInf)
        upper[balance:pieces] = lower[balance:pieces] = 0.0
        time = t.base + t.alpha * groups[:, None] + t.beta * tokens[:, None]
        upper[pieces:card] = np.where(self.is_open[:, None], -self.scale * time, highspy.kHighsInf).reshape(-1)
        if t.primary >= 0 and np.any(self.is_open & self._is_worker):
            on_workers = float(groups[self._is_worker].sum())
            upper[card] = -self.scale * (t.nic_base + t.nic_group_s * on_workers)
        upper[now:later] = t.room - t.blocks @ t.now
        upper[later:budget] = (t.limit - t.later @ t.now).reshape(-1)
        if self.has_budget:
            upper[budget] = t.budget * self.bytes_scale

        # Columns z and s come first, then the departures, which are arrivals with the opposite sign.
        most = t.now[self.sources].astype(np.float64)
        forced = np.where(self.is_open[self.sources[1]], 0.0, most)
        infinite = np.full(self.first, highspy.kHighsInf)
        departures = self.first + np.arange(len(most))
        rows, values = self._column_entries(*self.sources, sign=-1.0)
        return linear_program(
            np.concatenate([[1.0], self.scale * t.short_s, self.scale * t.charge[self.sources]]),
            (np.concatenate([np.zeros(self.first), forced]), np.concatenate([infinite, most])),
            (lower, upper),
            [
                (np.arange(pieces, card + 1), 0, -1.0),
                (later + np.arange(D) + D * np.arange(self.H)[:, None], 1 + np.arange(D), -1.0),
                (rows, departures[:, None], values),
            ],
        )

    def add(self, highs: Any, requests: IntArray, devices: IntArray) -> None:
        """Add arrivals of these requests on these devices."""
        if not len(requests):
            return
        rows, values = self._column_entries(requests, devices, sign=1.0)
        num = len(requests)
        highs.addCols(
            num, self.scale * self.tables.charge[requests, devices], np.zeros(num), np.full(num, highspy.kHighsInf),
            rows.size, (rows.shape[1] * np.arange(num)).astype(np.int32), rows.reshape(-1).astype(np.int32),
            values.reshape(-1),
        )  # fmt: skip

    def cheaper(self, row_duals: FloatArray) -> BoolArray:
        """Return which arrivals cost less than what their request pays, [N, D]."""
        prices, pays = self.prices(row_duals)
        cost = arrival_prices(self.tables, prices, self.is_open)
        cheaper: BoolArray = cost < pays[:, None] - CHEAPER * np.abs(pays)[:, None]
        return cheaper

    def prices(self, duals: FloatArray) -> tuple[Prices, FloatArray]:
        """Return the multipliers of a solution, and what a head group of each request pays [N]."""
        balance, pieces, card, now, later, budget, end = self.rows
        price = np.maximum(0.0, -duals)
        prices = Prices(
            piece=price[pieces:card].reshape(self.D, self.K),
            nic=float(price[card]),
            now=price[now:later] / self.scale,
            later=price[later:budget].reshape(self.H, self.D) / self.scale,
            budget=float(price[budget]) * self.bytes_scale / self.scale if end > budget else 0.0,
        )
        return prices, duals[balance:pieces] / self.scale

    @property
    def _is_worker(self) -> BoolArray:
        is_worker: BoolArray = np.arange(self.D) != self.tables.primary
        return is_worker

    def _column_entries(self, requests: IntArray, devices: IntArray, *, sign: float) -> tuple[IntArray, FloatArray]:
        """Return rows and coefficients of the columns of these requests on these devices, both [columns, entries]."""
        t, num = self.tables, len(requests)
        balance, pieces, card, now, later, budget, _ = self.rows
        piece_s = t.alpha[devices] + t.beta[devices] * t.context[requests, None]
        rows = [
            balance + requests[:, None],
            pieces + self.K * devices[:, None] + np.arange(self.K),
            np.full((num, 1), card),
            now + devices[:, None],
            later + devices[:, None] + self.D * np.arange(self.H),
        ]
        values = [
            np.ones((num, 1)),
            self.scale * piece_s,
            self.scale * t.nic_group_s * self._is_worker[devices][:, None],
            t.blocks[requests, None].astype(np.float64),
            t.later[:, requests].T,
        ]
        if self.has_budget and sign > 0:
            rows.append(np.full((num, 1), budget))
            values.append(self.bytes_scale * t.num_bytes[requests, None])
        return np.concatenate(rows, axis=1), sign * np.concatenate(values, axis=1)


class JointRelaxation(NamedTuple):
    """The best fractional groups [N, D], the certified bound on the objective, and multipliers of that program."""

    x: FloatArray
    bound_s: float
    prices: Prices


def relax(
    tables: RedispatchTables, lp: MoveLp, *, floor_s: float, guess: FloatArray, least_gain_s: float = 0.0
) -> JointRelaxation:
    """Solve the relaxation, or prove that no placement gains more than ``least_gain_s`` over doing nothing.

    The proof needs no linear program if the guessed multipliers are good. Most checks of a running stage end with it.

    Args:
        floor_s: a lower bound on the makespan of any placement.
        guess: multipliers of the affine pieces near the optimal ones, shape [D, K].
        least_gain_s: gain in the objective up to which the best placement need not be found.
    """
    prices = Prices(
        piece=guess, nic=0.0, now=np.zeros(len(guess)), later=np.zeros((len(tables.later), len(guess))), budget=0.0
    )
    best_s, bound_s = objective_s(tables, tables.now), np.inf
    enough_s = best_s - least_gain_s  # objective of a placement that is worth finding
    best = tables.now.astype(np.float64)
    starts = [floor_s, *np.unique(tables.open_at[tables.open_at > floor_s]).tolist()]
    for start_s in starts:
        if start_s >= best_s:
            bound_s = min(bound_s, start_s)
            break
        is_open = tables.open_at <= start_s
        guessed_s = max(start_s, proven_bound(tables, prices, is_open))
        if guessed_s >= enough_s:
            bound_s = min(bound_s, guessed_s)
            continue
        solution = lp.solve(tables, is_open, prices)
        if solution is None:
            bound_s = min(bound_s, start_s)
            continue
        bound_s = min(bound_s, max(start_s, proven_bound(tables, solution.prices, is_open)))
        if solution.value_s < best_s:
            best_s, best, prices = solution.value_s, solution.x, solution.prices
    return JointRelaxation(best, min(bound_s, best_s), prices)
