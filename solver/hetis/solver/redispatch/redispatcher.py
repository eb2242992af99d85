"""Re-dispatch from problem to plan: relax, prove, round, improve, drop moves that do not pay, and order the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from hetis.solver.dispatch.dispatch_problem import DispatchPlan, IntArray
from hetis.solver.dispatch.dispatcher import Dispatcher, small_stage
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, StateSnapshot
from hetis.solver.redispatch.joint_relaxation import JointRelaxation, MoveLp, relax
from hetis.solver.redispatch.move_search import improve, perturb, round_to_groups
from hetis.solver.redispatch.moves import (
    Ordered,
    RequestMoves,
    WaitingStep,
    applied,
    judged,
    order,
    part_seconds,
    paying,
    pays,
    per_decode_step_s,
    step_seconds,
    steps_between,
    whole_steps,
    worth,
)
from hetis.solver.redispatch.redispatch_problem import Move, MoveReason, RedispatchPlan, RedispatchProblem, Refused
from hetis.solver.redispatch.redispatch_tables import (
    RedispatchTables,
    continued,
    device_seconds,
    objective_s,
    short_blocks,
    tables_of,
)
from hetis.solver.redispatch.triggers import ideal_dispatch

MOST_ROUNDS = 8
# Gap to the bound above which the search goes beyond its local optimum. At 0.05, a tenth more of 10,000 tiny stages
# were over 0.5% above brute force; below 0.02 hardly another one is.
WIDE = 0.02
# Attempts of ruin and recreate: this many divided by requests times devices, within the limits.
PERTURBING, FEWEST, MOST = 40_000, 100, 2_000
_InOrder: TypeAlias = tuple[list[Ordered], list[WaitingStep]]
_Judge: TypeAlias = Callable[[RedispatchTables, list[RequestMoves]], _InOrder]


class _Attempt(NamedTuple):
    """Moves in order and the groups that they lead to, [N, D]."""

    x: IntArray
    ordered: list[Ordered]
    refused: list[WaitingStep]


def solve_redispatch(problem: RedispatchProblem) -> RedispatchPlan:
    """Choose moves of running head groups; see `Redispatcher.solve`."""
    return Redispatcher(Dispatcher(problem.snapshot.stage)).solve(problem)


class Redispatcher:
    """A solver of successive re-dispatch problems of one stage; not to be shared between threads."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self._lp = MoveLp()

    def solve(self, problem: RedispatchProblem) -> RedispatchPlan:
        """Move head groups so that makespan, moving and short memory together cost least.

        The formulation is that of `redispatch_problem.py`. If dispatch's multipliers prove that no moves
        gain as much as they must, that is the answer. Otherwise the relaxation is solved by HiGHS, and its bound is
        recomputed from the multipliers. Whole groups come from rounding and a local search and, if these end far
        from the bound, from ruin and recreate. A move is dropped if it neither pays within its request's patience nor
        makes room for others that do; the rest is ordered.

        The result is stable: the same search from the state after the moves finds nothing more, so re-dispatch of an
        unchanged stage does nothing.
        """
        ideal = ideal_dispatch(problem.snapshot, self.dispatcher, on_draining=True)
        return _MoveSearch(problem, ideal, self._lp).plan()


class _MoveSearch:
    """The search for the moves of one problem."""

    def __init__(self, problem: RedispatchProblem, ideal: DispatchPlan, lp: MoveLp) -> None:
        self._problem, self._ideal, self._lp = problem, ideal, lp
        self._names = problem.snapshot.stage.devices

    def plan(self) -> RedispatchPlan:
        tables = tables_of(self._problem)
        relaxed = self._relax(tables)
        attempt = self._attempt(tables, relaxed)
        for _ in range(MOST_ROUNDS):
            if not attempt.ordered:
                break
            spent = sum(o.step.groups * float(tables.num_bytes[o.step.j]) for o in attempt.ordered)
            moved = continued(tables, attempt.x, spent_bytes=spent)
            more = self._attempt(moved, self._relax(moved))
            if not more.ordered:
                break
            # Directly from the start; if no order exists for that, through the placement in between.
            direct = self._ordered(tables, more.x)
            if direct.refused or objective_s(tables, direct.x) > objective_s(tables, more.x) * (1 + 1e-9):
                last = attempt.ordered[-1].wave + 1
                direct = _Attempt(
                    more.x, attempt.ordered + [o._replace(wave=o.wave + last) for o in more.ordered], more.refused
                )
            attempt = direct
        return _plan(self._problem, tables, relaxed, attempt)

    def _relax(self, tables: RedispatchTables) -> JointRelaxation:
        floor_s, guess = self._ideal.bound_s, self._ideal.prices.piece
        return relax(tables, self._lp, floor_s=floor_s, guess=guess, least_gain_s=self._least_gain_s(tables))

    def _enough_s(self, tables: RedispatchTables) -> float:
        return self._problem.least_gain * float(device_seconds(tables, tables.now).max())

    def _least_gain_s(self, tables: RedispatchTables) -> float:
        """Return the gain that moves must exceed, whichever they are: any gain is enough where blocks are short."""
        return 0.0 if short_blocks(tables, tables.now).any() else self._enough_s(tables)

    def _attempt(self, tables: RedispatchTables, relaxed: JointRelaxation) -> _Attempt:
        """Make one round from ``tables.now``; return no moves if they gain too little."""
        before_s = objective_s(tables, tables.now)
        if before_s - relaxed.bound_s <= self._least_gain_s(tables):
            return _Attempt(tables.now, [], [])
        found = list[IntArray]()
        for x in (round_to_groups(tables, relaxed.x), tables.now.copy()):
            improve(tables, x)
            found.append(x)
        best = min(found, key=lambda x: objective_s(tables, x))
        attempt = self._ordered(tables, best)
        if objective_s(tables, attempt.x) > relaxed.bound_s * (1 + WIDE):
            perturbed = best.copy()
            perturb(tables, perturbed, min(MOST, max(FEWEST, PERTURBING // max(1, best.size))), relaxed.bound_s, 1)
            found.append(perturbed)
            tries = (self._ordered(tables, x) for x in found if x is not best)
            attempt = min(attempt, *tries, key=lambda one: objective_s(tables, one.x))
        after_s = objective_s(tables, attempt.x)
        relieves = short_blocks(tables, attempt.x).sum() < short_blocks(tables, tables.now).sum() - 1e-9
        if before_s - after_s <= (0.0 if relieves else self._enough_s(tables)):
            return _Attempt(tables.now, [], attempt.refused)
        return attempt

    def _ordered(self, tables: RedispatchTables, x: IntArray) -> _Attempt:
        """Return the moves to ``x`` that pay, in order.

        First each is judged alone, then the moves are ordered. If that drops any, all are also ordered and judged
        together with those for which they make room, and the better plan is returned.
        """
        steps = steps_between(tables, tables.now, x)
        alone, _ = paying(tables, steps)
        first = self._completed(tables, alone, self._judged_alone)
        if len(alone) == len(steps):
            return first
        second = self._completed(tables, steps, self._judged_together)
        return second if objective_s(tables, second.x) < objective_s(tables, first.x) * (1 - 1e-9) else first

    def _completed(self, tables: RedispatchTables, steps: list[RequestMoves], judge: _Judge) -> _Attempt:
        """Return steps in order; if the order refuses some, the others are judged again without them."""
        refused = list[WaitingStep]()
        while True:
            ordered, waiting = judge(tables, steps)
            reached = applied(tables.now, [o.step for o in ordered])
            waiting += self._detours_that_do_not_pay(tables, reached, ordered, waiting)
            if not waiting:
                return _Attempt(reached, ordered, refused)
            refused += waiting
            # A refused move may have begun with a detour, so its request is moved back.
            for j in {o.step.j for o in ordered if o.is_detour} & {w.step.j for w in waiting}:
                reached[j] = tables.now[j]
            steps = steps_between(tables, tables.now, reached)

    def _judged_alone(self, tables: RedispatchTables, steps: list[RequestMoves]) -> _InOrder:
        """Return the steps that pay on their own, in order."""
        return self._by_gain(tables, *paying(tables, steps))

    def _judged_together(self, tables: RedispatchTables, steps: list[RequestMoves]) -> _InOrder:
        """Return steps in order, without those that neither pay nor make room for what does.

        A step that does not pay alone is dropped only if the plan is better without it and what then has no room.
        """
        kept, spared = list(steps), set[RequestMoves]()
        while True:
            gains, losing = judged(tables, applied(tables.now, kept), kept)
            ordered, waiting = self._by_gain(tables, kept, gains)
            candidates = [kept[position] for position in losing if kept[position] not in spared]
            if waiting or not candidates:
                return ordered, waiting
            without = [step for step in kept if step is not candidates[0]]
            left, _ = self._by_gain(tables, without, [g for g, s in zip(gains, kept, strict=True) if s in without])
            if _cost_s(tables, left) <= _cost_s(tables, ordered):
                kept, spared = without, set()
            else:
                spared.add(candidates[0])

    def _by_gain(self, tables: RedispatchTables, steps: list[RequestMoves], gains: list[float]) -> _InOrder:
        ranked = sorted(range(len(steps)), key=lambda s: -gains[s])
        return order(tables, tables.now, [steps[s] for s in ranked], self._names)

    def _detours_that_do_not_pay(
        self, tables: RedispatchTables, x: IntArray, ordered: list[Ordered], waiting: list[WaitingStep]
    ) -> list[WaitingStep]:
        """Return moves that only pay on the direct route."""
        result = list[WaitingStep]()
        stuck = {w.step.j for w in waiting}
        on_detour = {o.step.j for o in ordered if o.is_detour}
        for whole, seconds in whole_steps(tables, ordered):
            if whole is None or whole.j in stuck or whole.j not in on_detour:
                continue
            if not pays(tables, whole, worth(tables, x, [whole])[0], seconds):
                _, source, target = whole.parts[0]
                way = f"{self._names[source]} to {self._names[target]}"
                result.append(WaitingStep(whole, f"{way} needs a detour, and does not pay with one"))
                stuck.add(whole.j)
        return result


def _cost_s(tables: RedispatchTables, ordered: list[Ordered]) -> float:
    """Return the cost after these steps: makespan, price of short blocks, and the copies' time within patience."""
    x = applied(tables.now, [o.step for o in ordered])
    copies_s = sum(per_decode_step_s(tables, o.step, step_seconds(tables, o.step)) for o in ordered)
    return float(device_seconds(tables, x).max()) + float(tables.short_s @ short_blocks(tables, x)) + copies_s


def _short_or_draining(problem: RedispatchProblem, tables: RedispatchTables, x: IntArray) -> float:
    """Return blocks expected to be short, and all blocks on draining devices, including requests under way."""
    snapshot = problem.snapshot
    draining = np.array([device.status is DeviceStatus.DRAINING for device in snapshot.devices])
    under_way = np.where(tables.now.sum(axis=1, keepdims=True) == 0, snapshot.groups, 0)
    held = tables.blocks @ (x + under_way)
    return float(np.where(draining, held, short_blocks(tables, x)).sum())


def _plan(
    problem: RedispatchProblem, tables: RedispatchTables, relaxed: JointRelaxation, attempt: _Attempt
) -> RedispatchPlan:
    snapshot, x = problem.snapshot, attempt.x
    draining = [device.status is DeviceStatus.DRAINING for device in snapshot.devices]
    moves = list[Move]()
    wholes = whole_steps(tables, attempt.ordered)
    # A step that is part of a longer move has no value of its own.
    ending = {
        number: whole
        for number, (whole, _) in enumerate(wholes)
        if whole is not None and all(x[whole.j, part.target] >= part.groups for part in whole.parts)
    }
    values = dict(zip(ending, worth(tables, x, list(ending.values())), strict=True))
    for together, ((step, wave, _), (_, seconds)) in enumerate(zip(attempt.ordered, wholes, strict=True)):
        value = values.get(together)
        for part in step.parts:
            if value is None:
                reason = MoveReason.DETOUR
            elif draining[part.source]:
                reason = MoveReason.DRAIN
            elif value.saved_s >= per_decode_step_s(tables, step, seconds):
                reason = MoveReason.BALANCE
            else:
                reason = MoveReason.MEMORY
            saves = value is not None and value.saved_s > 0
            moves.append(
                Move(
                    request=snapshot.ids[step.j],
                    groups=part.groups,
                    source=part.source,
                    target=part.target,
                    num_bytes=part.groups * float(tables.num_bytes[step.j]),
                    seconds=part_seconds(tables, step.j, part),
                    payback_steps=seconds / (tables.num_layers * value.saved_s) if value and saves else None,
                    reason=reason,
                    wave=wave,
                    together=together,
                )
            )
    return RedispatchPlan(
        moves=tuple(moves),
        refused=tuple(
            Refused(request=snapshot.ids[step.j], groups=part.groups, source=part.source, target=part.target, why=why)
            for step, why in attempt.refused
            for part in step.parts
        ),
        makespan_before_s=float(device_seconds(tables, tables.now).max()),
        makespan_after_s=float(device_seconds(tables, x).max()),
        short_before=_short_or_draining(problem, tables, tables.now),
        short_after=_short_or_draining(problem, tables, x),
        objective_s=objective_s(tables, x),
        stay_s=objective_s(tables, tables.now),
        bound_s=relaxed.bound_s,
    )


def compile_redispatch() -> None:
    """Load or compile the kernels before any client waits for an answer; compiling takes a minute or more."""
    stage = small_stage()
    snapshot = StateSnapshot(
        stage=stage,
        devices=tuple(DeviceSnapshot(name=name, total_blocks=64) for name in stage.devices),
        ids=("1", "2"),
        context_tokens=np.array([64, 64]),
        remaining_tokens=np.array([64, 64]),
        groups=np.array([[2, 0], [2, 0]]),
    )
    problem = RedispatchProblem(snapshot=snapshot, num_layers=1, link_byte_s=np.zeros(2))
    solve_redispatch(problem)
    tables = tables_of(problem)
    perturb(tables, tables.now.copy(), 1, 0.0, 1)  # the plan above is at its bound without it
