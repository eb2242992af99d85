"""The versions of a store's tables, and their migration from one to another.

Alembic, a sixth of all that a planner would import, is loaded only for a migration, which most starts do not need.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from hetis.planner.store.opening import StoreError

_MIGRATION_LOCK = 0x6865746973  # key of PostgreSQL's advisory lock: "hetis"
_FOLDER = Path(__file__).parent / "migrations"
_APPLIED = sa.table("alembic_version", sa.column("version_num"))
applied = sa.select(_APPLIED.c.version_num).scalar_subquery()
"""The version of a store's tables, as an expression within a statement: a query of its own costs a round trip."""


def revisions() -> list[str]:
    """Return the versions of the schema that this planner knows, oldest first."""
    return sorted(file.name.partition("_")[0] for file in (_FOLDER / "versions").glob("v*.py"))


def revision_of(connection: sa.Connection) -> str | None:
    """Return the version of the store's tables, which this planner may not know.

    None: the store has no tables of a planner.
    """
    if not sa.inspect(connection).has_table(_APPLIED.name):
        return None
    found: str | None = connection.execute(sa.select(_APPLIED.c.version_num)).scalar()
    return found


def require_unchanged(found: str, store: str) -> None:
    """Check the version of a store that this planner has opened. Raises StoreError if it was migrated since."""
    known = revisions()
    if found not in known:
        raise _newer(found, store)
    if found != known[-1]:
        raise StoreError(
            f"{store} was migrated to {found} while this planner, whose schema is {known[-1]}, stood by. Nothing was"
            " changed; start the planner of that version"
        )


def needs_migration(connection: sa.Connection, store: str) -> bool:
    """Return whether the tables are older than this planner; ``store`` is the store's name in messages.

    Raises StoreError if they are newer, or not a planner's tables.
    """
    found, known = revision_of(connection), revisions()
    if found is None:
        if others := set(sa.inspect(connection).get_table_names()) - {_APPLIED.name}:
            raise StoreError(
                f"{store} holds tables of another application ({', '.join(sorted(others)[:5])}); nothing was changed"
            )
    elif found not in known:
        raise _newer(found, store)
    return found != known[-1]


def _newer(found: str, store: str) -> StoreError:
    return StoreError(
        f"{store} was written by a newer hetis-planner: its schema is {found}, this one supports up to"
        f" {revisions()[-1]}. Nothing was changed; start the newer planner, or restore an older backup"
    )


def lock_out_others(connection: sa.Connection) -> None:
    """Wait, on a server, until no other planner migrates, and keep others out until the transaction ends."""
    connection.execute(sa.text("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0"))
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))


def allow_pauses(connection: sa.Connection) -> None:
    """Let this transaction pause for longer than those of a leader: a migration loads Alembic, on a busy machine.

    A planner that is cut off in the middle still does not hold its locks for ever.
    """
    connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = '60s'"))


def migrate(connection: sa.Connection, *, to: str | None = None) -> None:
    """Migrate up or down to the version ``to``, or the newest; the caller commits. Raises StoreError if unknown."""
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    script, known = ScriptDirectory(str(_FOLDER)), revisions()
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
