"""Dispatch and re-dispatch of one stage, with all results for a report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from hetis.formats.dispatch.new_requests import NewRequests
from hetis.planner.use_cases.dispatch.stages import CostedStage, StepTimes, times_of
from hetis.solver.dispatch.dispatch_problem import DispatchPlan, DispatchProblem
from hetis.solver.dispatch.snapshot import StateSnapshot
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.redispatch.redispatch_problem import Move, RedispatchPlan, RedispatchProblem
from hetis.solver.redispatch.triggers import Trigger


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changed:
    """A stage and a change to it. Moving head groups count at their targets."""

    stage: CostedStage
    before: StepTimes  # times without the change
    after: StepTimes  # times with the change
    reached: StateSnapshot  # state with the change


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched(_Changed):
    """New requests, in order of admission, placed on a stage by a plan with its proof."""

    requests: NewRequests
    plan: DispatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Redispatched(_Changed):
    """Moves of head groups of running requests by a plan, which also contains refused moves and its proof."""

    problem: RedispatchProblem
    triggers: tuple[Trigger, ...]  # triggers that would fire in a running stage
    plan: RedispatchPlan


def is_compiled() -> bool:
    """Return whether the kernels are already compiled on this machine; if not, the first run takes a minute longer."""
    from hetis.solver.backends.compiled import is_cached
    from hetis.solver.dispatch.loaded_stage import running_load

    return is_cached(running_load)


def dispatch_requests(stage: CostedStage, requests: NewRequests) -> Dispatched:
    """Place new requests."""
    from hetis.solver.dispatch.dispatcher import solve_dispatch

    arrivals = requests.to_solver()
    problem = DispatchProblem(stage=stage.snapshot.stage, load=stage.snapshot.load(), requests=arrivals)
    plan = solve_dispatch(problem)
    state = DispatchState.of(stage.snapshot)
    state.admit(arrivals, plan)
    reached = state.snapshot()
    return Dispatched(
        stage=stage,
        requests=requests,
        plan=plan,
        before=times_of(stage.snapshot),
        after=times_of(reached),
        reached=reached,
    )


def redispatch_stage(
    stage: CostedStage, *, theta: float = 0.5, budget_bytes: float = math.inf, least_gain: float = 0.01,
    patience: float = 0.25, ahead_steps: int = 100, refill_token_s: float | None = None,
) -> Redispatched:  # fmt: skip
    """Find the moves that pay off, whether or not a trigger has fired.

    Settings are as in `RedispatchProblem`, None for its default; ``theta`` as in `hetis.solver.redispatch.triggers`.
    """
    from hetis.solver.dispatch.dispatcher import Dispatcher
    from hetis.solver.redispatch.redispatcher import Redispatcher
    from hetis.solver.redispatch.triggers import triggers

    problem = RedispatchProblem(
        snapshot=stage.snapshot,
        num_layers=stage.saved.num_layers,
        link_byte_s=stage.saved.move_byte_s(),
        budget_bytes=budget_bytes,
        least_gain=least_gain,
        patience=patience,
        ahead_steps=ahead_steps,
    )
    if refill_token_s is not None:
        problem = replace(problem, refill_token_s=refill_token_s)
    dispatcher = Dispatcher(stage.snapshot.stage)
    fired = triggers(stage.snapshot, dispatcher, theta=theta)
    plan = Redispatcher(dispatcher).solve(problem)
    reached = _after_moves(stage.snapshot, plan)
    return Redispatched(
        stage=stage,
        problem=problem,
        triggers=fired,
        plan=plan,
        before=times_of(stage.snapshot, arrived=True),
        after=times_of(reached, arrived=True),
        reached=reached,
    )


def bundles(plan: RedispatchPlan) -> Iterator[list[Move]]:
    """Yield the groups of moves that are committed together, in order."""
    for _, moves in groupby(plan.moves, key=lambda move: move.together):
        yield list(moves)


def _after_moves(snapshot: StateSnapshot, plan: RedispatchPlan) -> StateSnapshot:
    state = DispatchState.of(snapshot)
    for moves in bundles(plan):
        prepared = [
            state.prepare_move(move.request, groups=move.groups, source=move.source, target=move.target)
            for move in moves
        ]
        numbers = [move.number for move in prepared if move is not None]
        assert len(numbers) == len(moves), "every prefix of the moves fits in memory"
        state.commit_moves(*numbers)
    state.mark_seen()
    return state.snapshot()
