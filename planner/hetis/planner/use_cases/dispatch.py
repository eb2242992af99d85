"""Dispatch and re-dispatch of a saved state, with all results for a report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from hetis.formats.dispatch_state import NewRequests
from hetis.formats.saved_state import SavedState
from hetis.planner.use_cases.stage_sources import LoadedStage
from hetis.planner.use_cases.stage_times import StageTimes, times_of
from hetis.solver.budget import Budget
from hetis.solver.dispatch.problem import DispatchPlan, DispatchProblem
from hetis.solver.dispatch.snapshot import StateSnapshot
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.redispatch.problem import Move, RedispatchPlan, RedispatchProblem
from hetis.solver.redispatch.triggers import Trigger


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """New requests placed on a stage.

    Attributes:
        stage: the stage.
        requests: in order of admission.
        plan: their placement, with its proof.
        before, after: times of every device without and with them.
        reached: the state including the placed requests.
    """

    stage: LoadedStage
    requests: NewRequests
    plan: DispatchPlan
    before: StageTimes
    after: StageTimes
    reached: StateSnapshot

    @property
    def saved(self) -> SavedState:
        """The new state for its file."""
        return self.stage.saved.after(self.reached)


@dataclass(frozen=True, slots=True, kw_only=True)
class Redispatched:
    """Moves of running requests' head groups.

    Attributes:
        stage: the stage with its running requests.
        problem: with the settings it was solved under.
        triggers: those that would fire in a running stage.
        plan: moves, refused ones, proof.
        before, after: times of every device; moving head groups count at their targets.
        reached: the state after the moves.
    """

    stage: LoadedStage
    problem: RedispatchProblem
    triggers: tuple[Trigger, ...]
    plan: RedispatchPlan
    before: StageTimes
    after: StageTimes
    reached: StateSnapshot

    @property
    def saved(self) -> SavedState:
        """The new state for its file."""
        return self.stage.saved.after(self.reached)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedispatchSettings:
    """Settings as in `RedispatchProblem`, None for its default; ``theta`` as in `hetis.solver.redispatch.triggers`."""

    theta: float = 0.5
    budget_bytes: float = math.inf
    least_gain: float = 0.01
    patience: float = 0.25
    ahead_steps: int = 100
    refill_token_s: float | None = None


def is_compiled() -> bool:
    """Return whether the kernels have been compiled on this machine; if not, the first run takes a minute longer."""
    from hetis.solver.compiled import is_cached
    from hetis.solver.dispatch.tables import running_load

    return is_cached(running_load)


def dispatch_requests(
    stage: LoadedStage, requests: NewRequests, *, exact: bool = False, budget: Budget | None = None, seed: int = 0
) -> Dispatched:
    """Place new requests. If ``exact``, search whole head groups until proven optimal or the budget is spent."""
    from hetis.solver.dispatch.exact import solve_exactly
    from hetis.solver.dispatch.solve import solve_dispatch

    arrivals = requests.to_solver()
    problem = DispatchProblem(stage=stage.snapshot.stage, load=stage.snapshot.load(), requests=arrivals)
    plan = solve_exactly(problem, budget=budget, seed=seed) if exact else solve_dispatch(problem)
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


def redispatch_stage(stage: LoadedStage, settings: RedispatchSettings) -> Redispatched:
    """Find the moves that pay, whether or not a trigger has fired."""
    from hetis.solver.dispatch.solve import Dispatcher
    from hetis.solver.redispatch.solve import Redispatcher
    from hetis.solver.redispatch.triggers import triggers

    problem = RedispatchProblem(
        snapshot=stage.snapshot,
        num_layers=stage.saved.num_layers,
        link_byte_s=stage.saved.move_byte_s(),
        budget_bytes=settings.budget_bytes,
        least_gain=settings.least_gain,
        patience=settings.patience,
        ahead_steps=settings.ahead_steps,
    )
    if settings.refill_token_s is not None:
        problem = replace(problem, refill_token_s=settings.refill_token_s)
    dispatcher = Dispatcher(stage.snapshot.stage)
    fired = triggers(stage.snapshot, dispatcher, theta=settings.theta)
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
    """Yield groups of moves that are committed at once, in order."""
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
