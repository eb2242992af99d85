"""A planner process that moves head groups all the time, with the real fleet, store and server, and a re-dispatch loop
that needs no trigger: ``python -m tests.protocol.planner_process FILE PORT SEED``. It prints what it has acknowledged.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
import uuid
from typing import Any

import grpc

from hetis.planner import callers
from hetis.planner.convert.names import duration
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.settings import FleetSettings
from hetis.planner.service import statuses
from hetis.planner.store import Store
from hetis.v1 import change_pb2, head_map_pb2, redispatch_pb2
from hetis.v1.agent_service_pb2_grpc import AgentServiceServicer, add_AgentServiceServicer_to_server
from tests.planner.fleet.samples import CLUSTER, REPLICA
from tests.protocol.planner_host import SampleStages

SETTINGS = FleetSettings(heartbeat_s=0.5, suspect_s=3.0, lease_s=6.0, answer_s=1.0, min_report_s=0.2, reconnect_s=0.5)


class _Clock:
    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()


class _Servicer(AgentServiceServicer):
    """The servicer as behind the interceptor: a caller is set, and errors become statuses."""

    def __init__(self, fleet: LiveFleet) -> None:
        self._fleet = fleet

    async def ConnectNode(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        try:
            async for response in self._fleet.connect(callers.ANYBODY, request_iterator):
                yield response
        except ServiceError as error:
            await statuses.abort(context, statuses.to_status(error))


async def serve(file: str, port: int, dice: random.Random) -> None:
    store = await Store.open(f"sqlite:///{file}")
    epoch = await store.leadership.grant("test")
    fleet = LiveFleet(store, Hubs(epoch), epoch=epoch, settings=SETTINGS, clock=_Clock(), plans=SampleStages())
    await fleet.start()
    server = grpc.aio.server()
    add_AgentServiceServicer_to_server(_Servicer(fleet), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    while True:
        await asyncio.sleep(dice.uniform(0.0, 0.1))
        try:
            maps = await fleet.read_head_maps(REPLICA, 2.0)
            change_id = await _move(fleet, maps, dice)
        except ServiceError:
            continue
        if change_id:
            print(f"kept {change_id}", flush=True)


async def _move(fleet: LiveFleet, maps: Any, dice: random.Random) -> str:
    """Move a head group of some request; return the change's id once it is stored."""
    (head_map,) = maps.maps
    if not head_map.requests:
        return ""
    names = [device.name for device in head_map.devices]
    moves: list[head_map_pb2.Move] = []
    for request in dice.sample(list(head_map.requests), min(3, len(head_map.requests))):
        group = dice.randrange(len(request.owners))
        source = names[request.owners[group]]
        moves.append(
            head_map_pb2.Move(
                number=len(moves),
                request=request.id,
                incarnation=request.incarnation,
                head_groups=[group],
                source=source,
                target=dice.choice([name for name in names if name != source]),
                kv_bytes=dice.choice([0.0, 5e8]),
                together=group,
                reason=head_map_pb2.MOVE_REASON_BALANCE,
            )
        )
    change_id = str(uuid.uuid4())
    body = redispatch_pb2.Redispatch(
        name=f"{CLUSTER}/redispatches/{change_id}",
        replica=REPLICA,
        num_moves=len(moves),
        change=change_pb2.Change(
            change_id=change_id,
            replica=REPLICA,
            base_generation=maps.generation,
            moves=moves,
            prepare_timeout=duration(3.0),
        ),
    )
    await fleet.redispatch(body)
    return change_id


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))))
