"""The relaxation as one linear program in HiGHS, for cases that the chain cannot settle.

    min  z
    s.t. sum_i x_ij = G                                                     every request j
         alpha_ik sum_j x_ij + beta_ik sum_j l_j x_ij + base_ik <= z         every open device i, piece k
         sum_j m_j x_ij <= free_i                                           every open device i
         eta sum_(workers i, j) x_ij + base_nic <= z                        while workers are open
         x_ij >= 0,  z >= time of the running load

Which idle devices are *open* is guessed from a level: open ones pay their constants, and closed ones take nothing. The
optimum is that of the dispatch relaxation if the guess agrees with the level found, so guessing is repeated until then.

Few of the x_ij are ever positive, so columns are sifted: the model starts with those that are cheap at the chain's
prices, and its own prices then identify missing ones, until none is missing. All columns are known, so finding them is
array arithmetic rather than a search. Arrays are passed at once, and the solver and its basis are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import highspy
import numpy as np

from hetis.solver.backends.highs import GROWING_SIMPLEX, linear_program, quiet_highs
from hetis.solver.dispatch.certificate import Multipliers
from hetis.solver.dispatch.dispatch_problem import BoolArray, FloatArray, IntArray
from hetis.solver.dispatch.loaded_stage import LoadedStage

MOST_SIFTINGS = 30
MOST_GUESSES = 8
NEAR = 0.02  # ratio by which columns in the initial model may cost more than the cheapest of their request
CHEAPER = 1e-9  # ratio by which a column must be cheaper than what its request pays, to join


class GrowingModel(Protocol):
    """A program that accepts more columns, each for one (request, device): the groups placed on, or moved to, it."""

    def add(self, highs: Any, requests: IntArray, devices: IntArray) -> None:
        """Add these columns to the model that ``highs`` holds."""

    def cheaper(self, row_duals: FloatArray) -> BoolArray:
        """Return a mask [requests, devices] of columns, perhaps known ones, that lower the objective at the prices."""


class SiftedSolution(NamedTuple):
    """The optimum: sifted columns in order of joining, values of all columns (others first), and prices of rows."""

    requests: IntArray
    devices: IntArray
    values: FloatArray
    row_duals: FloatArray


def sift_columns(highs: Any, model: GrowingModel, *, chosen: BoolArray, allowed: BoolArray) -> SiftedSolution | None:
    """Run HiGHS until no column is missing; return None if it gives up or no solution exists.

    ``highs`` holds the model with the ``chosen`` columns, in the order of `numpy.nonzero`; it may use all ``allowed``.
    """
    chosen = chosen.copy()
    requests, devices = np.nonzero(chosen)
    for _ in range(MOST_SIFTINGS):
        highs.run()
        missing = allowed & ~chosen  # an infeasible model gives no prices, so all columns join
        if highs.getModelStatus() == highspy.HighsModelStatus.kOptimal:
            solution = highs.getSolution()
            row_duals = np.array(solution.row_dual)
            missing &= model.cheaper(row_duals)
            if not missing.any():
                return SiftedSolution(requests, devices, np.array(solution.col_value), row_duals)
        elif not missing.any():
            return None
        chosen |= missing
        more_requests, more_devices = np.nonzero(missing)
        model.add(highs, more_requests, more_devices)
        requests, devices = np.append(requests, more_requests), np.append(devices, more_devices)
    return None


class DispatchLpSolution(NamedTuple):
    """Fractions x [J, D], the level z, and the multipliers."""

    x: FloatArray
    level_s: float
    prices: Multipliers


class LpProblem(NamedTuple):
    """The data of the program for the requests to be placed; ``contexts`` and ``blocks`` have shape [J]."""

    stage: LoadedStage
    free_blocks: IntArray
    contexts: IntArray
    blocks: IntArray

    def group_costs(self, prices: Multipliers) -> FloatArray:
        """Return the cost of a head group of request j on device i at such prices, shape [J, D]."""
        stage = self.stage
        per_group = (prices.piece * stage.alpha).sum(axis=1) + prices.nic * stage.nic_group_s * self.is_worker
        per_token = (prices.piece * stage.beta).sum(axis=1)
        cost: FloatArray = per_group + np.outer(self.contexts, per_token) + np.outer(self.blocks, prices.block)
        return cost

    @property
    def is_worker(self) -> BoolArray:
        workers: BoolArray = np.arange(len(self.free_blocks)) != self.stage.primary
        return workers


class RelaxationLp:
    """HiGHS, set up once and reused; not to be shared between threads."""

    def __init__(self) -> None:
        self._highs = quiet_highs(GROWING_SIMPLEX)

    def solve(
        self, problem: LpProblem, *, guess_s: float, start: IntArray, prices: Multipliers
    ) -> DispatchLpSolution | None:
        """Return the optimum, or None if memory is short.

        Args:
            guess_s: a level near the optimum.
            start: a feasible placement [J, D], whose columns are in the initial model.
            prices: near the optimal ones; they choose the other columns.
        """
        open_at, level = problem.stage.open_at, guess_s
        cost = problem.group_costs(prices)
        columns = (cost <= cost.min(axis=1, keepdims=True) * (1 + NEAR)) | (start > 0)
        best: DispatchLpSolution | None = None
        for _ in range(MOST_GUESSES):
            # A device that opens exactly at the level has no room; opening it would keep the level up by its constants.
            is_open = open_at < level * (1 - 1e-9)
            solution = self._solve_open(problem, is_open, columns, 1.0 / max(guess_s, 1e-12))
            if solution is None:
                if is_open.all():
                    return best
                level = float(open_at[~is_open].min()) * (1 + 2e-9)
                continue
            if best is None or solution.level_s < best.level_s:
                best = solution
            if np.array_equal(is_open, open_at < solution.level_s * (1 - 1e-9)):
                return solution
            level = solution.level_s
        return best

    def _solve_open(
        self, problem: LpProblem, is_open: BoolArray, columns: BoolArray, scale: float
    ) -> DispatchLpSolution | None:
        """Solve the program with these devices open; ``scale`` brings seconds near 1, as HiGHS prefers."""
        if not is_open.any():
            return None
        model = RelaxationModel(problem, is_open, scale)
        chosen = columns & is_open
        self._highs.passModel(model.program(*np.nonzero(chosen)))
        sifted = sift_columns(self._highs, model, chosen=chosen, allowed=np.broadcast_to(is_open, chosen.shape))
        if sifted is None:
            return None
        prices, pays = model.prices(sifted.row_duals)
        x = np.zeros(chosen.shape)
        x[sifted.requests, sifted.devices] = np.maximum(0.0, sifted.values[1:])
        # A closed device must cost every request at least what it pays elsewhere.
        for i in np.flatnonzero(~is_open):
            least = problem.stage.alpha[i, 0] + problem.stage.beta[i, 0] * problem.contexts
            prices.piece[i, 0] = np.max(pays / np.maximum(least, 1e-24))
        return DispatchLpSolution(x, float(sifted.values[0]) / scale, prices)


class RelaxationModel:
    """The model with rows demand [J], pieces [D, K], memory [D], network card; columns z, then x_ij as they came."""

    def __init__(self, problem: LpProblem, is_open: BoolArray, scale: float) -> None:
        self.problem, self.scale, self.is_open = problem, scale, is_open
        num, pieces = problem.stage.alpha.shape
        self.J, self.D, self.K = len(problem.contexts), num, pieces
        self.memory = self.J + num * pieces
        self.card = self.memory + num
        self.has_card = problem.stage.primary >= 0 and bool(np.any(is_open & problem.is_worker))

    def program(self, requests: IntArray, devices: IntArray) -> Any:
        """Return the whole model, in which time rows of closed devices do not bind."""
        stage, J, infinity = self.problem.stage, self.J, highspy.kHighsInf
        lower = np.full(self.card + 1, -infinity)
        upper = np.full(self.card + 1, infinity)
        lower[:J] = upper[:J] = stage.head_groups
        times = np.where(self.is_open[:, None], -self.scale * stage.base, infinity)
        upper[J : self.memory] = times.reshape(-1)
        upper[self.memory : self.card] = np.maximum(0, self.problem.free_blocks)
        z_rows = np.arange(J, self.memory)
        if self.has_card:
            upper[self.card] = -self.scale * stage.nic_base
            z_rows = np.append(z_rows, self.card)
        columns = np.zeros((3, len(requests) + 1))  # cost, lower and upper bound
        columns[:, 0] = 1.0, self.scale * stage.floor_s, infinity
        columns[2] = infinity
        rows, values = self._entries(requests, devices)
        entries = [(z_rows, 0, -1.0), (rows, 1 + np.arange(len(requests))[:, None], values)]
        return linear_program(columns[0], (columns[1], columns[2]), (lower, upper), entries)

    def add(self, highs: Any, requests: IntArray, devices: IntArray) -> None:
        """Add columns to the model that ``highs`` holds."""
        rows, values = self._entries(requests, devices)
        num, width = rows.shape
        highs.addCols(
            num, np.zeros(num), np.zeros(num), np.full(num, highspy.kHighsInf), rows.size,
            (width * np.arange(num)).astype(np.int32), rows.reshape(-1).astype(np.int32), values.reshape(-1),
        )  # fmt: skip

    def cheaper(self, row_duals: FloatArray) -> BoolArray:
        """Return which columns x_ij cost less than what their request pays, [J, D]."""
        prices, pays = self.prices(row_duals)
        cheaper: BoolArray = self.problem.group_costs(prices) < pays[:, None] * (1 - CHEAPER)
        return cheaper

    def prices(self, row_duals: FloatArray) -> tuple[Multipliers, FloatArray]:
        """Return the multipliers, and the price per group of requests [J]."""
        duals = np.abs(row_duals)
        piece = duals[self.J : self.memory].reshape(self.D, self.K)
        piece[~self.is_open] = 0.0
        block = duals[self.memory : self.card] / self.scale
        card = float(duals[self.card]) if self.has_card else 0.0
        return Multipliers(piece, block, card), duals[: self.J] / self.scale

    def _entries(self, requests: IntArray, devices: IntArray) -> tuple[IntArray, FloatArray]:
        """Return rows and values of columns x_ij, each of which has K + 3 entries, [n, K + 3]."""
        stage, contexts = self.problem.stage, self.problem.contexts
        num, width = len(requests), self.K + 3
        rows, values = np.empty((num, width), np.int64), np.empty((num, width))
        rows[:, 0], values[:, 0] = requests, 1.0
        rows[:, 1:-2] = self.J + devices[:, None] * self.K + np.arange(self.K)
        values[:, 1:-2] = self.scale * (stage.alpha[devices] + stage.beta[devices] * contexts[requests, None])
        rows[:, -2], values[:, -2] = self.memory + devices, self.problem.blocks[requests]
        rows[:, -1] = self.card
        values[:, -1] = np.where(devices == stage.primary, 0.0, self.scale * stage.nic_group_s)
        return rows, values
