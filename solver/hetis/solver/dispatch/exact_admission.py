"""Admission with proofs: if the fast search finds no room for whole head groups, HiGHS packs them or proves it."""

from __future__ import annotations

import highspy
import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.dispatch.admission import NOT_FOUND, PLACED, SCATTERED, admit, admit_from
from hetis.solver.dispatch.problem import DispatchProblem, IntArray
from hetis.solver.dispatch.solve import Admission
from hetis.solver.highs import quiet_highs


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
