"""Strangers, in a process of their own: callers without a token, and calls whose message never comes.

    python -m tests.faults.strangers HOST:PORT,HOST:PORT --per-s N --seconds S

prints the number of calls by outcome as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import grpc

CONNECTIONS = 31  # of the attack that once kept everybody out
SILENT = 200  # calls at once to a service open to all whose message never comes, twice what a host may have
GET_PLAN, CHECK = "/hetis.v1.PlanService/GetPlan", "/grpc.health.v1.Health/Check"


async def attack(addresses: list[str], *, per_s: float, seconds: float) -> Counter[str]:
    """Call as fast as ``per_s`` until the time is over, and return the calls by their status."""
    found, end_s = Counter[str](), time.monotonic() + seconds

    async def call(channel: grpc.aio.Channel) -> None:
        pause_s = CONNECTIONS / per_s
        while time.monotonic() < end_s:
            try:
                await channel.unary_unary(GET_PLAN)(b"", timeout=5)
                found["ANSWERED"] += 1
            except grpc.aio.AioRpcError as error:
                found[error.code().name] += 1
            await asyncio.sleep(pause_s)

    async def be_silent(channel: grpc.aio.Channel) -> None:
        while time.monotonic() < end_s:
            silent: Any = channel.stream_stream(CHECK)(timeout=60)
            code = await silent.code()
            found[f"silent {code.name}"] += 1
            await asyncio.sleep(1.0)

    async with AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(addresses[n % len(addresses)], options))
            for n in range(CONNECTIONS)
        ]
        tasks = [asyncio.create_task(call(channel)) for channel in channels]
        tasks += [asyncio.create_task(be_silent(channels[n % CONNECTIONS])) for n in range(SILENT)]
        await asyncio.wait(tasks, timeout=max(0.0, end_s + 5 - time.monotonic()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("addresses")
    parser.add_argument("--per-s", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(attack(given.addresses.split(","), per_s=given.per_s, seconds=given.seconds))))


if __name__ == "__main__":
    main()
