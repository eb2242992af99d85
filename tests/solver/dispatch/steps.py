"""The steps of dispatch one by one on small random inputs, whose results `tests.solver.recorded` keeps.

A whole dispatch hides most of what its steps do: a mistake in the choice of a row, a price or a swap often leads to the
same plan. Here each kernel has its own inputs, many of which no dispatch would give it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.dispatch.admission import FEW, PackingProblem, admit, cannot_fit, pack_few, repack
from hetis.solver.dispatch.certificate import Multipliers, normalise, proven_bound, request_prices
from hetis.solver.dispatch.exact import _Milp, admit_exactly
from hetis.solver.dispatch.local_search import improve, marginal_device, perturb, place_rest, round_down
from hetis.solver.dispatch.lp import LpProblem, RelaxationLp, RelaxationModel
from hetis.solver.dispatch.problem import DeviceLoad, DispatchProblem, IntArray, Requests
from hetis.solver.dispatch.relaxation import (
    Chain,
    ChainMix,
    Demand,
    DeviceRows,
    fill,
    fractional_fill,
    level,
    level_paid_for,
    likely_level,
    prices_of,
    relax,
    rows_of,
    sort_again,
)
from hetis.solver.dispatch.tables import (
    Costs,
    LoadedStage,
    Placement,
    card_s,
    costs_of,
    empty_placement,
    makespan,
    put,
    put_all,
    running_load,
    seconds_with,
)
from tests.solver.dispatch.instances import random_problem
from tests.solver.numbers import numbers_of


@dataclass(frozen=True, kw_only=True)
class Case:
    """A random stage of any kind whose requests, by rising context, are to be placed."""

    rng: np.random.Generator
    problem: DispatchProblem
    costs: Costs
    stage: LoadedStage
    free_blocks: IntArray
    contexts: IntArray
    blocks: IntArray

    @property
    def demand(self) -> Demand:
        return Demand(self.contexts.astype(np.float64), self.blocks.astype(np.float64), self.stage.head_groups)

    @property
    def rows(self) -> DeviceRows:
        return rows_of(self.stage, self.free_blocks, self.demand)

    @property
    def guess_s(self) -> float:
        """A level near the optimum."""
        demand = self.demand
        return float(
            likely_level(
                self.rows, self.stage, demand.contexts.mean(), float(len(self.contexts) * self.stage.head_groups)
            )
        )

    def empty(self) -> Placement:
        return empty_placement(self.stage, self.free_blocks, self.contexts, self.blocks)


def random_case(seed: int, *, most_devices: int = 7, most_requests: int = 6, roomy: bool = False) -> Case:
    """Return a case with its devices in any order; ``roomy``: every device has blocks for all groups."""
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1 if seed % 10 == 0 else 2, most_devices + 1))
    problem = random_problem(
        rng,
        num_devices=num,
        num_requests=int(rng.integers(1, most_requests + 1)),
        pieces=int(rng.integers(1, 4)),
        head_groups=int(rng.choice([1, 2, 4, 8])),
        load=rng.choice(["level", "uneven", "idle"]),
        tp=[None, 1, 2, 4][int(rng.integers(4))],
        nic_share=float(rng.choice([0.3, 0.8, 1.1, 1.5])),
        free_ratio=None if roomy else [None, 3.0, 1.3, 1.1][int(rng.integers(4))],
    )
    problem = _in_another_order(problem, rng)
    costs = costs_of(problem.stage)
    blocks = problem.requests.blocks(problem.stage.heads.block_tokens)
    order = np.argsort(problem.requests.context_tokens, kind="stable")
    return Case(
        rng=rng,
        problem=problem,
        costs=costs,
        stage=running_load(costs, problem.load.heads, problem.load.kv_bytes),
        free_blocks=problem.load.free_blocks,
        contexts=problem.requests.context_tokens[order],
        blocks=blocks[order],
    )


def _in_another_order(problem: DispatchProblem, rng: np.random.Generator) -> DispatchProblem:
    """Return the problem with unequal transfer costs and its primary, if any, at any index."""
    stage, load = problem.stage, problem.load
    order = rng.permutation(stage.num_devices)
    primary = stage.primary
    if primary is not None:
        primary = replace(primary, device=int(np.flatnonzero(order == 0)[0]))
    stage = replace(
        stage,
        head_s=(stage.head_s * rng.uniform(0.5, 2.0, stage.head_s.shape))[order],
        kv_byte_s=stage.kv_byte_s[order],
        call_s=stage.call_s[order],
        transfer_byte_s=rng.uniform(0.5e-10, 2e-10, stage.num_devices),
        transfer_s=rng.uniform(1e-5, 3e-5, stage.num_devices),
        primary=primary,
    )
    heads = np.where(rng.random(stage.num_devices) < 0.1, 0, load.heads)
    load = DeviceLoad(
        heads=heads[order], kv_bytes=np.where(heads > 0, load.kv_bytes, 0.0)[order], free_blocks=load.free_blocks[order]
    )
    return DispatchProblem(stage=stage, load=load, requests=problem.requests)


def tabulated(seed: int) -> list[float]:
    """The stage and its load as arrays, and the rows derived from them."""
    case = random_case(seed)
    load = case.stage[5:]  # the rest is in the costs
    return numbers_of(_us(case.costs), _us(load), _us(case.rows), case.guess_s * 1e6)


def _us(values: Any) -> list[Any]:
    """Return a tuple's seconds, which are small, in microseconds."""
    return [value * 1e6 if isinstance(value, float) or _has_floats(value) else value for value in values]


def _has_floats(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float64


def prices_of_rows(seed: int) -> list[float]:
    """Multipliers from random mixes of rows, and the bounds that they prove."""
    case = random_case(seed)
    num, width = case.rows.alpha.shape
    rng, pieces = case.rng, width - 2
    has_card = case.stage.primary >= 0 and num > 1
    low, high = rng.integers(0, pieces + 1, num), rng.integers(0, pieces + 1, num)
    if has_card and rng.random() < 0.4:
        high[case.stage.primary] = width - 1
    weight = rng.choice([0.0, 0.3, 0.7, 1.0], num)
    price = rng.uniform(0.0, 1.0, num)
    prices = prices_of(case.rows, ChainMix(low, high, weight, price))
    proved = numbers_of(prices.piece, prices.block * 1e6, prices.nic)
    for scale in (0.0, 0.1, 1.0, 10.0):
        scaled = prices._replace(block=prices.block * scale)
        bound = proven_bound(case.stage, case.free_blocks, case.contexts, case.blocks, scaled)
        proved += numbers_of(bound * 1e6)
        own = normalise(case.stage, bound, scaled)
        pays = request_prices(case.stage, case.contexts, case.blocks, own)
        proved += numbers_of(own.piece, own.block * 1e6, own.nic, pays * 1e6)
    return proved


def chained(seed: int) -> list[float]:
    """A chain of devices, on a row each, filled to several levels, and the least level that takes all groups."""
    case = random_case(seed)
    rows, rng = case.rows, case.rng
    num, width = rows.alpha.shape
    row, memory = rng.integers(0, width - 2, num), rng.choice([0.0, 0.0, 0.4], num)
    alpha, beta, kappa, base = (
        (1 - memory) * table[np.arange(num), row] + memory * table[:, width - 2]
        for table in (rows.alpha, rows.beta, rows.kappa, rows.base)
    )
    order = np.argsort(-beta / np.maximum(1e-24, alpha + beta * case.contexts[0]), kind="stable")
    groups, tokens, held, price = (np.empty(num) for _ in range(4))
    chain = Chain(order, alpha, beta, kappa, base, case.stage.open_at, groups, tokens, held)
    answer: list[float] = []
    for share in (0.3, 0.9, 1.0, 1.1, 1.6):
        z = case.guess_s * share
        paid, left = fill(z, chain, case.demand, price)
        answer += numbers_of(paid, left, groups, tokens, held, price * 1e-6)
        answer += numbers_of(level_paid_for(z, paid, chain, price) * 1e6)
    for start in (0.1, 1.0, 3.0):
        z = level(case.guess_s * start, chain, case.demand, price)
        answer += numbers_of(z * 1e6, groups, tokens, held)
    return answer


def relaxed(seed: int) -> list[float]:
    """The relaxation after every number of rounds of mixing rows."""
    case = random_case(seed)
    answer: list[float] = []
    for rounds in (1, 2, 3, 5, 8, 12):
        found = relax(case.rows, case.stage, case.guess_s, case.demand, rounds)
        answer += numbers_of(found.level_s * 1e6, found.settled, found.order, found.mix.low, found.mix.high)
        answer += numbers_of(found.mix.weight, found.mix.price * 1e-6)
    return answer


def sorted_again(seed: int) -> list[float]:
    """An order by random keys, from any order."""
    rng = np.random.default_rng(seed)
    key = rng.random(int(rng.integers(1, 12)))
    order = rng.permutation(len(key))
    sort_again(key, order)
    assert np.all(np.diff(key[order]) > 0)
    return numbers_of(order)


def poured(seed: int) -> list[float]:
    """Fractions along a chain in a random order of devices, from several levels on."""
    case = random_case(seed)
    num, answer = len(case.stage.unit), list[float]()
    for share in (0.2, 0.9, 1.5):
        order = case.rng.permutation(num)
        price = case.rng.uniform(0.1, 1.0, num)
        x = np.zeros((len(case.contexts), num))
        found = fractional_fill(case.stage, case.free_blocks, case.demand, order, price, case.guess_s * share, x)
        answer += numbers_of(found * 1e6, x)
    return answer


def rounded(seed: int) -> list[float]:
    """Random fractions rounded to whole groups, and every choice of a device for one more unit."""
    case = random_case(seed, most_devices=20 if seed % 4 == 0 else 7)
    num, rng, stage = len(case.stage.unit), case.rng, case.stage
    shares = rng.dirichlet(np.full(num, 0.4), len(case.contexts)) * stage.head_groups
    placement = case.empty()
    answer = numbers_of(card_s(stage, 0.0) * 1e6, card_s(stage, 3.0) * 1e6)
    round_down(stage, placement, shares)
    answer += _of_placement(stage, placement)
    if seed % 2:
        _leave_room_for_one(case, placement)
    for j in range(len(case.contexts)):
        but, nor = (int(i) for i in rng.integers(-1, num, 2))
        left = int(rng.integers(1, 5))
        answer.append(float(marginal_device(stage, placement, j, left, but, nor)))
    answer.append(float(place_rest(stage, placement)))
    return answer + _of_placement(stage, placement)


def _of_placement(stage: LoadedStage, placement: Placement) -> list[float]:
    one_more = seconds_with(stage, placement, 0, 1, 500)
    return numbers_of(_us(placement[2:]), makespan(stage, placement) * 1e6, one_more * 1e6)


def _anywhere(case: Case) -> Placement:
    """Return a placement of all groups on random devices, which may exceed memory."""
    stage, rng, num = case.stage, case.rng, len(case.stage.unit)
    placement = case.empty()
    weights = rng.dirichlet(np.full(num, 0.5))
    for j in range(len(case.contexts)):
        left = stage.head_groups
        for _ in range(100):
            i = int(rng.choice(num, p=weights))
            unit = int(stage.unit[i])
            if unit <= left and placement.room[i] >= unit * case.blocks[j]:
                put(stage, placement, j, i, unit)
                left -= unit
            if left == 0:
                break
    return placement


def _leave_room_for_one(case: Case, placement: Placement) -> None:
    """Leave every device exactly the room for one unit of some request, so that it matters whether that is enough."""
    for i in range(len(placement.room)):
        placement.room[i] = case.stage.unit[i] * case.rng.choice(case.blocks)


def improved(seed: int) -> list[float]:
    """Every single step of the local search from a random placement."""
    case = random_case(seed, roomy=seed % 3 == 0)
    placement = _anywhere(case)
    if seed % 2:
        _leave_room_for_one(case, placement)
    answer: list[float] = []
    goal_s = float(case.rng.choice([0.0, 0.0, 1.1])) * case.guess_s
    most_stuck = int(case.rng.integers(1, 5))
    for _ in range(12):
        done = improve(case.stage, placement, goal_s, most_stuck, 1)
        answer += numbers_of(done, placement.x, placement.seconds * 1e6)
    done = improve(case.stage, placement, goal_s, most_stuck, 50)
    return [*answer, float(done), *_of_placement(case.stage, placement)]


def perturbed(seed: int) -> list[float]:
    """The rounds of ruin and recreate, one by one."""
    case = random_case(seed)
    placement, state, answer = _anywhere(case), seed + 1, list[float]()
    for rounds in (0, 1, 1, 1, 2, 6):
        goal_s = case.guess_s * float(case.rng.choice([0.0, 0.9, 1.05]))
        groups, makespan_s, state = perturb(case.stage, placement, goal_s, rounds, state)
        put_all(case.stage, placement, groups)
        answer += numbers_of(groups, makespan_s * 1e6, state)
    return answer


def packed(seed: int) -> list[float]:
    """Whole groups when memory is about as large as they need, and the work to determine it."""
    rng = np.random.default_rng(seed)
    num, head_groups = int(rng.integers(2, 7)), int(rng.choice([1, 2, 4, 8]))
    # Sizes differ, so that devices with equal room, whose order depends on the sort, are rare.
    blocks = rng.choice(np.arange(100, 1400), int(rng.integers(2, 6)), replace=False)
    unit = np.ones(num, np.int64)
    primary = int(rng.integers(-1, num))
    if primary >= 0:
        unit[primary] = min(head_groups, int(rng.choice([1, 2, 4])))
    if rng.random() < 0.5:  # as much as some packing needs, so that one exists
        homes = rng.integers(0, num, (len(blocks), head_groups))
        free_blocks = np.bincount(homes.ravel(), np.repeat(blocks, head_groups), num).astype(np.int64)
        free_blocks += rng.integers(0, 60, num)
    else:
        needed = head_groups * int(blocks.sum())
        ratio = float(rng.choice([0.8, 1.05, 1.2, 1.4]))
        free_blocks = np.floor(ratio * needed * rng.dirichlet(np.full(num, 4.0))).astype(np.int64)
        free_blocks[rng.random(num) < 0.1] = -1
    packing = PackingProblem(free_blocks, unit, primary, blocks, head_groups)
    answer = numbers_of(*admit(packing))
    members = rng.permutation(len(blocks))
    for most_work in (20, 1000, 10**6):
        answer += numbers_of(cannot_fit(packing, members, most_work))
        x = np.zeros((len(blocks), num), np.int64)
        left, work = repack(packing, members, x, most_work)
        answer += numbers_of(left, work, x)
    if head_groups <= 4:
        few = members[: int(rng.integers(2, FEW + 1))]
        for most_work in (10, 10**6):
            x = np.zeros((len(blocks), num), np.int64)
            left, work = pack_few(packing, few, x, most_work)
            answer += numbers_of(left, work)
            if left == 0:  # any packing is acceptable
                assert x[few].sum(axis=1).tolist() == [head_groups] * len(few)
                assert np.all(x >= 0)
                assert np.all(x % unit == 0)
                assert np.all(blocks @ x <= np.maximum(0, free_blocks))
    return answer


def admitted_at_length(seed: int) -> list[float]:
    """Admission with so many requests, and memory so scattered, that the search gives up."""
    rng = np.random.default_rng(seed)
    num, num_requests = 24, 40
    blocks = rng.integers(2000, 6000, num_requests)
    free_blocks = np.floor(4 * blocks.sum() * rng.dirichlet(np.full(num, 30.0))).astype(np.int64)
    return numbers_of(*admit(PackingProblem(free_blocks, np.ones(num, np.int64), -1, blocks, 4)))


def admitted_exactly(seed: int) -> list[float]:
    """The verdicts of HiGHS, which decide the cases that the search leaves open."""
    rng = np.random.default_rng(seed)
    num = int(rng.integers(3, 6))
    tp = [None, 2][int(rng.integers(2))]
    problem = random_problem(rng, num_devices=num, num_requests=5, head_groups=2, tp=tp, free_ratio=1.02)
    requests = Requests(
        ids=problem.requests.ids,
        context_tokens=16 * rng.choice(np.arange(20, 60), 5, replace=False),
        growth_tokens=np.zeros(5, np.int64),
    )
    needed = 2 * requests.blocks(16).sum()
    free_blocks = np.floor(1.04 * needed * rng.dirichlet(np.full(num, 8.0))).astype(np.int64)
    problem = replace(problem, load=DeviceLoad.idle(free_blocks), requests=requests)
    admission = admit_exactly(problem, budget=Budget())
    return numbers_of(admission.verdict, admission.missing)


class _Columns:
    """The numbers that a model passes to HiGHS."""

    def __init__(self) -> None:
        self.added: tuple[Any, ...] = ()

    def addCols(self, *arguments: Any) -> None:  # noqa: N802  (HiGHS's name)
        self.added = arguments


def by_rows(lp: Any) -> Any:
    """Return a model of HiGHS with its matrix row by row, without zeros."""
    start, index, value = (np.array(part) for part in (lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_))
    kept = np.lexsort((np.repeat(np.arange(len(start) - 1), np.diff(start)), index))
    kept = kept[value[kept] != 0.0]
    lp.a_matrix_.start_ = np.searchsorted(index[kept], np.arange(lp.num_row_ + 1))
    lp.a_matrix_.index_ = np.repeat(np.arange(len(start) - 1), np.diff(start))[kept]
    lp.a_matrix_.value_ = value[kept]
    return lp


def of_model(lp: Any) -> list[float]:
    """Return the numbers of a HiGHS model; for its values the sum per column or row, as their order may differ."""
    start, index, value = (np.array(part) for part in (lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_))
    lines = np.repeat(np.arange(len(start) - 1), np.diff(start))
    entries = np.lexsort((index, lines))
    return numbers_of(
        lp.num_col_, lp.num_row_, np.array(lp.col_cost_), np.array(lp.col_lower_), np.array(lp.col_upper_),
        np.array(lp.row_lower_), np.array(lp.row_upper_), start, index[entries], value[entries],
        np.array([int(kind) for kind in lp.integrality_]),
    )  # fmt: skip


def modelled(seed: int) -> list[float]:
    """The linear and the integer program, entry by entry, and the former's prices and columns."""
    case = random_case(seed)
    num, J, rng = len(case.stage.unit), len(case.contexts), case.rng
    problem = LpProblem(case.stage, case.free_blocks, case.contexts, case.blocks)
    is_open = rng.random(num) < 0.7
    model = RelaxationModel(problem, is_open, 1.0 / case.guess_s)
    requests, devices = np.nonzero(rng.random((J, num)) < 0.5)
    answer = of_model(model.program(requests, devices))
    columns = _Columns()
    model.add(columns, requests, devices)
    answer += numbers_of(columns.added)
    duals = rng.uniform(-1.0, 1.0, model.card + 1)
    prices, pays = model.prices(duals)
    answer += numbers_of(prices.piece, prices.block * 1e6, prices.nic, pays * 1e6, model.cheaper(duals))
    answer += numbers_of(problem.group_costs(prices) * 1e6)
    milp = _Milp(case.stage, case.free_blocks, case.empty(), 1.0 / case.guess_s)
    answer += of_model(milp.program())
    placement = _anywhere(case)
    values = milp.values_of(placement.x, makespan(case.stage, placement))
    assert np.array_equal(milp.groups_of(values), placement.x)
    return [*answer, *numbers_of(values, milp.makespan_s(placement.x) * 1e6)]


def solved_by_highs(seed: int) -> list[float]:
    """The optimum of the relaxation, from any guess and any first columns."""
    case = random_case(seed)
    problem = LpProblem(case.stage, case.free_blocks, case.contexts, case.blocks)
    shape = case.stage.alpha.shape
    answer: list[float] = []
    for share in (0.05, 1.0, 20.0):
        solution = RelaxationLp().solve(
            problem,
            guess_s=case.guess_s * share,
            start=_anywhere(case).x,
            prices=Multipliers(case.rng.uniform(0.0, 1.0, shape), np.zeros(shape[0]), 0.0),
        )
        if solution is None:
            answer.append(-1.0)
            continue
        bound = proven_bound(case.stage, case.free_blocks, case.contexts, case.blocks, solution.prices)
        answer += [round(solution.level_s * 1e6, 5), round(float(bound) * 1e6, 5)]
        answer += numbers_of(np.round(solution.x.sum(axis=1), 6))
    return answer


STEPS: dict[str, tuple[int, Callable[[int], list[float]]]] = {
    "packed": (60, packed),
    "tabulated": (60, tabulated),
    "prices_of_rows": (80, prices_of_rows),
    "chained": (40, chained),
    "relaxed": (80, relaxed),
    "sorted_again": (10, sorted_again),
    "poured": (80, poured),
    "rounded": (80, rounded),
    "improved": (140, improved),
    "perturbed": (60, perturbed),
    "modelled": (30, modelled),
    "solved_by_highs": (40, solved_by_highs),
    "admitted_exactly": (20, admitted_exactly),
    "admitted_at_length": (2, admitted_at_length),
}
