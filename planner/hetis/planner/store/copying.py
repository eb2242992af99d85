"""Backups: the whole store at one moment as a file, and the restoration of a store from such a file.

A backup is always an SQLite store, whatever the kind of the original store. It can be inspected, and restored into
either kind of store; a backup of an older version is migrated to the newest schema in the process.
"""

from __future__ import annotations

import contextlib
import getpass
import glob
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import sqlalchemy as sa

import hetis.planner.store.lease as rows
import hetis.planner.store.opening as opening
import hetis.planner.store.records as records
import hetis.planner.store.schema as schema
from hetis.planner.store.audit import AuditedChange, AuditLog
from hetis.planner.store.lease import FileLock
from hetis.planner.store.opening import StoreError
from hetis.planner.store.tables import Reader

T = TypeVar("T")
_ROWS = 500  # rows per insert
_LEASE_S = 3600.0  # timeouts are derived from it; no process waits for a lease here
BEYOND = 2**20
"""The gap that a restored store leaves above the backup's epochs and versions unless the clock gives a larger one: the
original store may have used some since, agents obey the highest epoch that they have seen, and no caller may see an
etag twice.
"""


def back_up(url: str, file: Path) -> int:
    """Write a backup of a store with mode 0600, and return its number of records. The store may be in use.

    Raises:
        StoreError: the store cannot be read or is of another version, or the file already exists or cannot be created.
    """
    if file.exists():
        raise StoreError(f"{file} already exists, and a backup never overwrites a file")
    made = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with _stored(url) as connection, _errors_of(str(file)):
            opening.make_private(made)
            target, _, _ = _engine(_url_of(made))
            with target.begin() as written:
                schema.migrate(written)
                num = _copy(connection, written)
            target.dispose()
            _sync(made)
            os.link(made, file)  # fails if another process created the file first
            _sync(file.absolute().parent)
        return num
    except OSError as error:
        raise StoreError(f"{file} cannot be written: {error.strerror}") from None
    finally:
        for left in file.parent.glob(f"{glob.escape(made.name)}*"):
            left.unlink(missing_ok=True)


def read_store(url: str, work: Callable[[Reader], T]) -> T:
    """Return the result of ``work`` on one consistent state of a store in use. Raises StoreError."""
    with _stored(url) as connection:
        return work(Reader(connection))


@contextlib.contextmanager
def _stored(url: str) -> Iterator[sa.Connection]:
    """Read one consistent state of a store of this version, which may be in use."""
    engine, label, _ = _engine(url)
    _require_store(url)
    try:
        with _reading(engine) as connection:
            if schema.needs_migration(connection, label):
                raise StoreError(f"store {label} is older than this hetis-planner, or empty: migrate it first")
            yield connection
    finally:
        engine.dispose()


def restore(url: str, file: Path, *, replace: bool, clock: Callable[[], float] = time.time) -> tuple[int, int]:
    """Replace a store's contents by a backup's in one transaction; return the number of records and the new epoch.

    Epoch and versions are above those of the backup, of the replaced store and of the clock, so that stores
    restored from one backup at different times do not share them.

    Args:
        url: the URL of a store that no planner uses.
        file: the backup, which is not changed.
        replace: whether existing contents may be deleted.
        clock: Unix time.

    Raises:
        StoreError: the backup or the store cannot be used, or the store is in use, or not empty.
    """
    if not file.is_file():
        raise StoreError(f"{file}: no such backup")
    with _scratch_folder(file) as folder:
        # A backup of an older version is migrated, but the file itself must not change.
        source, _, _ = _engine(_url_of(_copied(file, folder)))
        try:
            with _errors_of(str(file)), _errors_of_copy(file, folder), source.begin() as connection:
                opening.check_file(connection, str(file))
                if not sa.inspect(connection).get_table_names():
                    raise StoreError(f"{file} is empty, so it is not a backup")
                if schema.needs_migration(connection, str(file)):
                    schema.migrate(connection)
            with _reading(source) as connection, unused(url) as (written, label):
                if schema.needs_migration(written, label):
                    schema.migrate(written)
                if not replace and (kind := _first_filled(written)):
                    raise StoreError(
                        f"store {label} holds {kind}: nothing was changed; --replace overwrites it with the backup"
                    )
                epoch_before, version_before = _epoch(written), _highest_version(written)
                num = _copy(connection, written)
                now_s = clock()
                epoch = max(epoch_before + 1, _epoch(written) + BEYOND, rows.epoch_at(now_s))
                version = max(version_before, _highest_version(written) + BEYOND, int(now_s * 1e6))
                _raise(written, epoch=epoch, version=version)
                change = AuditedChange(caller=_operator(), role="operator", method="restore", resource=file.name)
                AuditLog(written).append(change, time_s=now_s)
                return num, epoch
        finally:
            source.dispose()


def migrate_to(url: str, revision: str) -> str:
    """Migrate a store that no planner uses up or down to ``revision``, and return its revision before.

    Raises StoreError if there is no such version, or the store does not exist, cannot be used or is in use.
    """
    _require_store(url)
    with unused(url) as (connection, label):
        schema.needs_migration(connection, label)  # raises StoreError for unknown versions
        before = schema.revision_of(connection) or "nothing"
        schema.migrate(connection, to=revision)
        if before == "nothing":
            rows.begin_at(connection, rows.epoch_at(time.time()))
        return before


@contextlib.contextmanager
def unused(url: str) -> Iterator[tuple[sa.Connection, str]]:
    """Open a write transaction on a store that no planner leads with.

    Yield the transaction and the store's name for messages.

    Raises StoreError if a planner leads with the store, or it cannot be used.
    """
    engine, label, file = _engine(url)
    lock = FileLock(file) if file else None
    try:
        if file is not None and lock is not None:
            if not file.parent.is_dir():
                raise StoreError(f"store {label} cannot be opened: the folder does not exist")
            if not lock.take():
                raise StoreError(f"store {label} is in use by a planner: stop it first")
            opening.make_private(file)
            with _reading(engine) as connection:
                schema.needs_migration(connection, label)  # raises StoreError if it is not a store
            opening.keep_private(file)
            with _errors_of(label):
                opening.use_write_ahead_log(engine)
        with _errors_of(label), engine.begin() as connection:
            if lock is None:
                schema.lock_out_others(connection)
                _require_no_lease(connection, label)
            yield connection, label
    finally:
        engine.dispose()
        if lock is not None:
            lock.release()


def _copied(file: Path, folder: Path) -> Path:
    """Return a copy of a backup.

    A store that no planner uses is also accepted. If its planner was killed, the last changes are in a log beside it.
    """
    found, copied = Path(os.path.realpath(file)), folder / "backup.db"
    lock, log = FileLock(found), found.with_name(f"{found.name}-wal")
    if lock.exists() and not lock.take():
        raise StoreError(f"{file} is the store of a running planner; back it up: hetis-planner backup FILE")
    try:
        for source, target in ((found, copied), (log, copied.with_name(f"{copied.name}-wal"))):
            if source is found or source.exists():
                with source.open("rb") as read:
                    _write(read, target, file, folder)
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from None
    finally:
        lock.release()
    return copied


def _write(read: BinaryIO, target: Path, file: Path, folder: Path) -> None:
    """Write the rest of an open file to ``target``. Raises OSError only if it cannot be read."""
    try:
        written = target.open("wb", buffering=0)
    except OSError as error:
        raise _no_copy(file, folder, str(error.strerror)) from None
    with written:
        while block := read.read(2**20):
            left = memoryview(block)
            while left:
                try:
                    left = left[written.write(left) :]
                except OSError as error:
                    raise _no_copy(file, folder, str(error.strerror)) from None


@contextlib.contextmanager
def _scratch_folder(file: Path) -> Iterator[Path]:
    """Make a temporary folder for a copy of a backup, and delete it afterwards."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="hetis-restore-")
    except OSError as error:  # no folder can be written, or the one chosen cannot any more
        raise _no_copy(file, Path(os.environ.get("TMPDIR", "/tmp")), str(error.strerror)) from None
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def _errors_of_copy(file: Path, folder: Path) -> Iterator[None]:
    """Turn SQLite's failures to write to the copy in ``folder`` into errors that name that rather than the backup."""
    try:
        yield
    except sa.exc.OperationalError as error:
        code = getattr(error.orig, "sqlite_errorcode", 0)
        if code not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE):
            raise
        raise _no_copy(file, folder, str(error.orig)) from None


def _no_copy(file: Path, folder: Path, reason: str) -> StoreError:
    return StoreError(
        f"a temporary copy of {file} cannot be written to {folder}: {reason}. Nothing was changed; let TMPDIR name a"
        " folder with more room"
    )


def _require_store(url: str) -> None:
    """Raise StoreError if there is no file of this name: only a planner that serves and `restore` make a store."""
    file = opening.file_of(opening.parse_url(url))
    if file is not None and not file.exists():
        raise StoreError(
            f"store {file} does not exist, and was not created: check the path given by --store, --config or"
            " HETIS_STORE; a planner that starts makes a new store"
        )


def _url_of(file: Path) -> sa.URL:
    return sa.URL.create("sqlite", database=str(file))  # in a URL as text, ? and % in a file name would have a meaning


def _engine(url: str | sa.URL) -> tuple[sa.Engine, str, Path | None]:
    """Return an engine, the store's name for messages, and its file if it is one."""
    parsed = opening.parse_url(url) if isinstance(url, str) else url
    return opening.make_engine(parsed, lease_s=_LEASE_S), opening.label_of(parsed), opening.file_of(parsed)


@contextlib.contextmanager
def _reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Read one consistent state, however long that takes."""
    with _errors_of(opening.label_of(engine.url)), opening.reading_one_state(engine).begin() as connection:
        yield connection


@contextlib.contextmanager
def _errors_of(label: str) -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise opening.cannot_open(error, label) from None
    except sqlite3.Error as error:
        raise StoreError(f"store {label} cannot be used: {error}") from None


def _require_no_lease(connection: sa.Connection, label: str) -> None:
    if sa.inspect(connection).has_table(records.leadership.name):
        # From here on, a planner that starts or stands by waits for the end of the transaction before it leads.
        holder, left_s = rows.end_terms(connection)
        if left_s > 0:
            raise StoreError(f"store {label} is in use by {holder.title}: stop it first")


def _first_filled(connection: sa.Connection) -> str:
    """Return the name of a table that holds records, or an empty string if none does."""
    for table in records.metadata.sorted_tables:
        if table is not records.leadership and connection.execute(sa.select(table).limit(1)).first() is not None:
            return table.name.replace("_", " ")
    return ""


def _copy(source: sa.Connection, target: sa.Connection) -> int:
    """Replace all rows of ``target`` by those of ``source``, unchanged, and return their number."""
    num = 0
    for table in reversed(records.metadata.sorted_tables):
        if table is not records.leadership:
            target.execute(sa.delete(table))
    for table in records.metadata.sorted_tables:
        rows = source.execution_options(stream_results=True).execute(sa.select(table))
        for part in rows.mappings().partitions(_ROWS):
            if table is records.leadership:
                # Its one row, which the first migration inserted, is never deleted: a planner that waits for its lock
                # must find it.
                num += target.execute(sa.update(table).values(part[0])).rowcount
                continue
            target.execute(sa.insert(table), [dict(row) for row in part])
            num += len(part)
    return num


def _epoch(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(records.leadership.c.epoch)).scalar_one())


def _highest_version(connection: sa.Connection) -> int:
    """Return the highest version of all records, including deleted ones."""
    found = [
        connection.execute(sa.select(sa.func.max(table.c.version))).scalar_one() or 0 for table in _versioned_tables()
    ]
    return int(max(found))


def _raise(connection: sa.Connection, *, epoch: int, version: int) -> None:
    """Set the last epoch to ``epoch``, and the last version of any record before the restoration to ``version``."""
    connection.execute(sa.update(records.leadership).values(epoch=epoch, holder="", lease_end_s=0.0))
    gone = records.gone_versions
    connection.execute(sa.delete(gone))
    for table in _versioned_tables():
        if table is not gone:
            connection.execute(sa.update(table).values(version=version + 1))
            connection.execute(sa.insert(gone).values(table_name=table.name, version=version))


def _versioned_tables() -> list[sa.Table]:
    return [table for table in records.metadata.sorted_tables if "version" in table.c]


def _operator() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container whose user has no name
        return f"user {os.getuid()}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
