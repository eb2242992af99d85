"""Dispatch from problem to plan: admit, relax, prove, round, improve. A `Dispatcher` solves for one stage."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.admission import NOT_FOUND, PLACED, SHORT_OF_BLOCKS, admit
from hetis.solver.dispatch.certificate import normalise, proven_bound, request_prices
from hetis.solver.dispatch.local_search import improve, perturb, place_rest, round_down
from hetis.solver.dispatch.lp import LpProblem, RelaxationLp
from hetis.solver.dispatch.problem import (
    DeviceLoad,
    DispatchPlan,
    DispatchProblem,
    FloatArray,
    HeadShape,
    IntArray,
    Path,
    Requests,
    Resource,
    ShadowPrices,
    Stage,
    Unplaced,
)
from hetis.solver.dispatch.relaxation import fractional_fill, likely_level, prices_of, relax, rows_of
from hetis.solver.dispatch.tables import Costs, Running, costs_of, empty_placement, kernel, makespan, put, running_load
from hetis.solver.errors import InvalidProblemError

# Ratio of bound and fractions up to which HiGHS is not asked. If memory binds (12 x 8 and 64 x 64, free blocks 1.2
# times the need, uneven growth), a tenth of it makes plans 0.05% and 0.07% better and takes 13 and 20 times as long.
# Otherwise the two ends agree up to rounding.
TOLERANCE = 0.01
# Rounds of mixing rows. Twice as many do not change makespans, nor bounds to 1e-4 (12 x 8, 64 x 64 and 1024 x 16,
# nearly full, within 5e-5 on average), but take 1.6 ms instead of 1.2 for 1,024 devices.
MOST_ROUNDS = 12
MOST_STUCK = 4
MOST_STEPS = 400
WORTH_POLISHING = 0.01  # gap below which ruin and recreate is not worth its time
POLISHING = 2000  # rounds of it, times requests, times devices


class PassResult(NamedTuple):
    """The result of one pass of compiled code, with requests in the order of the problem."""

    groups: IntArray  # [J, D]
    makespan_s: float
    bound_s: float
    relaxed_s: float
    on_pieces: bool  # settled, every device on one affine piece
    verdict: IntArray  # [J]
    missing: IntArray  # [J]
    order: IntArray  # requests placed, by rising context
    piece: FloatArray
    block: FloatArray
    nic: float
    request: FloatArray  # [J]


class Admission(NamedTuple):
    """The requests that are placed and a packing of their groups, as from `hetis.solver.dispatch.admission.admit`."""

    verdict: IntArray  # [J]
    missing: IntArray  # [J]
    reserved: IntArray  # [J, D]


def solve_dispatch(problem: DispatchProblem, *, tolerance: float = TOLERANCE) -> DispatchPlan:
    """Place the head groups of new requests so that the slowest device finishes soonest; see `Dispatcher.dispatch`.

    For a series of problems of one stage keep a `Dispatcher`, which tabulates the stage once.
    """
    return Dispatcher(problem.stage).dispatch(problem.load, problem.requests, tolerance=tolerance)


class Dispatcher:
    """A solver of successive dispatch problems of one stage; not to be shared between threads."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._costs = costs_of(stage)
        self._lp: RelaxationLp | None = None  # set up when first needed

    def dispatch(
        self, load: DeviceLoad, requests: Requests, *, tolerance: float = TOLERANCE, admission: Admission | None = None
    ) -> DispatchPlan:
        """Place the head groups of new requests so that the slowest device finishes soonest.

        Sets       i devices, j new requests, k affine pieces
        Variables  x_ij head groups of j on i, whole;  z seconds
        Minimise   z, then the next slowest device, and so on
        Such that  alpha_ik sum_j x_ij + beta_ik sum_j l_j x_ij + base_ik <= z    every device that holds heads, every k
                   eta sum_(workers i) x_ij + base_nic <= z                       while any worker holds heads
                   sum_i x_ij = G                                                 every request placed
                   sum_j m_j x_ij <= free_i                                       every i   (KV blocks with growth)
                   x_ij a multiple of what the primary takes at once              i the primary

        The relaxation in fractions is solved by the chain of `hetis.solver.dispatch.relaxation`, with mixed rows if needed.
        If its bound and fractions are further apart than the ratio ``tolerance``, HiGHS solves it. Whole groups come
        from rounding down, the marginal device for the rest, and a local search. Requests for which memory is too short
        are named in ``unplaced``; the others are placed as if those had not come.

        ``admission`` replaces the quick decision on which requests are placed; `hetis.solver.dispatch.exact` proves
        its decision.

        Raises:
            InvalidProblemError: the load is of another number of devices.
        """
        if len(load.heads) != len(self._costs.unit):
            raise InvalidProblemError(
                f"the load is of {len(load.heads)} devices, the stage has {self.stage.num_devices}"
            )
        blocks = requests.blocks(self.stage.heads.block_tokens)
        given = self._costs, load.heads, load.kv_bytes, load.free_blocks, requests.context_tokens, blocks
        admission = admission if admission is not None else _admit(self._costs, load.free_blocks, blocks)
        answer = _place_admitted(*given, *admission)
        path = Path.CHAIN if answer.on_pieces else Path.MIXED
        if answer.relaxed_s > answer.bound_s * (1 + tolerance):
            by_lp = self._by_lp(load, requests, blocks, answer)
            if by_lp is not None:
                answer, path = by_lp, Path.LP
        return _plan_of(requests, answer, path)

    def _by_lp(self, load: DeviceLoad, requests: Requests, blocks: IntArray, first: PassResult) -> PassResult | None:
        """Return the better of both plans and bounds with HiGHS's relaxation, or None if HiGHS gave up."""
        self._lp = self._lp or RelaxationLp()
        running = running_load(self._costs, load.heads, load.kv_bytes)
        contexts, placed_blocks = requests.context_tokens[first.order], blocks[first.order]
        problem = LpProblem(
            costs=self._costs, running=running, free_blocks=load.free_blocks, contexts=contexts, blocks=placed_blocks
        )
        solution = self._lp.solve(
            problem,
            guess_s=min(first.relaxed_s, first.makespan_s),
            start=first.groups[first.order],
            piece=first.piece,
            block=first.block,
            nic=first.nic,
        )
        if solution is None:
            return None
        bound = proven_bound(
            self._costs,
            running,
            load.free_blocks,
            contexts,
            placed_blocks,
            solution.piece,
            solution.block,
            solution.nic,
        )
        if bound >= first.bound_s:
            nic = normalise(running, self._costs.primary, bound, solution.piece, solution.block, solution.nic)
            request = request_prices(
                self._costs, requests.context_tokens, blocks, solution.piece, solution.block, nic
            )  # fmt: skip
            first = first._replace(
                bound_s=bound, piece=solution.piece, block=solution.block, nic=nic, request=request
            )  # fmt: skip
        first = first._replace(relaxed_s=min(first.relaxed_s, max(solution.level_s, running.floor_s)))
        reserved = first.groups[first.order]
        groups, makespan_s = _whole_groups(
            self._costs, running, load.free_blocks, contexts, placed_blocks, solution.x, reserved, bound
        )
        if makespan_s < first.makespan_s:
            all_groups = np.zeros_like(first.groups)
            all_groups[first.order] = groups
            first = first._replace(groups=all_groups, makespan_s=makespan_s)
        return first


@kernel
def _place_admitted(
    costs: Costs, heads: IntArray, kv_bytes: FloatArray, free_blocks: IntArray, all_contexts: IntArray,
    all_blocks: IntArray, verdict: IntArray, missing: IntArray, all_groups: IntArray,
) -> PassResult:  # fmt: skip
    """Do everything after admission; ``all_groups`` [J, D] holds the groups reserved by it, and is written."""
    num, pieces = costs.alpha.shape
    running = running_load(costs, heads, kv_bytes)
    order = np.flatnonzero(verdict == PLACED)
    order = order[np.argsort(all_contexts[order].astype(np.float64))]
    piece, block = np.zeros((num, pieces)), np.zeros(num)
    if len(order) == 0:
        floor_s = running.floor_s
        return PassResult(
            all_groups, floor_s, floor_s, floor_s, True, verdict, missing, order, piece, block, 0.0,
            np.zeros(len(all_contexts)),
        )  # fmt: skip
    contexts, blocks = all_contexts[order], all_blocks[order]
    real_contexts, real_blocks = contexts.astype(np.float64), blocks.astype(np.float64)
    rows = rows_of(costs, running, free_blocks, real_contexts, real_blocks)
    guess = likely_level(rows, running, real_contexts.mean(), float(len(order) * costs.head_groups))
    relaxed = relax(rows, running, guess, real_contexts, real_blocks, costs.head_groups, MOST_ROUNDS)
    mix = relaxed.mix
    nic = prices_of(rows, mix.low, mix.high, mix.weight, mix.price, piece, block)
    bound = proven_bound(costs, running, free_blocks, contexts, blocks, piece, block, nic)
    nic = normalise(running, costs.primary, bound, piece, block, nic)
    fractions = np.zeros((len(order), num))
    relaxed_s = fractional_fill(
        costs, running, free_blocks, real_contexts, real_blocks, relaxed.order, mix.price, relaxed.level_s, fractions
    )  # fmt: skip
    on_pieces = relaxed.settled and mix.low.max() < pieces and mix.high.max() < pieces
    groups, makespan_s = _whole_groups(
        costs, running, free_blocks, contexts, blocks, fractions, all_groups[order], bound
    )  # fmt: skip
    for position in range(len(order)):
        for i in range(num):
            all_groups[order[position], i] = groups[position, i]
    return PassResult(
        all_groups, makespan_s, bound, min(relaxed_s, makespan_s), on_pieces, verdict, missing, order, piece, block,
        nic, request_prices(costs, all_contexts, all_blocks, piece, block, nic),
    )  # fmt: skip


@kernel
def _whole_groups(
    costs: Costs, running: Running, free_blocks: IntArray, contexts: IntArray, blocks: IntArray, fractions: FloatArray,
    reserved: IntArray, bound: float,
) -> tuple[IntArray, float]:  # fmt: skip
    """Round fractions [J, D] and improve, or start from what admission reserved if rounding runs out of room."""
    placement = empty_placement(costs, running, free_blocks, len(contexts))
    round_down(costs, running, placement, fractions, contexts, blocks)
    if not place_rest(costs, running, placement, contexts, blocks):
        placement = empty_placement(costs, running, free_blocks, len(contexts))
        for j in range(len(contexts)):
            for i in range(len(free_blocks)):
                if reserved[j, i] > 0:
                    put(costs, running, placement, j, i, reserved[j, i], contexts[j], blocks[j])
    improve(costs, running, placement, contexts, blocks, 0.0, MOST_STUCK, MOST_STEPS)
    if makespan(costs, running, placement) <= bound * (1.0 + WORTH_POLISHING):
        return placement.x, makespan(costs, running, placement)
    rounds = POLISHING // (len(contexts) * len(free_blocks))
    groups, makespan_s, _ = perturb(
        costs, running, free_blocks, contexts, blocks, placement.x, bound, rounds, 1
    )  # fmt: skip
    return groups, makespan_s


def _admit(costs: Costs, free_blocks: IntArray, blocks: IntArray) -> Admission:
    """Decide quickly which requests are placed."""
    reserved = np.zeros((len(blocks), len(costs.unit)), np.int64)
    verdict, missing = admit(free_blocks, costs.unit, blocks, costs.head_groups, costs.primary, reserved)
    return Admission(verdict=verdict, missing=missing, reserved=reserved)


def _plan_of(requests: Requests, answer: PassResult, path: Path) -> DispatchPlan:
    left_out = np.flatnonzero(answer.verdict != PLACED) if len(answer.order) < len(requests.ids) else ()
    unplaced = tuple(
        Unplaced(
            request=int(j),
            id=requests.ids[j],
            resource=Resource.KV_BLOCKS if answer.verdict[j] == SHORT_OF_BLOCKS else Resource.WHOLE_GROUPS,
            missing=int(answer.missing[j]),
            proved=bool(answer.verdict[j] != NOT_FOUND),
        )
        for j in left_out
    )
    return DispatchPlan(
        groups=answer.groups,
        makespan_s=answer.makespan_s,
        bound_s=answer.bound_s,
        relaxed_s=answer.relaxed_s,
        path=path,
        unplaced=unplaced,
        prices=ShadowPrices(
            piece=answer.piece,
            block_s=answer.block,
            nic=answer.nic,
            request_s=answer.request,
        ),
    )


# --- Preparation of dispatch's kernels before anybody waits for an answer: loaded, or compiled if not on disk.


def small_stage() -> Stage:
    """Return two devices and two head groups, which reach every kernel in microseconds once they are compiled."""
    ones = np.ones((2, 1))
    return Stage(
        heads=HeadShape(head_groups=2, queries_per_group=2, kv_bytes_per_token=4.0, exchange_bytes_per_head=4.0),
        devices=("a", "b"),
        head_s=1e-6 * ones,
        kv_byte_s=1e-9 * ones,
        call_s=1e-6 * ones,
        transfer_byte_s=np.zeros(2),
        transfer_s=np.zeros(2),
    )


def compile_dispatch() -> None:
    """Place a request, which takes up to a minute the first time on a machine."""
    requests = Requests(ids=("a",), context_tokens=np.array([64]), growth_tokens=np.array([0]))
    Dispatcher(small_stage()).dispatch(DeviceLoad.idle(np.array([64, 64])), requests)
