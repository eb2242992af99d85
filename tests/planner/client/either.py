"""Sync and aio clients behind one interface, so that a test is written once for both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import pytest

from hetis.planner.client import AsyncClient, Client

Kind: TypeAlias = type[Client] | type[AsyncClient]
EITHER = pytest.mark.parametrize("kind", [Client, AsyncClient])


@asynccontextmanager
async def opened(kind: Kind, address: str, **settings: Any) -> AsyncIterator[Any]:
    """Open a client that does not wait between tries."""
    client = kind(address, sleep=_no_aio_sleep if kind is AsyncClient else lambda _: None, **settings)  # type: ignore[arg-type]
    try:
        yield client
    finally:
        await done(client.close())


async def _no_aio_sleep(_: float) -> None:
    await asyncio.sleep(0)


async def done(call: Any) -> Any:
    """Return the result of a call by either client."""
    return await call if inspect.isawaitable(call) else call


async def items(client: Any, stream: Any) -> AsyncIterator[Any]:
    """Yield what either client yields."""
    if isinstance(client, AsyncClient):
        async for item in stream:
            yield item
    else:
        for item in stream:
            yield item
