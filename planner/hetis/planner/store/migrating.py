"""Migrates the tables of a store to the newest schema in one transaction; refuses an unknown schema."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from hetis.planner.store.errors import StoreError

_MIGRATION_LOCK = 0x6865746973  # key of PostgreSQL's advisory lock: "hetis"
_FOLDER = Path(__file__).parent / "migrations"


def needs_migration(connection: sa.Connection, store: str) -> bool:
    """Return whether the tables are older than this planner; ``store`` is the store's name in messages.

    Raises:
        StoreError: they are newer, or not those of a planner at all.
    """
    revisions = MigrationContext.configure(connection).get_current_heads()
    script = _script()
    known = {revision.revision for revision in script.walk_revisions()}
    if unknown := [revision for revision in revisions if revision not in known]:
        raise StoreError(
            f"{store} was made by a newer hetis-planner: its schema is {', '.join(unknown)}, this one knows up to"
            f" {script.get_current_head()}. Nothing was changed; start the newer planner, or restore an older backup"
        )
    if not revisions and (found := sa.inspect(connection).get_table_names()):
        raise StoreError(
            f"{store} holds tables of something else ({', '.join(sorted(found)[:5])}); nothing was changed"
        )
    return revisions != (script.get_current_head(),)


def revisions() -> list[str]:
    """Return the versions of the schema, oldest first."""
    return [revision.revision for revision in _script().walk_revisions()][::-1]


def lock_out_others(connection: sa.Connection) -> None:
    """Wait, on a server, until nobody else migrates, and keep others out until the transaction ends."""
    connection.execute(sa.text("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0"))
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))


def migrate(connection: sa.Connection, *, to: str | None = None) -> None:
    """Run every missing migration, or migrate up or down to the version ``to``; the caller commits.

    Raises:
        StoreError: there is no such version.
    """
    script = _script()
    known = revisions()
    if to is not None and to not in known:
        raise StoreError(f"there is no version {to} of the store, expected one of {', '.join(known)}")
    wanted = to or known[-1]

    def steps(revision: tuple[str, ...], _: MigrationContext) -> object:
        if revision and known.index(revision[0]) > known.index(wanted):
            return script._downgrade_revs(wanted, revision[0])
        return script._upgrade_revs(wanted, revision)  # type: ignore[arg-type]

    with EnvironmentContext(Config(), script, fn=steps) as environment:
        environment.configure(connection=connection, transactional_ddl=True)
        environment.run_migrations()


def _script() -> ScriptDirectory:
    return ScriptDirectory(str(_FOLDER))
