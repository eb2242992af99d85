"""The steps of re-dispatch one by one on small random inputs, whose results `tests.solver.recorded` keeps.

As for dispatch (`tests.solver.dispatch.steps`), each has its own inputs: arbitrary placements, fractions and prices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hetis.solver.dispatch.problem import BoolArray, FloatArray, IntArray
from hetis.solver.dispatch.solve import Dispatcher
from hetis.solver.redispatch.local_search import (
    improve,
    perturb,
    placement_of,
    round_to_groups,
    seconds_with,
    shift,
    short_with,
)
from hetis.solver.redispatch.milp import _is_allowed, _MilpProgram, _movable, search
from hetis.solver.redispatch.moves import applied, judged, order, paying, steps_between, whole_steps, worth
from hetis.solver.redispatch.problem import RedispatchProblem
from hetis.solver.redispatch.relaxation import (
    MoveLp,
    Prices,
    _Program,
    arrival_prices,
    feasible,
    group_prices,
    proven_bound,
    relax,
)
from hetis.solver.redispatch.tables import (
    RedispatchTables,
    continued,
    device_seconds,
    marks,
    objective_s,
    short_blocks,
    tables_of,
)
from hetis.solver.redispatch.triggers import ideal_dispatch
from tests.solver.dispatch.steps import _Columns, by_rows, of_model
from tests.solver.numbers import numbers_of
from tests.solver.redispatch.instances import random_problem, with_moves_under_way


@dataclass(frozen=True, kw_only=True)
class Case:
    """A random stage of any kind with its arrays."""

    rng: np.random.Generator
    problem: RedispatchProblem
    tables: RedispatchTables

    def fractions(self) -> FloatArray:
        """Return fractional groups on any devices, most of them where they are now."""
        now = self.tables.now.astype(np.float64)
        moves = self.rng.random(len(now)) < 0.6
        shares = self.rng.dirichlet(np.full(now.shape[1], 0.5), len(now)) * now.sum(axis=1, keepdims=True)
        return np.where(moves[:, None], 0.5 * now + 0.5 * shares, now)

    def placement(self) -> IntArray:
        """Return whole groups, those of some requests on any devices, in the devices' units."""
        x = self.tables.now.copy()
        for j in range(len(x)):
            for _ in range(int(self.rng.integers(0, 4))):
                source, target = self.rng.choice(x.shape[1], 2, replace=False)
                unit = max(int(self.tables.unit[source]), int(self.tables.unit[target]))
                n = unit * int(self.rng.integers(1, 3))
                if n <= x[j, source]:
                    x[j, source] -= n
                    x[j, target] += n
        return x

    def prices(self) -> Prices:
        """Return any multipliers, of about the magnitude of those of the programs."""
        num, rng = len(self.tables.unit), self.rng
        return Prices(
            piece=rng.uniform(-0.1, 1.0, self.tables.alpha.shape) / num,
            nic=float(rng.uniform(-0.1, 0.3)),
            now=np.maximum(0.0, rng.uniform(-1e-9, 1e-9, num)),
            later=rng.uniform(-0.2, 0.8, (len(self.tables.later), num)) * self.tables.short_s,
            budget=float(rng.uniform(-1e-15, 1e-15)),
        )

    def is_open(self) -> BoolArray:
        return self.rng.random(len(self.tables.unit)) < 0.8


def random_case(seed: int, *, most_requests: int = 7) -> Case:
    rng = np.random.default_rng(seed)
    head_groups = int(rng.choice([1, 2, 4, 8]))
    problem = random_problem(
        seed,
        num_devices=int(rng.integers(2, 6)),
        num_requests=int(rng.integers(1, most_requests + 1)),
        head_groups=head_groups,
        pieces=int(rng.integers(1, 4)),
        tp=[None, 1, 2, 4][int(rng.integers(4))] if head_groups > 2 else [None, 1][int(rng.integers(2))],
        slack=float(rng.choice([0.02, 0.3, 2.0])),
        draining=bool(rng.random() < 0.3),
        budget_share=float(rng.choice([0.1, 0.3, np.inf, np.inf])),
        high_water=float(rng.choice([0.5, 0.9, 1.0])),
    )
    snapshot = problem.snapshot
    if rng.random() < 0.3:
        snapshot = with_moves_under_way(snapshot, rng)
    # Some requests are about to end.
    remaining = np.where(rng.random(len(snapshot.ids)) < 0.2, rng.integers(0, 3), snapshot.remaining_tokens)
    snapshot = replace(snapshot, remaining_tokens=remaining)
    full = frozenset({int(rng.integers(len(snapshot.devices)))}) if rng.random() < 0.3 else frozenset[int]()
    problem = replace(problem, snapshot=snapshot, full=full, ahead_steps=int(rng.choice([5, 16, 100])))
    problem = _in_another_order(problem, rng)
    return Case(rng=rng, problem=problem, tables=tables_of(problem))


def _in_another_order(problem: RedispatchProblem, rng: np.random.Generator) -> RedispatchProblem:
    """Return the problem with its primary, if any, at any index, and with a network card of any speed."""
    snapshot, stage = problem.snapshot, problem.snapshot.stage
    by = rng.permutation(stage.num_devices)
    place = np.argsort(by)
    primary = stage.primary
    if primary is not None:  # the network card binds in some cases
        nic_byte_s = primary.nic_byte_s * float(rng.choice([1.0, 30.0, 300.0]))
        primary = replace(primary, device=int(place[primary.device]), nic_byte_s=nic_byte_s)
    stage = replace(
        stage,
        devices=tuple(stage.devices[i] for i in by),
        head_s=stage.head_s[by],
        kv_byte_s=stage.kv_byte_s[by],
        call_s=stage.call_s[by],
        transfer_byte_s=stage.transfer_byte_s[by],
        transfer_s=stage.transfer_s[by],
        primary=primary,
    )
    snapshot = replace(
        snapshot,
        stage=stage,
        devices=tuple(snapshot.devices[i] for i in by),
        groups=np.ascontiguousarray(snapshot.groups[:, by]),  # the layout for which kernels are compiled
        moves=tuple(
            replace(move, source=int(place[move.source]), target=int(place[move.target])) for move in snapshot.moves
        ),
    )
    full = frozenset(int(place[i]) for i in problem.full)
    return replace(problem, snapshot=snapshot, link_byte_s=problem.link_byte_s[by], full=full)


def _small(*values: Any) -> list[float]:
    """Return the numbers of seconds and other small quantities, multiplied by a million."""
    return [1e6 * number for number in numbers_of(*values)]


def tabulated(seed: int) -> list[float]:
    """The problem as arrays, and the remaining problem after some moves."""
    case = random_case(seed)
    x = case.placement()
    later = continued(case.tables, x, spent_bytes=0.3 * min(case.tables.budget, 1e9))
    own = case.tables[:-2]  # the last two are inputs of the problem
    answer = [*numbers_of(own), *_small(own)]
    answer += numbers_of(later.now, later.room, later.budget, marks(case.problem))
    for placed in (case.tables.now, x, case.fractions()):
        answer += _small(device_seconds(case.tables, placed), objective_s(case.tables, placed))
        answer += numbers_of(short_blocks(case.tables, placed))
    return answer


def priced(seed: int) -> list[float]:
    """Costs of staying and of arriving at random prices, and the bounds that they prove."""
    case = random_case(seed)
    answer: list[float] = []
    for _ in range(3):
        prices, is_open = case.prices(), case.is_open()
        kept = feasible(case.tables, prices, is_open)
        answer += numbers_of(kept.piece, kept.nic)
        answer += _small(kept.now, kept.later, kept.budget * 1e6, group_prices(case.tables, prices))
        answer += _small(arrival_prices(case.tables, prices, is_open), proven_bound(case.tables, prices, is_open))
    return answer


def _with_room_for_one(case: Case) -> RedispatchTables:
    """Return the tables with exactly the room for one unit of some request on every device."""
    tables = case.tables
    one = tables.unit * case.rng.choice(tables.blocks, len(tables.unit))
    return tables._replace(room=tables.blocks @ tables.now + one)


def rounded(seed: int) -> list[float]:
    """Fractions rounded to whole groups, and the descent from there and from the present placement."""
    case = random_case(seed)
    if seed % 2:
        case = replace(case, tables=_with_room_for_one(case))
    answer: list[float] = []
    for fractions in (case.fractions(), case.fractions()):
        x = round_to_groups(case.tables, fractions)
        answer += numbers_of(x)
        answer += numbers_of(improve(case.tables, x), x)
    for x in (case.tables.now.copy(), case.placement()):
        answer += numbers_of(improve(case.tables, x), x)
    return answer


def placed(seed: int) -> list[float]:
    """A placement under construction, after each move."""
    case = random_case(seed)
    tables = case.tables
    placement = placement_of(tables, case.placement())
    answer: list[float] = []
    for _ in range(5):
        j = int(case.rng.integers(len(tables.context)))
        source, target = (int(i) for i in case.rng.choice(len(tables.unit), 2, replace=False))
        shift(tables, placement, j, source, target, int(case.rng.integers(1, 4)))
        answer += numbers_of(placement.x, placement.groups, placement.tokens, placement.used, placement.later)
        answer += numbers_of(placement.workers, placement.spent)
        answer += _small(
            placement.seconds, seconds_with(tables, placement, source, 1, 100.0), short_with(tables, placement, 0, j, 2)
        )
    fresh = placement_of(tables, placement.x.copy())
    np.testing.assert_allclose(fresh.tokens, placement.tokens)
    np.testing.assert_allclose(fresh.spent, placement.spent)
    return answer


def moved(seed: int) -> list[float]:
    """Steps between placements, their values, which of them pay, and their order when memory is short."""
    case = random_case(seed)
    tables = case.tables
    x = case.placement()
    steps = steps_between(tables, tables.now, x)
    assert np.array_equal(applied(tables.now, steps), x)
    answer = numbers_of(steps) + _small(worth(tables, x, steps))
    gains, losing = judged(tables, x, steps)
    kept, kept_gains = paying(tables, steps)
    answer += numbers_of(_small(gains), losing, kept, _small(kept_gains))
    needed = sum(step.groups * float(tables.num_bytes[step.j]) for step in steps)
    before, after = tables.blocks @ tables.now, tables.blocks @ x
    for spare, budget in ((0, 1.0), (0, 1.5), (30, 1.2), (200, 4.0)):
        room = np.maximum(before, after) + case.rng.integers(0, spare + 1, len(before))
        tight = tables._replace(room=room, budget=budget * needed)
        ordered, waiting = order(tight, tables.now, steps, case.problem.snapshot.stage.devices)
        answer += numbers_of(ordered, waiting, _small(whole_steps(tight, ordered)))
    return answer


def modelled(seed: int) -> list[float]:
    """The linear and the integer program, entry by entry, and the former's prices and columns."""
    case = random_case(seed)
    program = _Program(case.tables, case.is_open())
    answer = of_model(program.start())
    requests, devices = np.nonzero(case.rng.random(case.tables.now.shape) < 0.5)
    columns = _Columns()
    program.add(columns, requests, devices)
    answer += numbers_of(columns.added)
    duals = case.rng.uniform(-1.0, 0.5, int(program.rows[-1]))
    prices, pays = program.prices(duals)
    answer += numbers_of(prices.piece, prices.nic, program.cheaper(duals))
    answer += _small(prices.now, prices.later, prices.budget * 1e6, pays)
    movable = _movable(case.tables, case.fractions())
    answer += numbers_of(movable)
    if len(movable):
        integer = _MilpProgram(case.tables, movable)
        answer += of_model(by_rows(integer.model()))
        answer += numbers_of(integer.groups(np.arange(integer.num_columns) % 3.0))
    for x in (case.tables.now, case.placement(), case.placement() - 1):
        answer.append(float(_is_allowed(case.tables, x)))
    return answer


def limited(seed: int) -> list[float]:
    """The requests that the integer program considers if there are too many to consider all."""
    case = random_case(seed, most_requests=120)
    return numbers_of(_movable(case.tables, case.fractions()))


def solved_by_highs(seed: int) -> list[float]:
    """The optima of both programs, and of the relaxation over all choices of devices in use."""
    case = random_case(seed, most_requests=4)
    tables, answer = case.tables, list[float]()
    for is_open in (np.ones(len(tables.unit), np.bool_), case.is_open()):
        solution = MoveLp().solve(tables, is_open, case.prices())
        if solution is None:
            answer.append(-1.0)
            continue
        assert proven_bound(tables, solution.prices, is_open) <= solution.value_s * (1 + 1e-6)
        answer.append(round(solution.value_s * 1e6, 5))
    ideal = ideal_dispatch(case.problem.snapshot, Dispatcher(case.problem.snapshot.stage), on_draining=True)
    answer.append(round(ideal.bound_s * 1e6, 5))
    relaxed = relax(tables, MoveLp(), floor_s=ideal.bound_s, guess=ideal.prices.piece)
    answer.append(round(relaxed.bound_s * 1e6, 5))
    found = search(tables, case.fractions())
    answer.append(-1.0 if found is None else round(objective_s(tables, found) * 1e6, 5))
    return answer


def perturbed(seed: int) -> list[float]:
    """The rounds of ruin and recreate from the present placement, a few at a time."""
    case = random_case(seed)
    x, state, answer = case.tables.now.copy(), seed + 1, list[float]()
    for rounds in (1, 1, 2, 8):
        state = perturb(case.tables, x, rounds, 0.0, state)
        assert _is_allowed(case.tables, x)
        answer += numbers_of(x, objective_s(case.tables, x) * 1e6, state)
    return answer


STEPS: dict[str, tuple[int, Callable[[int], list[float]]]] = {
    "tabulated": (60, tabulated),
    "priced": (60, priced),
    "rounded": (120, rounded),
    "placed": (40, placed),
    "moved": (80, moved),
    "modelled": (50, modelled),
    "limited": (20, limited),
    "perturbed": (40, perturbed),
    "solved_by_highs": (15, solved_by_highs),
}
