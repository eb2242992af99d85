"""Stores are opened, migrated or refused; what is refused is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from hetis.planner.store import Store, StoreError, lease, opening, records, schema
from hetis.planner.store.copying import migrate_to
from tests.planner.store import samples
from tests.planner.store.conftest import Stores
from tests.planner.store.test_store import _open_and_close


def test_the_migrations_lead_to_the_tables_that_the_code_means(url: str) -> None:
    asyncio.run(_open_and_close(url))
    engine = sa.create_engine(opening.parse_url(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, records.metadata)
    engine.dispose()
    assert differences == []


def test_versions_are_one_line_in_the_order_of_their_files() -> None:
    script = ScriptDirectory(str(Path(schema.__file__).parent / "migrations"))
    assert [one.revision for one in script.walk_revisions()][::-1] == schema.revisions()


def test_only_a_migration_loads_alembic(tmp_path: Path) -> None:
    opens = f"""
import asyncio, sys
from hetis.planner.store import Store

async def main():
    store = await Store.open("sqlite:///{tmp_path}/hetis.db")
    await store.close()

asyncio.run(main())
print("alembic" in sys.modules)
"""
    told = [subprocess.check_output([sys.executable, "-c", opens], text=True) for _ in range(2)]
    assert told == ["True\n", "False\n"]


async def test_a_planner_waits_for_the_migration_of_another_however_long_that_takes(postgres_url: str) -> None:
    engine = sa.create_engine(opening.parse_url(postgres_url))
    with engine.begin() as migrating:
        schema.lock_out_others(migrating)
        # By this clock, 100 s pass in a second, which is far beyond the limit for an answer in a term.
        opened = asyncio.create_task(Store.open(postgres_url, machine=lambda: 100 * time.monotonic()))
        await asyncio.sleep(2.5)
        assert not opened.done()
    await (await opened).close()
    engine.dispose()


def test_a_migration_may_pause_on_a_busy_machine(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate = schema.migrate

    def slow(connection: sa.Connection) -> None:
        time.sleep(3)  # loading Alembic
        migrate(connection)

    monkeypatch.setattr(schema, "migrate", slow)
    asyncio.run(_open_and_close(postgres_url))  # sessions of a term are ended after 2.5 s without a statement


def test_a_newer_schema_is_refused_and_left_alone(url: str) -> None:
    asyncio.run(_open_and_close(url))
    engine = sa.create_engine(opening.parse_url(url))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v9999'"))
    with pytest.raises(StoreError, match=r"newer hetis-planner: its schema is v9999, this one supports up to v\d+"):
        asyncio.run(_open_and_close(url))
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == "v9999"
    engine.dispose()


def test_tables_are_not_migrated_under_an_older_planner_that_leads(postgres_url: str) -> None:
    """Planners in the past did, and the older one wrote to tables that it did not know."""
    oldest = schema.revisions()[0]
    migrate_to(postgres_url, oldest)
    engine = sa.create_engine(opening.parse_url(postgres_url))
    lead = sa.text("UPDATE leadership SET epoch = 7, holder = 'old', lease_end_s = extract(epoch FROM now()) + :s")
    seen = sa.text("SELECT version_num, epoch FROM alembic_version, leadership")
    with engine.begin() as connection:
        connection.execute(lead, {"s": 3600})
    with pytest.raises(StoreError, match="is in use by the planner old, which is older than this one; stop all older"):
        asyncio.run(_open_and_close(postgres_url, lease_s=0.5))
    with engine.begin() as connection:
        assert tuple(connection.execute(seen).one()) == (oldest, 7)
        connection.execute(lead, {"s": 1})  # it was killed
    asyncio.run(_open_and_close(postgres_url))
    with engine.begin() as connection:
        assert tuple(connection.execute(seen).one()) == (schema.revisions()[-1], 8)  # the old term can change nothing
    engine.dispose()


@pytest.mark.parametrize("version", ["v9999", schema.revisions()[0]])
async def test_a_standby_does_not_lead_with_tables_that_another_version_has_migrated(
    url: str, version: str, stores: Stores
) -> None:
    engine = sa.create_engine(opening.parse_url(url))
    wrong = "was written by a newer hetis-planner" if version == "v9999" else f"was migrated to {version} while"
    standby = await stores.open(url)
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE alembic_version SET version_num = '{version}'"))
    for lead in (standby.leadership.stand_by, standby.leadership.grant):
        with pytest.raises(StoreError, match=wrong):
            await asyncio.wait_for(lead("standby"), 60)
        assert standby.leadership.epoch is None
    await standby.close()
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT epoch FROM leadership")).scalar() == 0
    engine.dispose()


async def test_a_takeover_waits_for_a_migration_and_sees_it(postgres_url: str, stores: Stores) -> None:
    engine = sa.create_engine(opening.parse_url(postgres_url))
    standby = await stores.open(postgres_url)
    with engine.begin() as migrating:
        lease.end_terms(migrating)
        leading = asyncio.create_task(standby.leadership.grant("standby"))
        await asyncio.sleep(0.5)
        assert not leading.done()
        migrating.execute(sa.text("UPDATE alembic_version SET version_num = 'v9999'"))
    with pytest.raises(StoreError, match="its schema is v9999"):
        await leading
    await standby.close()
    engine.dispose()


def test_a_database_of_something_else_is_refused_and_left_alone(url: str) -> None:
    engine = sa.create_engine(opening.parse_url(url))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE recipes (name TEXT)"))
    with pytest.raises(StoreError, match=r"holds tables of another application \(recipes\)"):
        asyncio.run(_open_and_close(url))
    assert sa.inspect(engine).get_table_names() == ["recipes"]
    engine.dispose()


@pytest.mark.parametrize(
    "url", ["postgresql:///hetis?host=127.0.0.1&port=1&password=secret", "mysql:///h?password=secret"]
)
def test_a_password_in_a_query_is_not_shown(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        asyncio.run(Store.open(url))
    assert "secret" not in str(caught.value)


def test_a_server_that_is_away_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        asyncio.run(Store.open("postgresql://hetis:secret@127.0.0.1:1/hetis"))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_files_of_a_store_are_for_its_owner_alone(tmp_path: Path) -> None:
    old = tmp_path / "old.db"
    old.touch(mode=0o644)

    async def scenario(file: Path) -> None:
        store = await Store.open(f"sqlite:///{file}")
        await store.leadership.grant("test")
        await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
        files = sorted(file.parent.glob(f"{file.name}*"))
        assert len(files) >= 3  # the write-ahead log and the lock are among them
        assert {found.name: found.stat().st_mode & 0o777 for found in files} == {found.name: 0o600 for found in files}
        await store.close()

    before = os.umask(0o022)
    try:
        for file in (old, tmp_path / "new.db"):
            asyncio.run(scenario(file))
    finally:
        os.umask(before)


def test_what_is_no_store_keeps_its_mode(tmp_path: Path) -> None:
    folder, foreign, text = tmp_path / "folder", tmp_path / "foreign.db", tmp_path / "text"
    folder.mkdir()
    with contextlib.closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    text.write_text("not a database\n" * 1000)
    for mode, found in ((0o755, folder), (0o644, foreign), (0o644, text)):
        found.chmod(mode)
        with pytest.raises(StoreError):
            asyncio.run(_open_and_close(f"sqlite:///{found}"))
        with pytest.raises(StoreError):
            migrate_to(f"sqlite:///{found}", schema.revisions()[-1])
        assert found.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://hetis:secret@host:port/hetis", "the store's URL cannot be read"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///hetis.db?mode=ro", "SQLite stores take no parameters"),
    ],
)
def test_a_url_that_no_store_can_have_is_one_clear_error(url: str, says: str) -> None:
    with pytest.raises(StoreError, match=says) as caught:
        opening.parse_url(url)
    assert "secret" not in str(caught.value)
