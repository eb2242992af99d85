"""Dispatch from problem to plan: admit, relax, prove, round, improve. A `Dispatcher` solves for one stage."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.admission import NOT_FOUND, PLACED, SHORT_OF_BLOCKS, Admission, PackingProblem, admit
from hetis.solver.dispatch.certificate import Multipliers, normalise, proven_bound, request_prices
from hetis.solver.dispatch.chain import Demand
from hetis.solver.dispatch.dispatch_problem import (
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
from hetis.solver.dispatch.loaded_stage import (
    Costs,
    LoadedStage,
    costs_of,
    empty_placement,
    kernel,
    makespan,
    put_all,
    running_load,
)
from hetis.solver.dispatch.local_search import improve, perturb, place_rest, round_down
from hetis.solver.dispatch.lp import LpProblem, RelaxationLp
from hetis.solver.dispatch.relaxation import fractional_fill, likely_level, prices_of, relax, rows_of
from hetis.solver.errors import InvalidProblemError

# Ratio between bound and fractional placement up to which HiGHS is not used. If memory binds (12 x 8 and 64 x 64, free
# blocks 1.2 times the need, uneven growth), a tenth of this makes plans 0.05% and 0.07% better and takes 13 and 20
# times as long. Otherwise the two agree up to rounding.
TOLERANCE = 0.01
# Rounds of mixing rows. Twice as many change neither makespans nor (beyond 1e-4) bounds (12 x 8, 64 x 64 and 1024 x 16,
# nearly full, within 5e-5 on average), but take 1.6 ms instead of 1.2 for 1,024 devices.
MOST_ROUNDS = 12
MOST_STUCK = 4
MOST_STEPS = 400
WORTH_POLISHING = 0.01  # gap below which ruin and recreate is not worth its time
POLISHING = 2000  # rounds of ruin and recreate, times requests, times devices


class PassResult(NamedTuple):
    """The result of one pass of compiled code, with requests in the order of the problem."""

    groups: IntArray  # [J, D]
    makespan_s: float
    bound_s: float
    relaxed_s: float
    on_pieces: bool  # the relaxation is settled with every device on one affine piece
    admission: Admission
    order: IntArray  # placed requests, by rising context
    prices: Multipliers
    request: FloatArray  # [J] seconds per head group


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
        self._lp: RelaxationLp | None = None  # set up on first use

    def dispatch(self, load: DeviceLoad, requests: Requests, *, tolerance: float = TOLERANCE) -> DispatchPlan:
        """Place the head groups of new requests so that the slowest device finishes soonest.

        Sets       i devices, j new requests, k affine pieces
        Variables  x_ij head groups of j on i, whole;  z seconds
        Minimise   z, then the next slowest device, and so on
        Such that  alpha_ik sum_j x_ij + beta_ik sum_j l_j x_ij + base_ik <= z    every device that holds heads, every k
                   eta sum_(workers i) x_ij + base_nic <= z                       while any worker holds heads
                   sum_i x_ij = G                                                 every request placed
                   sum_j m_j x_ij <= free_i                                       every i   (KV blocks with growth)
                   x_ij a multiple of what the primary takes at once              i the primary

        The relaxation in fractions is solved by a chain of devices, with mixed rows if needed (`relaxation`). If its
        bound and its fractional placement are further apart than the ratio ``tolerance``, HiGHS solves it. Whole groups
        come from rounding down, giving the rest to the marginal device, and a local search. Requests for which memory
        is too short are named in ``unplaced``; the others are placed as if those had not come.

        Raises:
            InvalidProblemError: the load is for a different number of devices.
        """
        if len(load.heads) != len(self._costs.unit):
            raise InvalidProblemError(
                f"the load is of {len(load.heads)} devices, the stage has {self.stage.num_devices}"
            )
        blocks = requests.blocks(self.stage.heads.block_tokens)
        answer = _admit_and_place(
            self._costs, load.heads, load.kv_bytes, load.free_blocks, requests.context_tokens, blocks
        )
        path = Path.CHAIN if answer.on_pieces else Path.MIXED
        if answer.relaxed_s > answer.bound_s * (1 + tolerance):
            by_lp = self._by_lp(load, requests, blocks, answer)
            if by_lp is not None:
                answer, path = by_lp, Path.LP
        return _plan_of(requests, answer, path)

    def _by_lp(self, load: DeviceLoad, requests: Requests, blocks: IntArray, first: PassResult) -> PassResult | None:
        """Return the better of both plans and bounds with HiGHS's relaxation, or None if HiGHS gave up."""
        self._lp = self._lp or RelaxationLp()
        stage, order = running_load(self._costs, load.heads, load.kv_bytes), first.order
        placed = load.free_blocks, requests.context_tokens[order], blocks[order]
        reserved = first.groups[order]
        guess_s = min(first.relaxed_s, first.makespan_s)
        solution = self._lp.solve(LpProblem(stage, *placed), guess_s=guess_s, start=reserved, prices=first.prices)
        if solution is None:
            return None
        bound = proven_bound(stage, *placed, solution.prices)
        if bound >= first.bound_s:
            prices = normalise(stage, bound, solution.prices)
            request = request_prices(stage, requests.context_tokens, blocks, prices)
            first = first._replace(bound_s=bound, prices=prices, request=request)
        first = first._replace(relaxed_s=min(first.relaxed_s, max(solution.level_s, stage.floor_s)))
        groups, makespan_s = _whole_groups(stage, *placed, solution.x, reserved, bound)
        if makespan_s < first.makespan_s:
            all_groups = np.zeros_like(first.groups)
            all_groups[order] = groups
            first = first._replace(groups=all_groups, makespan_s=makespan_s)
        return first


@kernel
def _admit_and_place(
    costs: Costs, heads: IntArray, kv_bytes: FloatArray, free_blocks: IntArray, all_contexts: IntArray,
    all_blocks: IntArray,
) -> PassResult:  # fmt: skip
    """Admit requests, then relax, round and improve, in one compiled pass. What admission reserved is overwritten."""
    admission = admit(PackingProblem(free_blocks, costs.unit, costs.primary, all_blocks, costs.head_groups))
    num, pieces = costs.alpha.shape
    stage = running_load(costs, heads, kv_bytes)
    all_groups = admission.reserved
    order = np.flatnonzero(admission.verdict == PLACED)
    order = order[np.argsort(all_contexts[order].astype(np.float64))]
    if len(order) == 0:
        nothing = Multipliers(np.zeros((num, pieces)), np.zeros(num), 0.0)
        floor_s = stage.floor_s
        none = np.zeros(len(all_contexts))
        return PassResult(all_groups, floor_s, floor_s, floor_s, True, admission, order, nothing, none)
    contexts, blocks = all_contexts[order], all_blocks[order]
    demand = Demand(contexts.astype(np.float64), blocks.astype(np.float64), costs.head_groups)
    rows = rows_of(stage, free_blocks, demand)
    guess = likely_level(rows, stage, demand.contexts.mean(), float(len(order) * costs.head_groups))
    relaxed = relax(rows, stage, guess, demand, MOST_ROUNDS)
    mix = relaxed.mix
    prices = prices_of(rows, mix)
    bound = proven_bound(stage, free_blocks, contexts, blocks, prices)
    prices = normalise(stage, bound, prices)
    fractions = np.zeros((len(order), num))
    relaxed_s = fractional_fill(stage, free_blocks, demand, relaxed.order, mix.price, relaxed.level_s, fractions)
    on_pieces = relaxed.settled and mix.low.max() < pieces and mix.high.max() < pieces
    groups, makespan_s = _whole_groups(stage, free_blocks, contexts, blocks, fractions, all_groups[order], bound)
    for position in range(len(order)):
        for i in range(num):
            all_groups[order[position], i] = groups[position, i]
    return PassResult(
        all_groups, makespan_s, bound, min(relaxed_s, makespan_s), on_pieces, admission, order, prices,
        request_prices(stage, all_contexts, all_blocks, prices),
    )  # fmt: skip


@kernel
def _whole_groups(
    stage: LoadedStage, free_blocks: IntArray, contexts: IntArray, blocks: IntArray, fractions: FloatArray,
    reserved: IntArray, bound: float,
) -> tuple[IntArray, float]:  # fmt: skip
    """Round fractions [J, D] and improve them; start from what admission reserved if rounding runs out of room."""
    placement = empty_placement(stage, free_blocks, contexts, blocks)
    round_down(stage, placement, fractions)
    if not place_rest(stage, placement):
        put_all(stage, placement, reserved)
    improve(stage, placement, 0.0, MOST_STUCK, MOST_STEPS)
    if makespan(stage, placement) <= bound * (1.0 + WORTH_POLISHING):
        return placement.x, makespan(stage, placement)
    rounds = POLISHING // (len(contexts) * len(free_blocks))
    groups, makespan_s, _ = perturb(stage, placement, bound, rounds, 1)
    return groups, makespan_s


def _plan_of(requests: Requests, answer: PassResult, path: Path) -> DispatchPlan:
    verdict, missing, _ = answer.admission
    left_out = np.flatnonzero(verdict != PLACED) if len(answer.order) < len(requests.ids) else ()
    unplaced = tuple(
        Unplaced(
            request=int(j),
            id=requests.ids[j],
            resource=Resource.KV_BLOCKS if verdict[j] == SHORT_OF_BLOCKS else Resource.WHOLE_GROUPS,
            missing=int(missing[j]),
            proved=bool(verdict[j] != NOT_FOUND),
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
            piece=answer.prices.piece, block_s=answer.prices.block, nic=answer.prices.nic, request_s=answer.request
        ),
    )


def small_stage() -> Stage:
    """Return two devices and two head groups, which exercise every kernel in microseconds once they are compiled."""
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
    """Place a request on every path, which takes up to a minute the first time on a machine."""
    requests = Requests(ids=("a",), context_tokens=np.array([64]), growth_tokens=np.array([0]))
    # Without tolerance HiGHS is used whatever the bound is, and the steps after it have kernels of their own.
    Dispatcher(small_stage()).dispatch(DeviceLoad.idle(np.array([64, 64])), requests, tolerance=-1.0)
