"""Brings the tables of a store to the newest form, in one transaction; refuses a form it does not know."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from hetis.planner.store.errors import StoreError

_FOLDER = Path(__file__).parent / "migrations"


def needs_migration(connection: sa.Connection, store: str) -> bool:
    """Whether the tables are older than this planner; ``store`` is how messages call the store.

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


def migrate(connection: sa.Connection) -> None:
    """Runs every migration that is missing; the caller commits."""
    script = _script()
    head = script.get_current_head()
    assert head is not None

    def upgrade(revision: object, _: MigrationContext) -> object:
        return script._upgrade_revs(head, revision)  # type: ignore[arg-type]

    with EnvironmentContext(Config(), script, fn=upgrade) as environment:
        environment.configure(connection=connection, transactional_ddl=True)
        environment.run_migrations()


def _script() -> ScriptDirectory:
    return ScriptDirectory(str(_FOLDER))
