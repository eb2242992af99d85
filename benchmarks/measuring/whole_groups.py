"""The best dispatch known: admission with proofs, local search from the fast plan, a MILP of whole groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import highspy
import numpy as np

from hetis.solver.backends.highs import linear_program, quiet_highs
from hetis.solver.budget import Budget
from hetis.solver.dispatch.admission import NOT_FOUND, PLACED, SCATTERED, Admission, PackingProblem, admit, admit_from
from hetis.solver.dispatch.dispatch_problem import DispatchPlan, DispatchProblem, FloatArray, IntArray
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.loaded_stage import (
    ALWAYS,
    LoadedStage,
    Placement,
    costs_of,
    empty_placement,
    makespan,
    put_all,
    running_load,
)
from hetis.solver.dispatch.local_search import perturb

ROUNDS = 200  # rounds of local search between reads of the clock
ADMISSION_SHARE = 0.4  # largest share of the time limit
SEARCH_SHARE = 0.2  # share of the time left after admission
MOST_SEARCH_ROUNDS = 20_000  # if there is no clock
# HiGHS's default of 1e-6 of a device's room is many blocks on a large device; this is less than one up to 1e9 blocks.
TOLERANCE = {"mip_feasibility_tolerance": 1e-9, "primal_feasibility_tolerance": 1e-9}


def admit_exactly(problem: DispatchProblem, *, budget: Budget, seed: int = 0) -> Admission:
    """Admit requests in order as `admit` does, but settle the verdicts that it leaves open.

    Sets       i devices, j a request that `admit` found no room for and those admitted before it
    Variables  u_ij >= 0 units of x_ij = unit_i u_ij, whole
    Such that  sum_i unit_i u_ij = G            every j
               sum_j m_j unit_i u_ij <= free_i  every i

    Requests have priority in their order: the admitted ones are the first in lexicographic order. If the budget runs
    out, the verdict stays `NOT_FOUND`.
    """
    costs = costs_of(problem.stage)
    blocks = problem.requests.blocks(problem.stage.heads.block_tokens)
    packing = PackingProblem(problem.load.free_blocks, costs.unit, costs.primary, blocks, costs.head_groups)
    admission = verdict, missing, reserved = admit(packing)
    decided = 0
    while not budget.is_spent():
        unproved = decided + np.flatnonzero(verdict[decided:] == NOT_FOUND)
        if not len(unproved):
            break
        j = int(unproved[0])
        decided = j + 1
        members = np.append(np.flatnonzero(verdict[:j] == PLACED), j)
        limit = budget.remaining_s() / 2 if len(unproved) > 1 else budget.remaining_s()
        fits, packed = _pack(packing._replace(blocks=blocks[members]), time_limit_s=limit, seed=seed)
        if fits is False:
            verdict[j] = SCATTERED
        elif packed is not None:
            verdict[j], missing[j] = PLACED, 0
            reserved[:] = 0
            reserved[members] = packed
            room = np.maximum(packing.free_blocks, 0) - blocks @ reserved
            missing[decided:] = 0
            admit_from(decided, packing, room, admission)
    return admission


def _pack(packing: PackingProblem, *, time_limit_s: float, seed: int) -> tuple[bool | None, IntArray | None]:
    """Return whether whole groups of all requests fit (None: unknown), and a packing [J, D] if one was found."""
    unit, blocks, head_groups = packing.unit, packing.blocks, packing.head_groups
    J, D = len(blocks), len(unit)
    room = np.maximum(0, packing.free_blocks)
    most = (np.minimum(head_groups, room // blocks[:, None]) // unit).ravel()
    # Divided by the room, so that HiGHS's tolerance is the same share of every device.
    share = 1.0 / np.maximum(1.0, room)
    j, i = np.arange(J)[:, None], np.arange(D)
    highs = quiet_highs(TOLERANCE, time_limit_s=time_limit_s, seed=seed)
    highs.passModel(
        linear_program(
            np.zeros(J * D),
            (np.zeros(J * D), most),
            (np.append(np.full(J, head_groups), np.full(D, -np.inf)), np.append(np.full(J, head_groups), room * share)),
            [(j, j * D + i, unit), (J + i, j * D + i, unit * blocks[:, None] * share)],
            whole=np.ones(J * D),
        )
    )
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


def solve_exactly(
    problem: DispatchProblem, *, budget: Budget | None = None, gap_target: float = 1e-6, seed: int = 0
) -> DispatchPlan:
    """Return the best placement in whole head groups that the budget allows, with the best bound.

    `admit_exactly` decides which requests are placed, in their order, with none dropped for a later one. The plan is
    never worse than the fast one for the same requests, and optimal within ``gap_target`` unless the budget ran out.
    ``prices`` are those of the relaxation, so they prove only ``relaxed_s``; ``bound_s`` is HiGHS's bound if that is
    higher.
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
    order = _placed(problem, plan)
    if not len(order):
        return plan
    stage, placement = _placement_of(problem, plan, order)
    groups, makespan_s, state = plan.groups[order], plan.makespan_s, seed + 1
    rounds = 0
    while makespan_s > plan.bound_s * (1 + 1e-12) and rounds < MOST_SEARCH_ROUNDS and not budget.is_spent():
        put_all(stage, placement, groups)
        groups, makespan_s, state = perturb(stage, placement, plan.bound_s, ROUNDS, state)
        rounds += ROUNDS
    if makespan_s >= plan.makespan_s:
        return plan
    return replace(plan, groups=_spread(groups, order, plan), makespan_s=makespan_s)


def _placement_of(problem: DispatchProblem, plan: DispatchPlan, order: IntArray) -> tuple[LoadedStage, Placement]:
    """Return the stage with its load, and the plan's groups of the requests in ``order`` on it."""
    load, blocks = problem.load, problem.requests.blocks(problem.stage.heads.block_tokens)
    stage = running_load(costs_of(problem.stage), load.heads, load.kv_bytes)
    placement = empty_placement(stage, load.free_blocks, problem.requests.context_tokens[order], blocks[order])
    put_all(stage, placement, plan.groups[order])
    return stage, placement


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
    stage, placement = _placement_of(problem, plan, order)
    milp = _Milp(stage, problem.load.free_blocks, placement, 1.0 / plan.makespan_s)
    highs = quiet_highs({"mip_rel_gap": gap_target, **TOLERANCE}, time_limit_s=time_limit_s, seed=seed)
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
        found_s = milp.makespan_s(found) if milp.is_feasible(found) else np.inf
        if found_s < makespan_s:
            groups, makespan_s = _spread(found, order, plan), found_s
    bound = min(max(plan.bound_s, bound), makespan_s)  # HiGHS proves its bound only up to a tolerance
    return replace(plan, groups=groups, makespan_s=makespan_s, bound_s=bound)


class _Milp(NamedTuple):
    """The MILP with columns z; units u_ij of x_ij = unit_i u_ij; y_i: idle device i is used; y: any worker is used.

    min  z
    s.t. sum_i unit_i u_ij = G                                                   every j
         sum_j (alpha_ik + beta_ik l_j) unit_i u_ij + base_ik y_i <= z            every i, k   (y_i = 1 in use)
         sum_j m_j unit_i u_ij / free_i <= 1                                     every i
         sum_j unit_i u_ij <= G J y_i                                            every i
         eta sum_(workers) u_ij + base_nic y <= z;   y_i <= y                     every worker
    """

    stage: LoadedStage
    free_blocks: IntArray
    placement: Placement  # a placement of the same requests
    scale: float

    def program(self) -> Any:
        stage, contexts, blocks = self.stage, self.placement.contexts, self.placement.blocks
        J, (D, K) = len(contexts), stage.alpha.shape
        times, memory, used = J, J + D * K, J + D * K + D
        card, implied = used + D, used + D + 1
        num_rows, first_y, num_columns = implied + D, 1 + J * D, 2 + J * D + D
        j, i, k = np.arange(J)[:, None, None], np.arange(D)[None, :, None], np.arange(K)[None, None, :]
        room = np.maximum(1, self.free_blocks)  # memory in shares of it: HiGHS's tolerance is the same for every device
        u, y, devices = 1 + j * D + i, first_y + np.arange(D), np.arange(D)
        unit, worker = stage.unit[None, :, None], devices != stage.primary
        seconds = stage.alpha[None] + stage.beta[None] * contexts[:, None, None]
        entries = [
            (j, u, unit),
            (times + i * K + k, u, self.scale * unit * seconds),
            (memory + i, u, unit * blocks[:, None, None] / room[None, :, None]),
            (used + i, u, unit),
            (card, u, self.scale * stage.nic_group_s * unit * worker[None, :, None]),
            (times + np.arange(D * K).reshape(D, K), y[:, None], self.scale * stage.base),
            (times + np.arange(D * K), 0, -1.0),
            (used + devices, y, -float(stage.head_groups * J)),
            ([card], 0, -1.0),
            ([card], first_y + D, self.scale * stage.nic_base),
            (implied + devices, y, worker * 1.0),
            (implied + devices, first_y + D, -1.0),
        ]
        lower, upper = np.zeros(num_columns), np.full(num_columns, float(stage.head_groups))
        lower[0], upper[0] = self.scale * stage.floor_s, np.inf
        lower[y], upper[first_y:] = stage.open_at == ALWAYS, 1.0
        row_lower, row_upper = np.full(num_rows, -np.inf), np.zeros(num_rows)
        row_lower[:J] = row_upper[:J] = stage.head_groups
        row_upper[memory:used] = np.maximum(0, self.free_blocks) / room
        is_z = np.arange(num_columns) == 0
        return linear_program(1.0 * is_z, (lower, upper), (row_lower, row_upper), entries, whole=~is_z)

    def values_of(self, groups: IntArray, makespan_s: float) -> FloatArray:
        """Return the columns of a placement [J, D]."""
        y = (self.stage.open_at == ALWAYS) | groups.any(axis=0)
        any_worker = bool(np.any(y & (np.arange(len(y)) != self.stage.primary)))
        units = (groups // self.stage.unit).reshape(-1)
        return np.concatenate([[self.scale * makespan_s * (1 + 1e-9)], units, y, [any_worker]]).astype(np.float64)

    def groups_of(self, values: FloatArray) -> IntArray:
        shape = self.placement.x.shape
        units: IntArray = np.rint(values[1 : 1 + shape[0] * shape[1]]).astype(np.int64).reshape(shape)
        return units * self.stage.unit

    def is_feasible(self, groups: IntArray) -> bool:
        """Return whether a placement [J, D] keeps to the room exactly, not only within HiGHS's tolerance."""
        fits = self.placement.blocks @ groups <= np.maximum(0, self.free_blocks)
        return bool(np.all(groups.sum(axis=1) == self.stage.head_groups) and np.all(fits))

    def makespan_s(self, groups: IntArray) -> float:
        """Return the makespan of a placement [J, D]."""
        put_all(self.stage, self.placement, np.ascontiguousarray(groups))
        return float(makespan(self.stage, self.placement))
