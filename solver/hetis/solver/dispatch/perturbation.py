"""Longer local search (ruin and recreate): remove groups, return them to marginal devices, improve, keep the better."""

from __future__ import annotations

from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.local_search import improve
from hetis.solver.dispatch.placement import Placement, empty_placement, makespan, put
from hetis.solver.dispatch.problem import IntArray
from hetis.solver.dispatch.rounding import marginal_device
from hetis.solver.dispatch.tables import Costs, Running

MOST_STUCK = 3


@kernel
def perturb(
    costs: Costs, running: Running, free_blocks: IntArray, contexts: IntArray, blocks: IntArray, groups: IntArray,
    goal_s: float, rounds: int, state: int,
) -> tuple[IntArray, float, int]:  # fmt: skip
    """Make ``rounds`` attempts from the placement ``groups`` [J, D] of requests sorted by context.

    Returns the best placement, its makespan, and the state of the random numbers for the next call. Ends early at
    ``goal_s``, which no placement beats.
    """
    best = groups.copy()
    placement = placement_of(costs, running, free_blocks, contexts, blocks, best)
    least = makespan(costs, running, placement)
    for _ in range(rounds):
        if least <= goal_s * (1.0 + 1e-12):
            break
        state = _ruin(costs, running, placement, contexts, blocks, state)
        complete, state = _recreate(costs, running, placement, contexts, blocks, state)
        if complete:
            improve(costs, running, placement, contexts, blocks, goal_s, MOST_STUCK, 200)
        if complete and makespan(costs, running, placement) < least * (1.0 - 1e-12):
            least = makespan(costs, running, placement)
            best = placement.x.copy()
        elif not complete or makespan(costs, running, placement) > least * (1.0 + 1e-3):
            placement = placement_of(costs, running, free_blocks, contexts, blocks, best)
    return best, least, state


@kernel
def placement_of(
    costs: Costs, running: Running, free_blocks: IntArray, contexts: IntArray, blocks: IntArray, groups: IntArray
) -> Placement:
    """Return the placement with these ``groups`` [J, D]."""
    placement = empty_placement(costs, running, free_blocks, len(contexts))
    for j in range(len(contexts)):
        for i in range(len(costs.unit)):
            if groups[j, i] > 0:
                put(costs, running, placement, j, i, groups[j, i], contexts[j], blocks[j])
    return placement


@kernel
def _ruin(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, state: int
) -> int:
    """Remove one or two units from the slowest device with new groups, and from a few random others."""
    num, num_requests = placement.x.shape[1], len(contexts)
    slowest, most = -1, -1.0
    for i in range(num):
        if placement.groups[i] > 0 and placement.seconds[i] > most:
            slowest, most = i, placement.seconds[i]
    state = _next(state)
    hits = 2 + (state >> 33) % 5
    for hit in range(hits):
        state = _next(state)
        i = slowest if hit == 0 else (state >> 33) % num
        if placement.groups[i] == 0:
            continue
        state = _next(state)
        at = (state >> 33) % num_requests
        for turn in range(num_requests):
            j = (at + turn) % num_requests
            if placement.x[j, i] > 0:
                put(costs, running, placement, j, i, -costs.unit[i], contexts[j], blocks[j])
                break
    return state


@kernel
def _recreate(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, state: int
) -> tuple[bool, int]:
    """Give groups without a device to the marginal one, taking the requests in turn from a random one on."""
    num_requests = len(contexts)
    state = _next(state)
    at = (state >> 33) % num_requests
    for turn in range(num_requests):
        j = (at + turn) % num_requests
        left = costs.head_groups - placement.x[j].sum()
        while left > 0:
            i = marginal_device(costs, running, placement, left, contexts[j], blocks[j], -1, -1)
            if i < 0:
                return False, state
            put(costs, running, placement, j, i, costs.unit[i], contexts[j], blocks[j])
            left -= costs.unit[i]
    return True, state


@kernel
def _next(state: int) -> int:
    """Return the next number of a linear congruential generator (Knuth's MMIX), kept positive."""
    return (state * 6364136223846793005 + 1442695040888963407) & 0x7FFFFFFFFFFFFFFF
