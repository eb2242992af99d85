"""The re-dispatch loop: reads reports, requests head maps when something is wrong, and sends changes to correct it.

    report -> sums -> alarm? -> head maps -> triggers -> moves (in a thread) -> those that fit at once -> change
                                                                                    its end -> look again

At most one change of a replica is under way. Looks at a replica are at least ``redispatch_interval`` apart; each
aborted change doubles the interval.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from hetis.planner.convert.names import cluster_of, duration, timestamp
from hetis.planner.convert.stages import triggers_to_proto
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.agents.head_maps import HeadMaps
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.redispatching.planning import FoundMoves, StageLook, StagePlanner
from hetis.planner.fleet.redispatching.watched import Place, WatchedReplica
from hetis.planner.fleet.settings import RedispatchPolicy, policy_from
from hetis.planner.fleet.views import Clock, FleetObserver, LiveReplica
from hetis.planner.threads import run_in_daemon_thread
from hetis.solver.errors import HetisError
from hetis.solver.redispatch.redispatcher import compile_redispatch
from hetis.v1 import change_pb2, redispatch_pb2, replica_pb2, report_pb2

READ_TIMEOUT_S = 10.0
SOLVE_BUDGET_S = 10.0  # an older state is no basis for moves
_WATCHED = (replica_pb2.REPLICA_STATE_SERVING, replica_pb2.REPLICA_STATE_DEGRADED)
_log = logging.getLogger("hetis.planner.redispatching")


class RedispatchLoop(FleetObserver):
    """Run `run` once; it repeats `step`, which does all work that is due."""

    def __init__(self, fleet: LiveFleet, *, clock: Clock) -> None:
        self._fleet, self._clock = fleet, clock
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="redispatch")
        self._watched: dict[str, WatchedReplica] = {}
        self._wake = asyncio.Event()

    # --- FleetObserver

    def replica_reported(self, replica: str, report: report_pb2.ReplicaReport) -> None:
        """Handle a report of one of a replica's nodes. Takes microseconds unless something is wrong."""
        if not report.is_primary or not report.stages:
            return
        found = self._watched_replica(replica)
        if found is None:
            return
        watched, policy = found
        watched.report(report, policy)
        if watched.is_wanted:
            self._wake.set()

    def replica_changed(self, replica: str) -> None:
        """Handle a change of a replica's state, generation or conditions."""
        found = self._watched_replica(replica)
        if found is not None and found[0].is_wanted:
            self._wake.set()

    def redispatch_ended(self, redispatch: redispatch_pb2.Redispatch) -> None:
        """Look again, since moves that had to wait for room may have it now."""
        watched = self._watched.get(redispatch.replica)
        was_aborted = redispatch.state != redispatch_pb2.REDISPATCH_STATE_DONE
        if watched is None or not watched.end(redispatch.name, was_aborted=was_aborted):
            return
        view = self._fleet.replica_view(redispatch.replica)
        if was_aborted and view is not None:
            policy = policy_from(RedispatchPolicy, self._fleet.policy_of(cluster_of(view.name)))
            watched.put_off(policy, now_s=self._clock.monotonic())
        self._wake.set()

    # --- due work

    async def run(self) -> None:
        looks = set[asyncio.Task[None]]()

        def has_looked(look: asyncio.Task[None]) -> None:
            looks.discard(look)
            self._wake.set()

        try:
            # First of all, since a compilation would use up the time limit of a solve.
            await run_in_daemon_thread(compile_redispatch, name="kernels of re-dispatch")
            while True:
                for look in self._begin_due():
                    looks.add(look)
                    look.add_done_callback(has_looked)
                self._wake.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._next_s())
        finally:
            for look in looks:
                look.cancel()
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def step(self) -> None:
        """Look at every replica that is due, and wait until all looks are done."""
        await asyncio.gather(*self._begin_due())

    def _begin_due(self) -> list[asyncio.Task[None]]:
        """Start a task for each replica that is due, so that an engine that does not answer delays no other."""
        now_s = self._clock.monotonic()
        due = [
            (name, watched)
            for name, watched in self._watched.items()
            if watched.can_be_looked_at and now_s >= watched.not_before_s
        ]
        for _, watched in due:
            watched.begin_look()
        return [
            asyncio.create_task(self._look_safely(name, watched), name=f"a look at {name}") for name, watched in due
        ]

    def _next_s(self) -> float | None:
        """Return the seconds until the next look is due, or None if no replica waits for one."""
        waits = [one.not_before_s for one in self._watched.values() if one.can_be_looked_at]
        return max(0.0, min(waits) - self._clock.monotonic()) if waits else None

    async def _look_safely(self, name: str, watched: WatchedReplica) -> None:
        try:
            await self._look(name)
        except HetisError as error:
            _log.warning("%s could not be checked for a re-dispatch: %s", name, error)
        except Exception:
            _log.exception(
                "checking %s for a re-dispatch failed", name
            )  # must not end the loop, which serves all replicas
        finally:
            watched.end_look()

    async def _look(self, name: str) -> None:
        """Look at the stages of a replica by urgency until one has moves, and send them."""
        found = self._watched_replica(name)
        if found is None:
            return
        watched, policy = found
        view = self._fleet.replica_view(name)
        if view is None or view.redispatch:
            watched.put_off(policy, now_s=self._clock.monotonic())  # under way, but begun by an earlier planner
            return
        if not watched.by_urgency():
            watched.want_look(False)
            return
        watched.put_off(policy, now_s=self._clock.monotonic())
        maps = await self._head_maps(view)
        watched.want_look(False)
        if maps is None:
            return
        by_place = {(one.stage, one.copy): one for one in maps.maps}
        for place in watched.by_urgency():
            if place not in by_place:
                continue
            stage = watched.stages[place]
            seen, finished = stage.changed, watched.num_finished
            look = StageLook(
                head_map=by_place[place], terms=stage.terms, conditions=view.conditions, changed=seen, policy=policy
            )
            moves = None
            try:
                moves = await self._solve_in_thread(stage.planner, look)
            except HetisError as error:  # the map contradicts itself: the same as no answer
                _log.warning("%s, stage %s, copy %s: %s", name, *place, error)
            is_change = moves is not None and not policy.is_advisory
            stage.looked(seen=seen, num_finished=finished, moved=is_change)
            if moves is not None:
                await self._send(view, watched, self._redispatch_of(view, place, maps.generation, moves, policy))
                if is_change:
                    return

    async def _send(self, view: LiveReplica, watched: WatchedReplica, redispatch: redispatch_pb2.Redispatch) -> None:
        if redispatch.state == redispatch_pb2.REDISPATCH_STATE_ADVISED:
            await self._fleet.redispatch(redispatch)
            return
        now = self._fleet.replica_view(view.name)
        if now is None or now.redispatch or now.generation > redispatch.change.base_generation:
            watched.want_look()  # the replica has changed in the meantime
            return
        watched.begin(redispatch.name)
        try:
            await self._fleet.redispatch(redispatch)
        except BaseException:
            # One that has begun is stored with the fleet's next decisions, and `redispatch_ended` reports how it ended.
            if not self._fleet.is_under_way(redispatch):
                watched.end(redispatch.name, was_aborted=None)
            raise

    # --- internals

    async def _head_maps(self, view: LiveReplica) -> HeadMaps | None:
        try:
            return await self._fleet.read_head_maps(view.name, READ_TIMEOUT_S)
        except (ServiceError, TimeoutError) as error:
            _log.warning("the head maps of %s cannot be read: %s", view.name, error)
            return None

    async def _solve_in_thread(self, planner: StagePlanner, look: StageLook) -> FoundMoves | None:
        loop = asyncio.get_running_loop()
        try:
            looking = loop.run_in_executor(self._threads, partial(planner.look, look))
            return await asyncio.wait_for(looking, SOLVE_BUDGET_S)
        except TimeoutError:
            _log.warning("the search for a re-dispatch was abandoned after %s s", SOLVE_BUDGET_S)
            return None

    def _watched_replica(self, name: str) -> tuple[WatchedReplica, RedispatchPolicy] | None:
        """Return the state kept for a replica and its policy, or None if it is not to be watched now."""
        view = self._fleet.replica_view(name)
        if view is None or not view.stages:
            self._watched.pop(name, None)
            return None
        policy = policy_from(RedispatchPolicy, self._fleet.policy_of(cluster_of(view.name)))
        if policy.is_off or view.state not in _WATCHED:
            return None
        watched = self._watched.get(name)
        if watched is None or not watched.is_of(view.stages):
            watched = self._watched[name] = WatchedReplica(view.stages)
        watched.set_conditions(view)
        return watched, policy

    def _redispatch_of(
        self, view: LiveReplica, place: Place, base_generation: int, found: FoundMoves, policy: RedispatchPolicy
    ) -> redispatch_pb2.Redispatch:
        change_id = str(uuid.uuid4())
        created = timestamp(self._clock.time())
        plan, begins = found.plan, redispatch_pb2.REDISPATCH_STATE_PREPARING
        state = redispatch_pb2.REDISPATCH_STATE_ADVISED if policy.is_advisory else begins
        return redispatch_pb2.Redispatch(
            name=f"{cluster_of(view.name)}/redispatches/{change_id}",
            replica=view.name,
            triggers=triggers_to_proto(found.fired),
            change=change_pb2.Change(
                change_id=change_id,
                replica=view.name,
                stage=place[0],
                copy=place[1],
                base_generation=base_generation,
                generation=base_generation + 1,  # the fleet replaces it, since it knows which generations are unused
                moves=found.moves,
                prepare_timeout=duration(policy.prepare_timeout_s),
            ),
            num_moves=len(found.moves),
            kv_bytes=sum(move.kv_bytes for move in found.moves),
            makespan_before_s=found.makespan_before_s,
            makespan_after_s=found.makespan_after_s,
            bound_s=plan.bound_s,
            objective_s=plan.objective_s,
            stay_s=plan.stay_s,
            short_blocks_before=plan.short_before,
            short_blocks_after=plan.short_after,
            state=state,
            create_time=created,
            end_time=created if policy.is_advisory else None,
        )
