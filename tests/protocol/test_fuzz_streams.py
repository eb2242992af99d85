"""Any valid message in the middle of a stream or a call has a documented answer, and service continues.

`tests/planner/service/test_fuzz.py` sends random bytes and messages to every rpc of a whole planner; here they follow
the messages that give them a meaning: a good Hello, an assignment, a change in progress. Hypothesis draws the seeds.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.simulated_engine.engine import SimulatedEngine
from hetis.planner import callers
from hetis.planner.failures import ServiceError
from hetis.runtime.moves.refusals import RefusedError
from hetis.v1 import agent_service_pb2 as pb
from hetis.v1 import executor_service_pb2 as executor
from hetis.v1.failure_pb2 import Failure
from tests.planner.fleet.samples import CLUSTER, REPLICA
from tests.protocol.messages import UUIDS, random_message
from tests.protocol.planner_host import NODES
from tests.protocol.world import World
from tests.runtime.agent.builders import Bench, assignment, welcome

SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


class Errors(logging.Handler):
    """Yield the messages that are logged as errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


@pytest.fixture(scope="module")
def errors() -> Iterator[Errors]:
    handler = Errors()
    logging.getLogger("hetis").addHandler(handler)
    yield handler
    logging.getLogger("hetis").removeHandler(handler)


@pytest.fixture(autouse=True)
def loud() -> None:
    """Undo `quiet`, since these tests look for errors."""
    logging.getLogger("hetis").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A serving world; each test leaves it serving, or at least alive."""
    with World(3) as made:
        made.serve()
        yield made


def hello(dice: random.Random, node: str) -> pb.ConnectNodeRequest:
    """Return a Hello that is valid, or nearly so."""
    request = pb.ConnectNodeRequest(sequence=1)
    made = random_message(pb.Hello.DESCRIPTOR, dice)
    assert isinstance(made, pb.Hello)
    request.hello.CopyFrom(made)
    good = request.hello
    good.node, good.agent_version, good.boot_id = f"{CLUSTER}/nodes/{node}", "1", UUIDS[0]
    good.protocol_version = good.min_protocol_version = 1
    good.inventory_digest, good.newest_epoch = "sha256:0", 0
    for held in good.replicas:
        held.epoch = 0
    return request


def spoken(dice: random.Random, epoch: int) -> Iterator[pb.ConnectNodeRequest]:
    for number in range(dice.randrange(1, 25)):
        made = random_message(pb.ConnectNodeRequest.DESCRIPTOR, dice)
        assert isinstance(made, pb.ConnectNodeRequest)
        made.epoch = dice.choice((epoch, epoch, epoch, made.epoch))
        made.sequence = dice.choice((number + 2, made.sequence))
        if made.WhichOneof("message") == "hello" and dice.random() < 0.8:
            made.change_status.change_id = dice.choice(UUIDS)
            made.change_status.replica = REPLICA
            made.change_status.phase = dice.choice((1, 2, 3, 4, 5))  # type: ignore[assignment]
        yield made


@given(seed=SEEDS)
@settings(FEW)
def test_the_fleet_takes_or_refuses_whatever_an_agent_says(world: World, errors: Errors, seed: int) -> None:
    dice = random.Random(seed)
    errors.found.clear()
    assert world.planner is not None
    fleet, epoch = world.planner.fleet, world.planner.epoch

    async def speak() -> None:
        requests: asyncio.Queue[pb.ConnectNodeRequest | None] = asyncio.Queue()
        requests.put_nowait(hello(dice, dice.choice(NODES)))

        async def stream() -> AsyncIterator[pb.ConnectNodeRequest]:
            while (request := await requests.get()) is not None:
                yield request

        responses = fleet.connect(callers.ANYBODY, stream())
        try:
            async for response in responses:
                nonce = response.delta.nonce
                if response.HasField("welcome"):
                    for request in spoken(dice, epoch):
                        requests.put_nowait(request)
                    requests.put_nowait(None)
                elif nonce and dice.random() < 0.5:
                    requests.put_nowait(
                        pb.ConnectNodeRequest(epoch=epoch, ack=pb.DeltaAck(nonce=nonce, replica=REPLICA))
                    )
        except ServiceError as error:
            codes.append(error.code)
        finally:
            await responses.aclose()

    codes: list[grpc.StatusCode] = []
    world.loop.run(speak())
    assert not set(codes) & {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}, codes
    world.loop.advance(5.0)
    assert not errors.found, errors.found[0]
    assert not world.loop.failures, world.loop.failures


@given(seed=SEEDS)
@settings(FEW)
def test_an_agent_takes_or_refuses_whatever_a_planner_says(seed: int) -> None:
    dice = random.Random(seed)
    bench = Bench(node="p")
    bench.connect()
    if dice.random() < 0.7:
        delta = pb.Delta(nonce="n", replica=REPLICA, generation=1, assignment=assignment())
        delta.assignment.replica = REPLICA
        bench.hear(pb.ConnectNodeResponse(epoch=1, delta=delta))
    for _ in range(dice.randrange(1, 25)):
        made = random_message(pb.ConnectNodeResponse.DESCRIPTOR, dice)
        assert isinstance(made, pb.ConnectNodeResponse)
        made.epoch = dice.choice((1, 1, 1, 2, made.epoch))
        if made.HasField("delta"):
            made.delta.replica, made.delta.nonce = REPLICA, made.delta.nonce or "n"
        bench.hear(made)
        for number in list(bench.calls):
            if dice.random() < 0.5:
                del bench.calls[number]
                bench.do(bench.core.answered(number, _failure(dice), bench.now_s))
        bench.tick(dice.choice((0.0, 1.0, 100.0)))
        if bench.ended:
            bench.ended.clear()
            bench.core.stream_ended()
            bench.core.hello()
            bench.hear(welcome(max(bench.core.newest_epoch, 1)))
    for part, body in bench.disk.items():
        assert body, part
    bench.boot()
    assert not bench.core.damaged, bench.core.damaged


def _failure(dice: random.Random) -> Any:
    return random_message(Failure.DESCRIPTOR, dice)


@given(seed=SEEDS)
@settings(FEW)
def test_a_simulated_engine_does_or_refuses_whatever_it_is_asked(seed: int) -> None:
    dice = random.Random(seed)
    engine = SimulatedEngine("p", 1)
    now_s, refusals = 0.0, []
    engine.apply_assignment(executor.ApplyAssignmentRequest(epoch=1, generation=1, assignment=assignment()), now_s)
    calls: list[tuple[Any, Any]] = [
        (engine.reserve_moves, executor.ReserveMovesRequest),
        (engine.copy_moves, executor.CopyMovesRequest),
        (engine.flip_moves, executor.FlipMovesRequest),
        (engine.release_moves, executor.ReleaseMovesRequest),
        (engine.abort_moves, executor.AbortMovesRequest),
    ]
    for _ in range(20):
        call, kind = dice.choice(calls)
        request = random_message(kind.DESCRIPTOR, dice)
        request.epoch = dice.choice((1, 1, request.epoch % 2**62))  # type: ignore[attr-defined]
        try:
            call(request, now_s)
        except RefusedError as refused:
            refusals.append(refused.failure.reason)
        now_s += dice.choice((0.0, 0.1, 5.0))
        engine.step(now_s)
        engine.report(now_s)
    assert all(refusals), "a refusal without a reason"
