"""Search for the moves of one change in a head map. Pure, but slow enough to need a thread."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from hetis.planner.convert.stages import Conditions, StageTerms, moves_to_proto, snapshot_from_proto
from hetis.planner.fleet.settings import RedispatchPolicy
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.snapshot import StateSnapshot
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.errors import InvalidProblemError
from hetis.solver.redispatch.redispatch_problem import Move, RedispatchPlan, RedispatchProblem
from hetis.solver.redispatch.redispatcher import Redispatcher
from hetis.solver.redispatch.triggers import Trigger, Watch, makespan_s, triggers
from hetis.v1 import head_map_pb2

MOST_MOVES = 4096  # per change


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageLook:
    """The inputs of a look at one copy of one stage, where something seems wrong."""

    head_map: head_map_pb2.HeadMap
    terms: StageTerms  # the stage at the measured speeds
    conditions: Conditions  # status of the GPUs that the planner knows
    changed: frozenset[str]  # devices that joined, came back, were lost or changed their speed since the last look
    policy: RedispatchPolicy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoundMoves:
    """Moves that fit at once, and their effect.

    ``makespan_before_s`` and ``makespan_after_s`` are those of ``moves`` alone.
    """

    moves: list[head_map_pb2.Move]  # in the API's form
    fired: tuple[Trigger, ...]  # every trigger that fired in the look
    plan: RedispatchPlan  # everything that the solver would move, now and once other moves have made room
    makespan_before_s: float
    makespan_after_s: float


class StagePlanner:
    """Looks at one copy of one stage repeatedly. Must not be shared between threads.

    It remembers fruitless looks (`Watch`), so that hopeless cases are not solved over and over.
    """

    def __init__(self) -> None:
        self._watch = Watch()
        self._redispatcher: Redispatcher | None = None
        self._terms: StageTerms | None = None

    def look(self, look: StageLook) -> FoundMoves | None:
        """Return moves worth making, or None if there are none or nothing has changed since there were none.

        Raises InvalidProblemError if the head map contradicts itself or the stage.
        """
        snapshot = snapshot_from_proto(
            look.head_map,
            look.terms,
            conditions=look.conditions,
            high_water=look.policy.high_water,
            changed=look.changed,
        )
        if not snapshot.ids or snapshot.moves:
            return None  # moves in progress must finish first
        redispatcher = self._redispatcher_of(look.terms)
        fired = triggers(snapshot, redispatcher.dispatcher, theta=look.policy.deviation_ratio)
        if not self._watch.due(snapshot, fired):
            return None
        plan = redispatcher.solve(
            RedispatchProblem(
                snapshot=snapshot,
                num_layers=look.terms.num_layers,
                link_byte_s=look.terms.link_byte_s,
                budget_bytes=look.policy.kv_bytes,
            )
        )
        moves, reached = fitting(snapshot, plan)
        is_change = bool(moves) and not look.policy.is_advisory  # advice alone changes nothing
        self._watch.looked(snapshot, fired, moved=is_change)
        if not moves:
            return None
        return FoundMoves(
            moves=moves_to_proto(moves, look.head_map, look.terms),
            fired=fired,
            plan=plan,
            makespan_before_s=makespan_s(snapshot),
            makespan_after_s=makespan_s(reached),
        )

    def _redispatcher_of(self, terms: StageTerms) -> Redispatcher:
        if self._redispatcher is None or self._terms is not terms:
            self._redispatcher, self._terms = Redispatcher(Dispatcher(terms.stage)), terms
        return self._redispatcher


def fitting(snapshot: StateSnapshot, plan: RedispatchPlan) -> tuple[list[Move], StateSnapshot]:
    """Return the moves up to the first one that cannot be reserved now at its target, and the resulting state.

    The remaining moves need room, or head groups, that others bring. They are computed again once these have arrived.
    """
    state = DispatchState.of(snapshot)
    kept, bundles = list[Move](), list[list[int]]()
    for _, together in groupby(plan.moves, key=lambda move: move.together):
        bundle = list(together)
        numbers = _reserved(state, bundle)
        if numbers is None or len(kept) + len(bundle) > MOST_MOVES:
            break
        kept += bundle
        bundles.append(numbers)
    for numbers in bundles:
        state.commit_moves(*numbers)
    return kept, state.snapshot()


def _reserved(state: DispatchState, bundle: list[Move]) -> list[int] | None:
    """Reserve moves that flip together; return their numbers, or None unless all fit."""
    numbers = list[int]()
    try:
        for move in bundle:
            prepared = state.prepare_move(move.request, groups=move.groups, source=move.source, target=move.target)
            if prepared is None:
                break
            numbers.append(prepared.number)
    except InvalidProblemError:
        pass  # the source receives the head groups only by another move
    if len(numbers) == len(bundle):
        return numbers
    for number in numbers:
        state.abort_move(number)
    return None
