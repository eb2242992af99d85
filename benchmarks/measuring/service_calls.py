"""Latencies of unary planner calls, one after another or several at once."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np

from benchmarks.measuring.service_agents import CONTEXT_TOKENS, balanced_owners, request_of
from hetis.planner.client import AsyncClient, AsyncDispatchStream, CallError
from hetis.planner.convert.stages import stage_from_proto
from hetis.planner.fleet.dispatching.messages import declared as state_declared
from hetis.planner.fleet.dispatching.stage_copy import Newcomer
from hetis.planner.fleet.dispatching.states import DispatchStates
from hetis.runtime.agent.simulated.stage import StageRun
from hetis.v1 import dispatch_service_pb2 as pb
from hetis.v1 import replica_pb2, report_pb2, stage_pb2

ENDED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # when a connection ends, and of a write after it
MOST_REOPENED = 4  # attempts at one step
MOST_FINISHED = 64  # requests in one step
Call = Callable[[list[float]], Awaitable[None]]


class NoRoomError(Exception):
    """A replica took only part of a batch."""

    def __init__(self, missing: int) -> None:
        super().__init__(f"{missing} requests found no room")


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Latencies of calls.

    Attributes:
        seconds: seconds of each call.
        total_s: from the start of the first call to the end of the last.
        failures: errors of the calls that have no seconds.
        began_s: start of each call by the monotonic clock, if `paced` made them.
    """

    seconds: Sequence[float]
    total_s: float
    failures: Sequence[CallError | NoRoomError] = ()
    began_s: Sequence[float] = ()

    @property
    def per_s(self) -> float:
        return len(self.seconds) / self.total_s

    def ms(self, percent: float) -> float:
        return 1e3 * float(np.percentile(self.seconds, percent))


async def timed(call: Call, *, count: int, at_once: int) -> Latencies:
    """Make ``count`` calls, ``at_once`` at a time; each call appends its seconds to the list that it is given."""
    left = iter(range(count))
    seconds = list[float]()

    async def lane() -> None:
        for _ in left:
            await call(seconds)

    began_s = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(at_once)))
    return Latencies(seconds=seconds, total_s=time.perf_counter() - began_s)


async def paced(call: Call, *, per_s: float, seconds: float) -> Latencies:
    """Start calls at a rate, whether or not earlier ones have ended; failed calls are counted."""
    found, failures, running = list[float](), list[CallError | NoRoomError](), set[asyncio.Task[None]]()
    began = list[float]()

    async def one() -> None:
        timed, at_s = list[float](), time.monotonic()
        try:
            await call(timed)
        except (CallError, NoRoomError) as error:
            failures.append(error)
        found.extend(timed)
        began.extend([at_s] * len(timed))

    began_s = time.perf_counter()
    for number in range(max(1, round(per_s * seconds))):
        await asyncio.sleep(max(0.0, began_s + number / per_s - time.perf_counter()))
        task = asyncio.create_task(one())
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return Latencies(seconds=found, total_s=time.perf_counter() - began_s, failures=failures, began_s=began)


def timed_call(call: Callable[[], Awaitable[object]]) -> Call:
    """Return a call that is timed as a whole."""

    async def timed_one(seconds: list[float]) -> None:
        began_s = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - began_s)

    return timed_one


class DispatchedReplica:
    """A replica that the planner dispatches. It admits and finishes batches, so that its state stays the same."""

    def __init__(self, client: AsyncClient, replica: str) -> None:
        self._client, self._replica = client, replica
        self._state_id = ""
        self._numbers = itertools.count()

    async def declare(self, stage: StageRun, generation: int) -> None:
        """Declare the stage's running requests."""
        state = pb.DispatchState(
            name=f"{self._replica}/dispatchState", generation=generation, head_maps=[stage.head_map()]
        )
        request = pb.UpdateDispatchStateRequest(dispatch_state=state)
        self._state_id = (await self._client.dispatch.UpdateDispatchState(request, timeout=10.0)).state_id

    def admitting(self, batch: int) -> Call:
        """Return a call for `timed`: one timed AdmitRequests and one FinishRequests that is not timed."""
        return partial(self._admit_and_finish, batch)

    @asynccontextmanager
    async def streaming(self, batch: int, *, streams: int) -> AsyncIterator[Call]:
        """Yield a call for `timed`: one step of a stream, which also finishes what earlier steps admitted.

        The planner ends all connections after half an hour. A stream that has ended is opened again, and its steps are
        repeated; their time counts from the first attempt.
        """
        async with AsyncExitStack() as stack:
            opened = [
                ReopenedStream(partial(self._client.dispatch_stream, self._replica, self._state_id))
                for _ in range(streams)
            ]
            for stream in opened:
                stack.push_async_callback(stream.close)
            turn = itertools.cycle(opened)
            ended = list[str]()  # admitted by earlier steps, for later ones to finish

            async def step(seconds: list[float]) -> None:
                finished = ended[:MOST_FINISHED]
                del ended[:MOST_FINISHED]
                request = admission(self._replica, self._state_id, self._numbers, batch)
                began_s = time.perf_counter()
                try:
                    answer = await next(turn).step(finished, request.requests)
                except CallError:
                    ended.extend(finished)  # the step may have been done anyway, and finishing twice is no error
                    raise
                finally:
                    ended.extend(one.id for one in request.requests)
                taken_s = time.perf_counter() - began_s
                if len(answer.placements) != batch:
                    raise NoRoomError(batch - len(answer.placements))
                seconds.append(taken_s)

            yield step
            while ended:
                await opened[0].step(ended[:MOST_FINISHED], ())
                del ended[:MOST_FINISHED]

    async def _admit_and_finish(self, batch: int, seconds: list[float]) -> None:
        request = admission(self._replica, self._state_id, self._numbers, batch)
        began_s = time.perf_counter()
        answer = await self._client.dispatch.AdmitRequests(request, timeout=10.0)
        seconds.append(time.perf_counter() - began_s)
        if len(answer.placements) != batch:
            raise NoRoomError(batch - len(answer.placements))
        names = [one.id for one in request.requests]
        finish = pb.FinishRequestsRequest(parent=self._replica, state_id=self._state_id, requests=names)
        await self._client.dispatch.FinishRequests(finish, timeout=10.0)


class ReopenedStream:
    """A dispatch stream that is replaced when its connection ends."""

    def __init__(self, open_stream: Callable[[], AsyncDispatchStream]) -> None:
        self._open = open_stream
        self._stream = open_stream()

    async def step(self, finished: Sequence[str], new: Sequence[pb.NewRequest]) -> pb.DispatchRequestsResponse:
        """Make the step, and repeat it on a new stream whenever the old one ends during it."""
        for left in reversed(range(MOST_REOPENED)):
            stream = self._stream
            try:
                return await stream.step(finished=finished, new=new, timeout=10.0)
            except CallError as error:
                if error.code not in ENDED or not left:
                    raise
                if stream is self._stream:  # only for the first of the steps in progress
                    self._stream = self._open()
                    await stream.close()
        raise AssertionError("unreachable")

    async def close(self) -> None:
        await self._stream.close()


def admission(replica: str, state_id: str, numbers: itertools.count[int], batch: int) -> pb.AdmitRequestsRequest:
    requests = [
        pb.NewRequest(id=f"new-{next(numbers)}", context_tokens=CONTEXT_TOKENS // 8, growth_tokens=64)
        for _ in range(batch)
    ]
    return pb.AdmitRequestsRequest(parent=replica, state_id=state_id, requests=requests)


# --- the same work in this process


@dataclass(frozen=True, slots=True, kw_only=True)
class OneReplica:
    """A replica as dispatch sees it."""

    stages: Sequence[stage_pb2.StageModel]
    name: str = "clusters/c/replicas/r"
    state: replica_pb2.ReplicaState.ValueType = replica_pb2.REPLICA_STATE_SERVING
    generation: int = 1
    authority: replica_pb2.HeadMapAuthority.ValueType = replica_pb2.HEAD_MAP_AUTHORITY_PLANNER
    primary_node: str = "n"
    redispatch: str = ""

    @property
    def conditions(self) -> dict[str, report_pb2.DeviceStatus.ValueType]:
        return {}

    def replica_view(self, name: str) -> Any:
        return self if name == self.name else None


async def in_process_seconds(model: stage_pb2.StageModel, *, batch: int, count: int) -> tuple[float, float]:
    """Return the median seconds of an admission by messages without gRPC, and of its solve alone."""
    replica = OneReplica(stages=[model])
    states = DispatchStates(replica)
    await states.warm_up()
    stage = StageRun(model)
    for number, owners in enumerate(balanced_owners(stage)):
        stage.admit(request_of(number), list(owners))
    declared = pb.DispatchState(
        name=f"{replica.name}/dispatchState", generation=replica.generation, head_maps=[stage.head_map()]
    )
    state_id = (await states.update(pb.UpdateDispatchStateRequest(dispatch_state=declared))).state_id
    numbers = itertools.count()
    whole, alone = list[float](), list[float]()
    for _ in range(count):
        request = admission(replica.name, state_id, numbers, batch)
        began_s = time.perf_counter()
        await states.admit(request)
        whole.append(time.perf_counter() - began_s)
        names = [one.id for one in request.requests]
        states.finish(pb.FinishRequestsRequest(parent=replica.name, state_id=state_id, requests=names))
    terms = stage_from_proto(model)
    copy = state_declared(declared, {(model.stage, model.copy): terms}, state_id).copy_of(model.stage, model.copy)
    newcomers = [
        Newcomer(id=one.id, incarnation=0, context_tokens=one.context_tokens, growth_tokens=one.growth_tokens)
        for one in admission(replica.name, state_id, numbers, batch).requests
    ]
    for _ in range(count):
        began_s = time.perf_counter()
        copy.plan(copy.load(), newcomers)
        alone.append(time.perf_counter() - began_s)
    return float(np.median(whole)), float(np.median(alone))
