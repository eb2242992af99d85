"""The requests on one replica for whose head map the planner is the authority, on all copies of all its stages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.planner.convert.stages import Conditions
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.dispatching.stage_copy import Newcomer, StageCopy
from hetis.solver.dispatch.problem import DeviceLoad, IntArray, Path, Resource
from hetis.v1 import change_pb2, head_map_pb2
from hetis.v1 import dispatch_service_pb2 as pb2

# After so many rounds all refusals are final. That may refuse too many if stages run short of memory in turns; those
# requests wait for the next call.
MOST_ROUNDS = 4


_RESOURCES = {one: pb2.MissingResource.Value(f"MISSING_RESOURCE_{one.name}") for one in Resource}
_PATHS = {one: pb2.DispatchPath.Value(f"DISPATCH_PATH_{one.name}") for one in Path}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Home:
    """The devices of a request's head groups on one stage: ``groups`` [D] is their number on each device."""

    copy: StageCopy
    groups: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAdmission:
    """The result for a batch of requests, on all stages or on one."""

    homes: dict[str, tuple[Home, ...]]  # by placed request, one per stage
    refused: dict[str, pb2.Unplaced]  # by request that has to wait, in order
    qualities: tuple[pb2.StageQuality, ...]  # one per copy of a stage that receives requests
    stalled: tuple[str, ...] = ()  # requests that the same call could not lengthen for lack of blocks

    def part(self, requests: Iterable[str], stalled: tuple[str, ...]) -> BatchAdmission:
        """Return the part of the result that concerns a call with these ``requests``."""
        names = list(requests)
        homes = {name: self.homes[name] for name in names if name in self.homes}
        used = {(home.copy.stage, home.copy.copy) for found in homes.values() for home in found}
        return BatchAdmission(
            homes=homes,
            refused={name: self.refused[name] for name in names if name in self.refused},
            qualities=tuple(one for one in self.qualities if (one.stage, one.copy) in used),
            stalled=stalled,
        )


def admit(
    stages: Sequence[Sequence[StageCopy]], loads: Sequence[Sequence[DeviceLoad]], newcomers: Sequence[Newcomer]
) -> BatchAdmission:
    """Place a batch on copies of all stages, which have these ``loads``. Reads no other mutable state.

    Requests, whose names must differ, are tried in order. A request that some stage refuses takes nothing anywhere, and
    later ones are still tried. But a stage's answer for a request depends on the requests before it, including some
    that another stage refuses. Refusals are therefore made final from the front, up to the point where each stage has
    decided without requests that are refused elsewhere; the others are tried again.
    """
    standing, refused = list(newcomers), dict[str, pb2.Unplaced]()
    answers: list[BatchAdmission | None] = [None] * len(stages)
    for round_number in range(len(newcomers) + 1):
        done = list[BatchAdmission]()
        for s, copies in enumerate(stages):
            answer = answers[s]
            if answer is None or answer.homes.keys() != {one.id for one in standing}:
                answer = answers[s] = _on_stage(copies, loads[s], standing)
            done.append(answer)
        final = _final_refusals(standing, done, is_last=round_number + 1 >= MOST_ROUNDS)
        if not final:
            break
        refused |= final
        standing = [one for one in standing if one.id not in final]
    return BatchAdmission(
        homes={one.id: tuple(home for answer in done for home in answer.homes[one.id]) for one in standing},
        refused={one.id: refused[one.id] for one in newcomers if one.id in refused},
        qualities=tuple(quality for answer in done for quality in answer.qualities) if standing else (),
    )


def _final_refusals(
    standing: Sequence[Newcomer], answers: Sequence[BatchAdmission], *, is_last: bool
) -> dict[str, pb2.Unplaced]:
    """Return the requests that are refused by a stage whose answer does not depend on earlier refused requests."""
    final = dict[str, pb2.Unplaced]()
    for name in (one.id for one in standing):
        by = [answer for answer in answers if name in answer.refused]
        knowing = [answer for answer in by if is_last or final.keys() <= answer.refused.keys()]
        if knowing:
            final[name] = knowing[0].refused[name]
        elif by:
            break
    return final


def _on_stage(copies: Sequence[StageCopy], loads: Sequence[DeviceLoad], standing: Sequence[Newcomer]) -> BatchAdmission:
    """Place each request on the copy with the most free blocks or, if that has no room, on the next copy."""
    free = [int(np.maximum(0, load.free_blocks).sum()) for load in loads]
    heads = copies[0].terms.stage.heads
    untried = [set(range(len(copies))) for _ in standing]
    on: list[list[int]] = [[] for _ in copies]  # positions in `standing`

    def give(j: int) -> int:
        one = standing[j]
        best = max(untried[j], key=lambda c: (free[c], -c))
        untried[j].discard(best)
        free[best] -= heads.head_groups * -(-(one.context_tokens + one.growth_tokens) // heads.block_tokens)
        on[best].append(j)
        return best

    stale = {give(j) for j in range(len(standing))}
    homes, refused = dict[str, tuple[Home, ...]](), dict[str, pb2.Unplaced]()
    qualities = dict[int, pb2.StageQuality]()
    while stale:
        c = min(stale)
        stale.discard(c)
        on[c].sort()
        stage, batch = copies[c].stage, [standing[j] for j in on[c]]
        plan = copies[c].plan(loads[c], batch)
        out = {on[c][one.request]: one for one in plan.unplaced}
        homes |= {one.id: (Home(copy=copies[c], groups=plan.groups[k]),) for k, one in enumerate(batch)}
        qualities[c] = pb2.StageQuality(
            stage=stage,
            copy=copies[c].copy,
            makespan_s=plan.makespan_s,
            bound_s=plan.bound_s,
            path=_PATHS[plan.path],
        )
        on[c] = [j for j in on[c] if j not in out]
        for j, unplaced in out.items():
            name = standing[j].id
            del homes[name]
            if untried[j]:
                stale.add(give(j))
            else:
                resource = _RESOURCES[unplaced.resource]
                refused[name] = pb2.Unplaced(request=name, stage=stage, resource=resource, missing=unplaced.missing)
    used = tuple(quality for c, quality in sorted(qualities.items()) if on[c])
    return BatchAdmission(homes=homes, refused=refused, qualities=used)


MOST_IN_LOOP = 16  # new requests planned in the event loop, which takes about a millisecond on two stages
MOST_TRIES = 3  # attempts to plan a larger batch in a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequest:
    """A running request: its values when it was admitted, and its copy of every stage."""

    admitted: Newcomer
    copies: tuple[StageCopy, ...]


@dataclass(slots=True, eq=False)
class _Coming:
    """A call that waits for the next iteration of the event loop."""

    finished: Sequence[str]
    grown: Sequence[pb2.Growth]
    newcomers: Sequence[Newcomer]
    answer: asyncio.Future[BatchAdmission]

    @property
    def requests(self) -> set[str]:
        return {*self.finished, *(one.id for one in self.grown), *(one.id for one in self.newcomers)}


class ReplicaDispatch:
    """The dispatch state of one replica. After every method, each request is on one copy of every stage or on none."""

    def __init__(
        self,
        state_id: str,
        stages: Sequence[Sequence[StageCopy]],
        running: Mapping[str, RunningRequest],
    ) -> None:
        """Build the state from ``stages`` that hold the ``running`` requests, as read by `declared`."""
        self.state_id = state_id
        self.stages = tuple(tuple(copies) for copies in stages)
        self.running = dict(running)  # in order of admission
        self.version = 0  # grows with every change
        self._planning = asyncio.Lock()  # a stage plans only one batch at a time
        self._coming = list[_Coming]()  # calls to be planned in the next iteration of the event loop
        self._later = set[asyncio.Task[None]]()  # calls that wait for a batch planned in a thread

    @property
    def copies(self) -> Iterable[StageCopy]:
        return (copy for copies in self.stages for copy in copies)

    async def admit(
        self,
        newcomers: Sequence[Newcomer],
        *,
        finished: Sequence[str] = (),
        grown: Sequence[pb2.Growth] = (),
        keep: bool = True,
    ) -> BatchAdmission:
        """Place requests in order and add those that fit; requests that already run with the same values are ignored.

        Small batches that arrive in one iteration of the event loop are planned together: if many engines call at once,
        one solve answers them all.

        Args:
            finished, grown: requests to remove and to lengthen before, in the same turn: no other call comes between.
            keep: if False, nothing is added.

        Raises:
            ServiceError: REQUEST_RUNNING if a request runs with other values; then nothing is done.
        """
        if keep and len(newcomers) <= MOST_IN_LOOP:
            coming = _Coming(finished, grown, newcomers, asyncio.get_running_loop().create_future())
            self._coming.append(coming)
            if len(self._coming) == 1:
                asyncio.get_running_loop().call_soon(self._take_coming)
            return await coming.answer
        async with self._planning:
            fresh, stalled = self._begin(newcomers, finished, grown)
            admission = await self._plan(fresh)
            if keep:
                self._add(fresh, admission)
        return replace(admission, stalled=stalled)

    def _begin(
        self, newcomers: Sequence[Newcomer], finished: Sequence[str], grown: Sequence[pb2.Growth]
    ) -> tuple[list[Newcomer], tuple[str, ...]]:
        """Do all of a call but its admissions; return its requests that do not run, and those that are stalled.

        Raises REQUEST_RUNNING, before anything is done, if a request runs with other values.
        """
        fresh, ended = list[Newcomer](), frozenset(finished)
        for one in newcomers:
            running = self.running.get(one.id)
            if running is None or one.id in ended:
                fresh.append(one)
            elif running.admitted != one:
                raise _is_running(one, running.admitted)
        if finished:
            self.finish(finished)
        return fresh, self.grow(grown) if grown else ()

    def _take_coming(self) -> None:
        if self._planning.locked():  # a large batch is being planned in a thread
            task = asyncio.ensure_future(self._take_coming_later())
            self._later.add(task)
            task.add_done_callback(self._later.discard)
            return
        coming, self._coming = self._coming, []
        batch, names, num_new = list[_Coming](), set[str](), 0
        for one in coming:
            if one.answer.done():
                continue  # the caller no longer waits
            its_names = one.requests
            if batch and (num_new + len(one.newcomers) > MOST_IN_LOOP or not names.isdisjoint(its_names)):
                self._admit_together(batch)
                batch, names, num_new = [], set(), 0
            batch.append(one)
            names |= its_names
            num_new += len(one.newcomers)
        if batch:
            self._admit_together(batch)

    async def _take_coming_later(self) -> None:
        async with self._planning:
            pass
        self._take_coming()

    def _admit_together(self, batch: Sequence[_Coming]) -> None:
        """Admit several calls together, whose requests have distinct names."""
        fresh, parts = list[Newcomer](), list[tuple[_Coming, list[Newcomer], tuple[str, ...]]]()
        for one in batch:
            try:
                found, stalled = self._begin(one.newcomers, one.finished, one.grown)
            except ServiceError as error:
                one.answer.set_exception(error)
                continue
            parts.append((one, found, stalled))
            fresh += found
        try:
            admission = admit(self.stages, self._loads(), fresh)
            self._add(fresh, admission)
        except Exception as error:
            for one, _, _ in parts:
                one.answer.set_exception(error)
            return
        for one, found, stalled in parts:
            one.answer.set_result(admission.part((newcomer.id for newcomer in found), stalled))

    async def _plan(self, newcomers: Sequence[Newcomer]) -> BatchAdmission:
        """Plan where a batch would be placed, without changing anything; call `_add` before awaiting anything else.

        A large batch is planned in a thread, for the requests that run at that moment. If these have changed in the
        meantime it is planned again, the last time in the event loop, where nothing can change.
        """
        for _ in range(MOST_TRIES if len(newcomers) > MOST_IN_LOOP else 0):
            version = self.version
            admission = await asyncio.to_thread(admit, self.stages, self._loads(), newcomers)
            if version == self.version:
                return admission
        return admit(self.stages, self._loads(), newcomers)

    def _loads(self) -> list[list[DeviceLoad]]:
        return [[copy.state.load() for copy in copies] for copies in self.stages]

    def _add(self, newcomers: Sequence[Newcomer], admission: BatchAdmission) -> None:
        """Add the placed requests to the state for which they were planned."""
        self.version += 1
        for one in newcomers:
            homes = admission.homes.get(one.id, ())
            for home in homes:
                home.copy.admit(one, home.groups)
            if homes:
                self.running[one.id] = RunningRequest(admitted=one, copies=tuple(home.copy for home in homes))

    def finish(self, requests: Iterable[str]) -> None:
        """Remove finished requests; requests that are not running are ignored."""
        self.version += 1
        for request in requests:
            running = self.running.pop(request, None)
            for copy in running.copies if running else ():
                if request in copy.state:
                    copy.finish(request)

    def grow(self, growths: Iterable[pb2.Growth]) -> tuple[str, ...]:
        """Lengthen requests, on all stages or on none; those that do not run, or would become shorter, are ignored.

        Return the requests that were not lengthened for lack of blocks; earlier requests take precedence.
        """
        self.version += 1
        growing, expected = list[tuple[pb2.Growth, int]](), list[pb2.Growth]()
        for growth in growths:
            running = self.running.get(growth.id)
            if running is not None:
                more = growth.context_tokens - running.copies[0].state.context_tokens(growth.id)
                if more > 0:
                    growing.append((growth, more))
                if more >= 0 and growth.HasField("remaining_tokens"):
                    expected.append(growth)
        stalled = self._without_room(growing)
        for copy in self.copies:
            by_tokens: dict[int, list[str]] = {}
            for growth, more in growing:
                if growth.id in copy.state and growth.id not in stalled:
                    by_tokens.setdefault(more, []).append(growth.id)
            for more, names in by_tokens.items():
                left = copy.state.grow(names, more)
                assert not left, "room was counted for all of them"
        for growth in expected:
            if growth.id not in stalled:
                for copy in self.running[growth.id].copies:
                    if copy.state.remaining_tokens(growth.id) != growth.remaining_tokens:
                        copy.state.expect(growth.id, growth.remaining_tokens)
        return tuple(growth.id for growth, _ in growing if growth.id in stalled)

    def _without_room(self, growing: Sequence[tuple[pb2.Growth, int]]) -> set[str]:
        """Return the requests for which some device has no free block, with all stages considered together."""
        needs: dict[str, list[tuple[int, IntArray]]] = {}  # request: (index of the copy, blocks [D])
        copies = list(self.copies)
        room = [copy.state.free_blocks() for copy in copies]
        is_short = False
        for c, copy in enumerate(copies):
            block_tokens = copy.terms.stage.heads.block_tokens
            here = [(growth, more) for growth, more in growing if growth.id in copy.state]
            if not here:
                continue
            after = np.array([growth.context_tokens for growth, _ in here], np.int64)
            before = after - np.array([more for _, more in here], np.int64)
            more_blocks = -(-after // block_tokens) - -(-before // block_tokens)
            blocks = copy.taken([growth.id for growth, _ in here]) * more_blocks[:, None]
            is_short = is_short or bool(np.any(blocks.sum(axis=0) > room[c]))
            for (growth, _), row, crosses in zip(here, blocks, more_blocks.tolist(), strict=True):
                if crosses:
                    needs.setdefault(growth.id, []).append((c, row))
        if not is_short:
            return set()
        stalled = set[str]()
        for growth, _ in growing:
            needed = needs.get(growth.id, [])
            if any(np.any(row > room[c]) for c, row in needed):
                stalled.add(growth.id)
                continue
            for c, row in needed:
                room[c] = room[c] - row
        return stalled

    # --- devices and moves

    def follow(self, conditions: Conditions) -> None:
        """Take over the status of the replica's GPUs.

        Requests that lost KV are forgotten: the engine prefills and admits them again.
        """
        self.version += 1
        gone = set[str]()
        for copy in self.copies:
            gone |= copy.set_conditions(copy.terms.statuses(conditions))
        self.finish(gone)

    def copy_of(self, stage: int, copy: int) -> StageCopy:
        return self.stages[stage][copy]

    def prepare(self, change: change_pb2.Change) -> None:
        """Reserve blocks for the moves of a re-dispatch; the sources keep the head groups until `commit`."""
        self.version += 1
        self.copy_of(change.stage, change.copy).prepare(change)

    def commit(self, change: change_pb2.Change, left_out: Iterable[int]) -> None:
        """Commit a change that the engine has flipped; ``left_out`` are the numbers of moves that it did not make."""
        self.version += 1
        self.copy_of(change.stage, change.copy).commit(change.change_id, left_out)

    def abort(self, change: change_pb2.Change) -> None:
        """Abort a change, of which nothing has moved."""
        self.version += 1
        self.copy_of(change.stage, change.copy).abort(change.change_id)

    # --- messages

    def head_maps(self, requests: Sequence[str] | None = None) -> list[head_map_pb2.HeadMap]:
        """Return the head maps of all running requests, or only of ``requests``."""
        names = list(self.running) if requests is None else requests
        incarnations = {name: self.running[name].admitted.incarnation for name in names}
        return [copy.head_map(incarnations, requests) for copy in self.copies]


def _is_running(given: Newcomer, admitted: Newcomer) -> ServiceError:
    def words(one: Newcomer) -> str:
        return f"incarnation {one.incarnation}, {one.context_tokens} and {one.growth_tokens} tokens"

    message = f"{given.id} is already running, admitted with {words(admitted)}; the call has {words(given)}"
    return ServiceError(Reason.ERROR_REASON_REQUEST_RUNNING, message, metadata={"request": given.id})
