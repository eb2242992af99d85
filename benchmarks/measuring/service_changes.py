"""The duration of a re-dispatch, from the report that shows the need to the end of the change.

Scripted engines act at once, so what remains is the time of the planner and the network. The replica is one cell: a
primary and eight attention workers, hence nine agents. For every sample, new requests replace those of its head map,
and every third of them has its head groups on the eight workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measuring.service_agents import ScriptedAgent, balanced_owners, request_of
from hetis.planner.client import AsyncClient
from hetis.runtime.agent.simulated.stage import StageRun
from hetis.v1 import agent_service_pb2 as pb
from hetis.v1 import cluster_service_pb2, redispatch_pb2

PAUSE_S = 1.1  # between samples: a replica is checked every half second, and again after a change
GIVE_UP_S = 20.0
MISPLACED_EVERY = 3  # requests


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeTimes:
    """Seconds since the report was written.

    Attributes:
        asked_s: the planner asks for the head map.
        prepare_s: the first node is told to prepare; before that, the change is solved and stored.
        commit_s: the primary is permitted to flip.
        resolved_s: the first node is told that the change was flipped.
        done_s: the change is stored as DONE.
        moves: number of moves of the change.
    """

    asked_s: float
    prepare_s: float
    commit_s: float
    resolved_s: float
    done_s: float
    moves: int


class CellUnderStress:
    """The connected agents of a cell that serve a replica, the primary's first."""

    def __init__(self, agents: Sequence[ScriptedAgent], client: AsyncClient) -> None:
        self._agents, self._client = agents, client
        self._number = 0
        for agent in agents:
            agent.heard = self._hear

    async def sample(self) -> ChangeTimes | None:
        """Make one change, or return None if the planner made none."""
        await asyncio.sleep(PAUSE_S)
        stage = self._agents[0].stage
        assert stage is not None, "the cell has no assignment yet"
        self._number += 1
        self._agents[0].num_finished += len(stage.requests)
        skew(stage, f"s{self._number}-")
        self._first: dict[str, float] = {}
        self._change_id, self._moves = "", 0
        self._resolved = asyncio.Event()
        began_s, began_unix_s = time.perf_counter(), time.time()
        await self._agents[0].report_stage()
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await self._resolved.wait()
                end_unix_s = await self._end()
        except TimeoutError:
            return None
        at = {kind: moment - began_s for kind, moment in self._first.items()}
        return ChangeTimes(
            asked_s=at["head_map_of"],
            prepare_s=at["prepare"],
            commit_s=at["commit"],
            resolved_s=at["resolved"],
            done_s=end_unix_s - began_unix_s,
            moves=self._moves,
        )

    def _hear(self, message: pb.ConnectNodeResponse) -> None:
        kind: str | None = message.delta.WhichOneof("change") or message.state_request.WhichOneof("subject")
        if kind is None:
            return
        self._first.setdefault(kind, time.perf_counter())
        if kind == "prepare":
            change = message.delta.prepare.change
            self._change_id, self._moves = change.change_id, len(change.moves)
        elif kind == "resolved":
            self._resolved.set()

    async def _end(self) -> float:
        """Return when the planner's clock, which is this machine's, recorded the change as DONE."""
        name = f"{self._agents[0].cluster}/redispatches/{self._change_id}"
        while True:
            answer = await self._client.clusters.GetRedispatch(cluster_service_pb2.GetRedispatchRequest(name=name))
            found = answer.redispatch
            if found.state == redispatch_pb2.REDISPATCH_STATE_DONE:
                return found.end_time.seconds + found.end_time.nanos / 1e9
            if found.state == redispatch_pb2.REDISPATCH_STATE_ABORTED:
                raise RuntimeError(f"a change was aborted: {found.failure}")
            await asyncio.sleep(0.02)


def skew(stage: StageRun, prefix: str) -> None:
    """Replace the requests; some get a head group on every worker, although the primary has room and is faster."""
    for name in list(stage.requests):
        stage.drop(name)
    workers = [i for i, device in enumerate(stage.model.devices) if not device.is_primary]
    for number, owners in enumerate(balanced_owners(stage)):
        is_misplaced = number % MISPLACED_EVERY == 0
        misplaced = [workers[group % len(workers)] for group in range(len(owners))]
        stage.admit(request_of(number, prefix), misplaced if is_misplaced else list(owners))
