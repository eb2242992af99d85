"""Certificates and tokens that are renewed while a client runs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hetis.planner.callers import CallerRole, Identity
from hetis.planner.client import AsyncClient, CallError, Client, Connection, Retries
from hetis.planner.service.identity.credentials import Credentials, Grant, Tokens, digest
from hetis.v1 import plan_pb2, plan_service_pb2
from tests.certificates import Authority, Signed, write
from tests.planner.service.serving import Served, served
from tests.planner.service.test_tls import certificates

GET = plan_service_pb2.GetPlanRequest(name="plans/p")
DAY_S = 86_400.0


@dataclass(kw_only=True)
class Renewing:
    """A planner that asks for certificates, and a client's files for it. Its clock decides what has expired."""

    planner: Served
    folder: Path
    authority: Authority
    now_s: list[float] = field(default_factory=lambda: [time.time()])

    @property
    def connection(self) -> Connection:
        return Connection(
            address=self.planner.address,
            ca=self.folder / "ca.pem",
            cert=self.folder / "client.pem",
            key=self.folder / "client.key",
        )

    def signed(self, name: str, *, days: float = 1.0) -> Signed:
        return self.authority.client(f"spiffe://hetis/viewer/{name}", until=datetime.now(UTC) + timedelta(days=days))

    def write(self, signed: Signed) -> None:
        write(self.folder, signed, name="client")

    def pass_days(self, days: float) -> None:
        self.now_s[0] += days * DAY_S
        self.planner.calls.end_revoked_streams()


@asynccontextmanager
async def renewing(folder: Path) -> AsyncIterator[Renewing]:
    authority, now_s = Authority(), [time.time()]
    async with served(
        authenticator=Credentials(tokens=None, trust_domain="hetis", clock=lambda: now_s[0]),
        server_credentials=certificates(folder, authority, asks_clients=True).credentials(),
    ) as planner:
        found = Renewing(planner=planner, folder=folder, authority=authority, now_s=now_s)
        found.write(found.signed("old"))
        yield found


async def watched(client: Client | AsyncClient) -> AsyncIterator[Any]:
    """Yield the events of a watch of either client."""
    if isinstance(client, AsyncClient):
        async for event in client.watch_plan(GET.name):
            yield event
        return
    events: Iterator[Any] = client.watch_plan(GET.name)
    while True:
        yield await asyncio.to_thread(lambda: next(events))


async def name_of(client: AsyncClient) -> str:
    return (await client.plans.GetPlan(GET, timeout=5)).plan.labels["by"].rpartition("/")[2]


@pytest.mark.parametrize("client_type", [Client, AsyncClient])
async def test_a_watch_goes_on_with_the_certificate_that_replaced_an_expired_one(
    client_type: type[Client] | type[AsyncClient], tmp_path: Path
) -> None:
    async with renewing(tmp_path) as at:
        client = client_type(at.connection)
        events = watched(client)
        await anext(events)
        at.write(at.signed("new", days=3))
        at.pass_days(2)
        assert (await anext(events)).plan.name == GET.name  # which a stream tells when it is opened
        if isinstance(client, AsyncClient):
            assert await name_of(client) == "new"
            await client.close()
        else:
            await asyncio.to_thread(client.close)


async def test_a_watch_ends_where_no_newer_certificate_is(tmp_path: Path) -> None:
    async with renewing(tmp_path) as at, AsyncClient(at.connection) as client:
        events = watched(client)
        await anext(events)
        at.pass_days(2)
        with pytest.raises(CallError, match="the client certificate has expired") as caught:
            await anext(events)
        assert caught.value.reason == "CREDENTIALS"


async def test_a_watch_whose_new_certificate_is_refused_too_ends_with_the_refusal(tmp_path: Path) -> None:
    async with renewing(tmp_path) as at, AsyncClient(at.connection) as client:
        events = watched(client)
        await anext(events)
        at.write(at.signed("new"))
        at.pass_days(2)
        with pytest.raises(CallError, match="the client certificate has expired"):
            await anext(events)


async def test_half_written_and_missing_files_keep_the_certificate_and_what_has_begun_keeps_its_channel(
    tmp_path: Path,
) -> None:
    async with renewing(tmp_path) as at, AsyncClient(at.connection) as client:
        events = watched(client)
        await anext(events)
        assert await name_of(client) == "old"
        new = at.signed("new")
        (tmp_path / "client.pem").write_bytes(new.certificate)  # its key is yet to come
        assert await name_of(client) == "old"
        (tmp_path / "client.key").write_bytes(new.key[:90])
        assert await name_of(client) == "old"
        os.unlink(tmp_path / "client.key")
        assert await name_of(client) == "old"
        (tmp_path / "client.key").write_bytes(new.key)
        assert await name_of(client) == "new"
        at.planner.planner.plans.hub.publish("plans/p", plan_pb2.Plan(name="plans/news"), now_s=0.0)
        assert (await anext(events)).plan.name == "plans/news"


@pytest.mark.parametrize("meanwhile", ["", None, "two lines\nof it"])
async def test_a_watch_goes_on_with_the_token_that_replaced_a_revoked_one(
    meanwhile: str | None, tmp_path: Path
) -> None:
    old, new = (f"hetis_{letter * 43}" for letter in "on")
    file = tmp_path / "token"
    valid = [old]

    def tokens() -> Tokens:
        viewer = Identity(name="v", roles=CallerRole.VIEWER.includes)
        return Tokens({digest(token): Grant(identity=viewer, expires_s=time.time() + DAY_S) for token in valid})

    credentials = Credentials(tokens=tokens, trust_domain=None, clock=time.time)
    async with served(authenticator=credentials) as planner:
        file.write_text(old)
        async with AsyncClient(planner.address, token_file=file, retries=lambda: Retries(limit_s=5)) as client:
            events = watched(client)
            await anext(events)
            if meanwhile is None:
                os.unlink(file)
            else:
                file.write_text(meanwhile)
            assert (await client.plans.GetPlan(GET, timeout=5)).plan.labels["by"] == "v"
            file.write_text(new)
            valid[:] = [new]
            planner.calls.end_revoked_streams()
            assert (await anext(events)).plan.name == GET.name
