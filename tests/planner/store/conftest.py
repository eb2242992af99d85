"""Stores to test: an SQLite file, and a database of a PostgreSQL server that the tests start."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import hetis.planner.store.lease as lease
from hetis.planner.store import Store
from tests.faults.proxy import Proxy
from tests.planner.store.postgres import find_binaries, new_database, running_server

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def epochs_from_one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new stores begin with epoch 1 instead of the clock, so that tests may count; not with ``epochs_of_clock``."""
    if "epochs_of_clock" not in request.fixturenames:
        monkeypatch.setattr(lease, "begin_at", lambda *_: None)


@pytest.fixture
def epochs_of_clock() -> None:
    """Let new stores begin with an epoch of the clock, as they do outside tests."""


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    if find_binaries() is None:
        pytest.skip("PostgreSQL (initdb, postgres) is not installed: the store is not tested with it")
    with running_server() as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    return new_database(postgres_server, f"hetis{next(_numbers)}")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/hetis.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """A store of each kind: a test with this fixture runs with both."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    return str(request.getfixturevalue(name))


class Stores(AsyncExitStack):
    """Opens stores, which are closed after the test."""

    async def open(self, url: str, **settings: Any) -> Store:
        store = await Store.open(url, **settings)
        self.push_async_callback(store.close)
        return store

    async def leading(self, url: str, *, holder: str = "test", **settings: Any) -> Store:
        """Open a store and let it be granted the term, which is not announced yet."""
        store = await self.open(url, **settings)
        await store.leadership.grant(holder)
        return store

    async def announced(self, url: str, **settings: Any) -> Store:
        store = await self.leading(url, **settings)
        await store.leadership.promote()
        return store


@pytest.fixture
def stores() -> Stores:
    return Stores()


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[Proxy]:
    found = sa.make_url(postgres_url)
    assert found.host is not None
    assert found.port is not None
    with Proxy((found.host, found.port)) as proxy:
        yield proxy
