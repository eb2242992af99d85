"""Dispatch with more time: local search from the fast plan, then a MILP over whole head groups in HiGHS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import highspy
import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.dispatch.admission import NOT_FOUND, PLACED, SCATTERED, admit, admit_from
from hetis.solver.dispatch.local_search import perturb, placement_of
from hetis.solver.dispatch.problem import DispatchPlan, DispatchProblem, FloatArray, IntArray, Path
from hetis.solver.dispatch.solve import Admission, Dispatcher
from hetis.solver.dispatch.tables import ALWAYS, Costs, Running, costs_of, makespan, running_load
from hetis.solver.highs import quiet_highs

# --- Admission with proofs: if the fast search finds no room for whole head groups, HiGHS packs them or proves it.


def admit_exactly(problem: DispatchProblem, *, budget: Budget, seed: int = 0) -> Admission:
    """Admit requests in order as `admit` does, but settle the verdicts that it leaves open.

    Sets       i devices, j a request that `admit` found no room for and those admitted before it
    Variables  u_ij >= 0 units of x_ij = unit_i u_ij, whole
    Such that  sum_i unit_i u_ij = G            every j
               sum_j m_j unit_i u_ij <= free_i  every i

    The order decides: the admitted requests are the first in lexicographic order. If the budget runs out, the verdict
    stays `NOT_FOUND`.
    """
    stage, free_blocks = problem.stage, problem.load.free_blocks
    blocks = problem.requests.blocks(stage.heads.block_tokens)
    groups = stage.heads.head_groups
    unit, primary = np.ones(stage.num_devices, np.int64), -1
    if stage.primary is not None:
        primary = stage.primary.device
        unit[primary] = stage.primary_groups
    reserved = np.zeros((len(blocks), stage.num_devices), np.int64)
    verdict, missing = admit(free_blocks, unit, blocks, groups, primary, reserved)
    decided = 0
    while not budget.is_spent():
        unproved = decided + np.flatnonzero(verdict[decided:] == NOT_FOUND)
        if not len(unproved):
            break
        j = int(unproved[0])
        decided = j + 1
        members = np.append(np.flatnonzero(verdict[:j] == PLACED), j)
        limit = budget.remaining_s() / 2 if len(unproved) > 1 else budget.remaining_s()
        fits, packed = _pack(free_blocks, unit, blocks[members], groups, time_limit_s=limit, seed=seed)
        if fits is False:
            verdict[j] = SCATTERED
        elif packed is not None:
            verdict[j], missing[j] = PLACED, 0
            reserved[:] = 0
            reserved[members] = packed
            room = np.maximum(free_blocks, 0) - blocks @ reserved
            missing[decided:] = 0
            admit_from(decided, free_blocks, unit, blocks, groups, primary, reserved, room, verdict, missing)
    return Admission(verdict, missing, reserved)


def _pack(
    free_blocks: IntArray, unit: IntArray, blocks: IntArray, head_groups: int, *, time_limit_s: float, seed: int
) -> tuple[bool | None, IntArray | None]:
    """Return whether whole groups of all requests fit (None: unknown), and a packing [J, D] if one was found."""
    J, D = len(blocks), len(unit)
    room = np.maximum(0, free_blocks)
    highs = quiet_highs(time_limit_s=time_limit_s, seed=seed)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = J * D, J + D
    lp.col_cost_ = lp.col_lower_ = np.zeros(J * D)
    lp.col_upper_ = (np.minimum(head_groups, room // blocks[:, None]) // unit).astype(np.float64).ravel()
    # Divided by the room, so that HiGHS's tolerance is the same share of every device.
    share = 1.0 / np.maximum(1.0, room)
    lp.row_lower_ = np.concatenate([np.full(J, head_groups), np.full(D, -highspy.kHighsInf)])
    lp.row_upper_ = np.concatenate([np.full(J, head_groups), room * share])
    rows = np.stack(np.broadcast_arrays(np.arange(J)[:, None], J + np.arange(D)), axis=2)
    values = np.stack([np.broadcast_to(unit, (J, D)), unit * blocks[:, None] * share], axis=2)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, 2 * J * D + 1, 2, dtype=np.int32)
    lp.a_matrix_.index_ = rows.ravel().astype(np.int32)
    lp.a_matrix_.value_ = values.ravel().astype(np.float64)
    lp.integrality_ = [highspy.HighsVarType.kInteger] * (J * D)
    highs.passModel(lp)
    highs.run()
    if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return False, None
    if highs.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None, None
    units = np.rint(np.array(highs.getSolution().col_value)).astype(np.int64).reshape(J, D)
    packed: IntArray = units * unit
    if np.any(packed.sum(axis=1) != head_groups) or np.any(blocks @ packed > room):
        return None, None  # the packing holds only within HiGHS's tolerance
    return True, packed


ROUNDS = 200  # of local search between reads of the clock
ADMISSION_SHARE = 0.4  # largest share of the time limit
SEARCH_SHARE = 0.2  # share of the time left after admission
MOST_SEARCH_ROUNDS = 20_000  # without a clock


def solve_exactly(
    problem: DispatchProblem, *, budget: Budget | None = None, gap_target: float = 1e-6, seed: int = 0
) -> DispatchPlan:
    """Return the best placement in whole head groups that the budget allows, with the best bound.

    `hetis.solver.dispatch.exact` decides which requests are placed, in their order, with none dropped for a
    later one. The plan is never worse than the fast one for the same requests, and optimal within ``gap_target`` unless
    the budget ran out. ``prices`` are those of the relaxation, so they prove only ``relaxed_s``; ``bound_s`` is HiGHS's
    if that is higher.
    """
    budget = budget or Budget()
    admission = admit_exactly(problem, budget=budget.share(ADMISSION_SHARE), seed=seed)
    plan = Dispatcher(problem.stage).dispatch(problem.load, problem.requests, admission=admission)
    plan = improve_plan(problem, plan, budget=budget.share(SEARCH_SHARE), seed=seed)
    if plan.gap <= gap_target or budget.is_spent() or not plan.groups.any():
        return plan
    return _by_milp(problem, plan, time_limit_s=budget.remaining_s(), gap_target=gap_target, seed=seed)


def improve_plan(
    problem: DispatchProblem, plan: DispatchPlan, *, budget: Budget | None = None, seed: int = 0
) -> DispatchPlan:
    """Improve ``plan`` by local search until the budget is spent, or without a clock for a fixed number of rounds."""
    budget = budget or Budget()
    costs = costs_of(problem.stage)
    running, load = running_load(costs, problem.load.heads, problem.load.kv_bytes), problem.load
    order = _placed(problem, plan)
    if not len(order):
        return plan
    contexts = problem.requests.context_tokens[order]
    blocks = problem.requests.blocks(problem.stage.heads.block_tokens)[order]
    groups, makespan_s, state = plan.groups[order], plan.makespan_s, seed + 1
    rounds = 0
    while makespan_s > plan.bound_s * (1 + 1e-12) and rounds < MOST_SEARCH_ROUNDS and not budget.is_spent():
        groups, makespan_s, state = perturb(
            costs, running, load.free_blocks, contexts, blocks, groups, plan.bound_s, ROUNDS, state
        )
        rounds += ROUNDS
    if makespan_s >= plan.makespan_s:
        return plan
    return replace(plan, groups=_spread(groups, order, plan), makespan_s=makespan_s)


def _placed(problem: DispatchProblem, plan: DispatchPlan) -> IntArray:
    """Return the indices of the placed requests, by rising context."""
    left_out = [unplaced.request for unplaced in plan.unplaced]
    order = np.argsort(problem.requests.context_tokens, kind="stable")
    return order[~np.isin(order, left_out)]


def _spread(groups: IntArray, order: IntArray, plan: DispatchPlan) -> IntArray:
    result = np.zeros_like(plan.groups)
    result[order] = groups
    return result


def _by_milp(
    problem: DispatchProblem, plan: DispatchPlan, *, time_limit_s: float, gap_target: float, seed: int
) -> DispatchPlan:
    order = _placed(problem, plan)
    costs = costs_of(problem.stage)
    running = running_load(costs, problem.load.heads, problem.load.kv_bytes)
    milp = _Milp(
        costs=costs,
        running=running,
        free_blocks=problem.load.free_blocks,
        contexts=problem.requests.context_tokens[order],
        blocks=problem.requests.blocks(problem.stage.heads.block_tokens)[order],
        scale=1.0 / plan.makespan_s,
    )
    highs = quiet_highs({"mip_rel_gap": gap_target}, time_limit_s=time_limit_s, seed=seed)
    highs.passModel(milp.program())
    start = highspy.HighsSolution()
    start.col_value = milp.values_of(plan.groups[order], plan.makespan_s).tolist()
    highs.setSolution(start)
    highs.run()
    info = highs.getInfo()
    bound = float(info.mip_dual_bound) / milp.scale if np.isfinite(info.mip_dual_bound) else 0.0
    groups, makespan_s = plan.groups, plan.makespan_s
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        found = milp.groups_of(np.array(highs.getSolution().col_value))
        found_s = milp.makespan_s(found)
        if found_s < makespan_s:
            groups, makespan_s = _spread(found, order, plan), found_s
    bound = min(max(plan.bound_s, bound), makespan_s)  # HiGHS proves its bound only up to a tolerance
    return replace(plan, groups=groups, makespan_s=makespan_s, bound_s=bound, path=Path.MILP)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Milp:
    """The MILP with columns z; units u_ij of x_ij = unit_i u_ij; y_i: idle device i is used; y: any worker is used.

    min  z
    s.t. sum_i unit_i u_ij = G                                                   every j
         sum_j (alpha_ik + beta_ik l_j) unit_i u_ij + base_ik y_i <= z            every i, k   (y_i = 1 in use)
         sum_j m_j unit_i u_ij <= free_i                                         every i
         sum_j unit_i u_ij <= G J y_i                                            every i
         eta sum_(workers) u_ij + base_nic y <= z;   y_i <= y                     every worker
    """

    costs: Costs
    running: Running
    free_blocks: IntArray
    contexts: IntArray
    blocks: IntArray
    scale: float

    def program(self) -> Any:
        costs, J, D = self.costs, len(self.contexts), len(self.costs.unit)
        K = costs.alpha.shape[1]
        infinity = highspy.kHighsInf
        times, memory, used = J, J + D * K, J + D * K + D
        card, implied = used + D, used + D + 1
        num_rows, first_y = implied + D, 1 + J * D
        entries = list[tuple[FloatArray, FloatArray, FloatArray]]()  # rows, columns, values

        def enter(rows: Any, columns: Any, values: Any) -> None:
            entries.append(tuple(np.broadcast_arrays(rows, columns, values)))  # type: ignore[arg-type]

        j, i, k = np.arange(J)[:, None, None], np.arange(D)[None, :, None], np.arange(K)[None, None, :]
        u = 1 + j * D + i
        unit = costs.unit[None, :, None]
        worker = np.arange(D) != costs.primary
        enter(j, u, unit)
        seconds = costs.alpha[None] + costs.beta[None] * self.contexts[:, None, None]
        enter(times + i * K + k, u, self.scale * unit * seconds)
        enter(memory + i, u, unit * self.blocks[:, None, None])
        enter(used + i, u, unit)
        enter(card, u, self.scale * costs.nic_head_s * costs.queries * unit * worker[None, :, None])
        y = first_y + np.arange(D)
        enter(times + np.arange(D * K).reshape(D, K), y[:, None], self.scale * self.running.base)
        enter(times + np.arange(D * K), 0, -1.0)
        enter(used + np.arange(D), y, -float(costs.head_groups * J))
        enter(np.array([card]), 0, -1.0)
        enter(np.array([card]), first_y + D, self.scale * self.running.nic_base)
        enter(implied + np.arange(D), y, worker * 1.0)
        enter(implied + np.arange(D), first_y + D, -1.0)
        rows, columns, values = (np.concatenate([np.ravel(entry[n]) for entry in entries]) for n in range(3))
        by_column = np.argsort(columns, kind="stable")
        num_columns = first_y + D + 1
        in_use = self.running.open_at == ALWAYS
        lower = np.zeros(num_columns)
        lower[0] = self.scale * self.running.floor_s
        lower[first_y : first_y + D] = in_use
        upper = np.full(num_columns, float(costs.head_groups))
        upper[0] = infinity
        upper[first_y:] = 1.0
        row_lower, row_upper = np.full(num_rows, -infinity), np.zeros(num_rows)
        row_lower[:J] = row_upper[:J] = costs.head_groups
        row_upper[memory:used] = np.maximum(0, self.free_blocks)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = num_columns, num_rows
        lp.col_cost_ = np.append(1.0, np.zeros(num_columns - 1))
        lp.col_lower_, lp.col_upper_ = lower, upper
        lp.row_lower_, lp.row_upper_ = row_lower, row_upper
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.searchsorted(columns[by_column], np.arange(num_columns + 1)).astype(np.int32)
        lp.a_matrix_.index_ = rows[by_column].astype(np.int32)
        lp.a_matrix_.value_ = values[by_column].astype(np.float64)
        lp.integrality_ = [highspy.HighsVarType.kContinuous] + [highspy.HighsVarType.kInteger] * (num_columns - 1)
        return lp

    def values_of(self, groups: IntArray, makespan_s: float) -> FloatArray:
        """Return the columns of a placement [J, D]."""
        y = (self.running.open_at == ALWAYS) | groups.any(axis=0)
        any_worker = bool(np.any(y & (np.arange(len(y)) != self.costs.primary)))
        units = (groups // self.costs.unit).reshape(-1)
        return np.concatenate([[self.scale * makespan_s * (1 + 1e-9)], units, y, [any_worker]]).astype(np.float64)

    def groups_of(self, values: FloatArray) -> IntArray:
        J, D = len(self.contexts), len(self.costs.unit)
        units: IntArray = np.rint(values[1 : 1 + J * D]).astype(np.int64).reshape(J, D)
        return units * self.costs.unit

    def makespan_s(self, groups: IntArray) -> float:
        """Return the makespan of a placement [J, D]."""
        placement = placement_of(
            self.costs, self.running, self.free_blocks, self.contexts, self.blocks, np.ascontiguousarray(groups)
        )
        return float(makespan(self.costs, self.running, placement))
