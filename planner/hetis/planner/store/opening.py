"""A store's location, and connections to it that are as durable as the store promises."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from hetis.planner.failures import Reason, ServiceError
from hetis.solver.errors import HetisError


class StoreError(HetisError):
    """The store cannot be used: damaged, not writable, newer than this planner, or used by another planner.

    Raised when a planner starts, with nothing changed. Later problems are a ServiceError.
    """


_log = logging.getLogger("hetis.planner.store")
FILE_WAIT_S = 5.0  # while a backup tool or a shell holds the file
_READS = "hetis_reads"
# A connection that was used this recently is not tested: each test is a quarter of the round trips of a read. If it was
# cut in between, the transaction has changed nothing, and callers are told so.
_IDLE_S = 0.25
_CONNECT_S = 3  # timeout for connecting to a server, in whole seconds and at least 2
_LEAST_LIMIT_S = 5.0  # shorter leases occur only in tests, whose servers are no faster


def parse_url(text: str) -> sa.URL:
    """Parse the URL of a store: ``sqlite:///FILE`` (four slashes for an absolute path) or ``postgresql://...``.

    Raises StoreError if it is neither; the message never shows a password.
    """
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):  # ValueError: its port is no number
        raise StoreError("the store's URL cannot be read; expected sqlite:///FILE or postgresql://...") from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername == "postgresql+psycopg":
        return url
    if url.drivername != "sqlite":
        wrong = f"{url.drivername} is not supported, expected sqlite or postgresql"
    elif file_of(url) is None:
        wrong = (
            "the URL names no file, and what is only in memory is lost when the planner ends; expected sqlite:///FILE"
        )
    elif url.query:
        wrong = "SQLite stores take no parameters; expected sqlite:///FILE without '?'"
    else:
        return url
    raise StoreError(f"store {_without_passwords(url)}: {wrong}")


def file_of(url: sa.URL) -> Path | None:
    """Return the file of an SQLite store, or None if the store is in memory or on a server.

    A link is followed to the file itself: two planners must find one lock, and SQLite's files must be beside it.
    """
    if url.drivername != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return Path(os.path.realpath(url.database))


def make_private(file: Path) -> None:
    """Create the file with mode 0600 before SQLite does, unless there is something of that name."""
    with contextlib.suppress(OSError):  # SQLite reports errors of the folder
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def keep_private(file: Path) -> None:
    """Take away other users' access to a store, and to the files that SQLite puts beside it (the write-ahead log).

    Only for what is known to be a store: a URL may name a folder or a file of others by mistake.
    """
    for found in (file, *(file.with_name(file.name + ending) for ending in ("-wal", "-shm"))):
        try:
            if found.exists() and found.stat().st_mode & 0o077:
                found.chmod(0o600)
        except OSError as error:
            _log.warning("%s remains accessible to other users: %s", found, error.strerror)


def identity_of(file: Path) -> tuple[int, int] | None:
    """Return what tells the file of this name from any other one, or None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def moved(store: str) -> ServiceError:
    """Return the error for a caller whose transaction would have gone to a file that is no longer at its place."""
    return ServiceError(
        Reason.ERROR_REASON_STORE_UNAVAILABLE,
        f"the file of the planner's store {store} was removed or replaced while the planner used it; nothing was"
        " changed. Put it back; or stop the planner, put the right file there, and start it again",
        metadata={"changed": "no"},
    )


def label_of(url: sa.URL) -> str:
    """Return the store's name in messages."""
    return str(file_of(url) or _without_passwords(url.set(drivername=url.get_backend_name())))


def _without_passwords(url: sa.URL) -> str:
    """Return the URL without the user's password, and without passwords that libpq takes from the query."""
    secret = [name for name in url.query if "pass" in name.lower()]
    return url.difference_update_query(secret).render_as_string(hide_password=True)


def make_engine(url: sa.URL, *, lease_s: float, pings: bool = True) -> sa.Engine:
    """Return an engine that connects lazily.

    SQLite's write transactions lock at once and reach the disk before they end.

    Args:
        url: the URL as `parse_url` returns it.
        lease_s: the lease, from which a server's timeouts are derived: a planner that is cut off in the middle of a
            transaction must not keep another one from taking over once the lease has expired.
        pings: whether a connection to a server is tested before it is used again after `_IDLE_S`. That costs another
            round trip, which a caller that soon retries does not need.
    """
    if url.drivername != "sqlite":
        most_ms = round(1000 * max(lease_s, _LEAST_LIMIT_S))
        limits = {
            "idle_in_transaction_session_timeout": most_ms // 2,
            "lock_timeout": most_ms,
            "statement_timeout": most_ms,
            "tcp_user_timeout": most_ms,
        }
        settings = {
            "connect_timeout": _CONNECT_S,
            "options": " ".join(f"-c {name}={value}ms" for name, value in limits.items()),
            "tcp_user_timeout": most_ms,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
        }
        # Without HSTORE: each new connection would query the server for that type.
        engine = sa.create_engine(url, pool_size=1, max_overflow=0, connect_args=settings, use_native_hstore=False)
        if pings:
            event.listen(engine, "checkin", _note_use)
            event.listen(engine, "checkout", partial(_ping_idle, engine.dialect))
        return engine
    engine = sa.create_engine(url, connect_args={"timeout": FILE_WAIT_S})
    event.listen(engine, "connect", _set_up_file)
    event.listen(engine, "begin", _begin)
    return engine


def _note_use(_: object, record: sa.pool.ConnectionPoolEntry) -> None:
    record.info["used_s"] = time.monotonic()


def _ping_idle(dialect: sa.Dialect, connection: Any, record: sa.pool.ConnectionPoolEntry, _: object) -> None:
    """Test a connection that has been idle; the pool replaces it if this raises."""
    if time.monotonic() - record.info.get("used_s", math.inf) < _IDLE_S:  # or never used
        return
    try:
        dialect.do_ping(connection)
    except dialect.loaded_dbapi.Error as error:
        raise sa.exc.DisconnectionError from error


def reading(engine: sa.Engine) -> sa.Engine:
    """Return the engine, with the same connections, for read-only transactions."""
    return engine.execution_options(**{_READS: True})


def is_reading(engine: sa.Engine) -> bool:
    """Return whether the engine's transactions only read."""
    return bool(engine.get_execution_options().get(_READS))


def reading_one_state(engine: sa.Engine) -> sa.Engine:
    """Return the engine for read-only transactions, each of which sees one state of the store.

    In SQLite all do. In PostgreSQL they otherwise see what a leader commits between two of their statements.
    """
    reads = reading(engine)
    return reads if engine.dialect.name == "sqlite" else reads.execution_options(isolation_level="REPEATABLE READ")


def at_once(engine: sa.Engine) -> sa.Engine:
    """Return the engine for single statements that are durable once they are answered.

    No transaction is begun and committed around them, which would cost a round trip to the server each. SQLite's
    engine is returned unchanged.
    """
    return engine if engine.dialect.name == "sqlite" else engine.execution_options(isolation_level="AUTOCOMMIT")


def use_write_ahead_log(engine: sa.Engine) -> None:
    """Use write-ahead logging in this file from now on.

    It takes one sync per commit, and readers (a backup) block no writer.
    """
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("PRAGMA journal_mode = WAL").close()
    finally:
        connection.close()


def check_file(connection: sa.Connection, store: str) -> None:
    """Raise StoreError if SQLite finds a damaged page."""
    found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
        raise _damaged(store, str(found))


def cannot_open(error: sa.exc.DBAPIError, store: str) -> StoreError:
    """Return the error for the operator who starts the planner."""
    reason = _reason(error)
    if not isinstance(error.orig, sqlite3.Error):
        return StoreError(f"store {store} cannot be reached: {reason}")
    damages = "file is not a database", "database disk image is malformed", "malformed database schema"
    if reason.startswith(damages):
        return _damaged(store, reason)
    if "readonly" in reason or "unable to open" in reason:
        folder = Path(store).parent
        why = "the folder does not exist" if not folder.is_dir() else "file and folder must be writable"
        return StoreError(f"store {store} cannot be opened for writing ({reason}): {why}")
    return StoreError(f"store {store} cannot be opened: {reason}")


def unavailable(error: sa.exc.DBAPIError, store: str, *, is_committing: bool) -> ServiceError:
    """Return the error for a caller whose transaction failed.

    It was rolled back, unless the connection broke, or the disk failed, while it was being committed: a server rolls
    back what it has no commit of.
    """
    is_refused = getattr(error.orig, "sqlite_errorname", "") in ("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_READONLY")
    is_of_file = isinstance(error.orig, sqlite3.Error)
    is_unknown = is_committing and (error.connection_invalidated or (is_of_file and not is_refused))
    what = "it is unknown whether the change was made" if is_unknown else "nothing was changed"
    if is_full(error):
        what += "; its disk is full: make room there, then repeat the call"
    return ServiceError(
        Reason.ERROR_REASON_STORE_UNAVAILABLE,
        f"the planner's store {store} is currently failing ({_reason(error)}); {what}",
        metadata={"changed": "unknown" if is_unknown else "no"},
    )


def is_full(error: sa.exc.DBAPIError) -> bool:
    """Return whether the disk has no room, by SQLite's name of the error or PostgreSQL's DISK FULL."""
    return (
        getattr(error.orig, "sqlite_errorname", "") == "SQLITE_FULL" or getattr(error.orig, "sqlstate", "") == "53100"
    )


_NO_RIGHTS = "42501"  # PostgreSQL's INSUFFICIENT PRIVILEGE, which its driver counts among invalid statements


def is_a_bug(error: sa.exc.DBAPIError) -> bool:
    """Return whether the statement was at fault rather than the store; revoked rights are a problem of the store."""
    return getattr(error.orig, "sqlstate", None) != _NO_RIGHTS and isinstance(
        error, sa.exc.IntegrityError | sa.exc.ProgrammingError | sa.exc.DataError | sa.exc.NotSupportedError
    )


def _damaged(store: str, reason: str) -> StoreError:
    return StoreError(
        f"store {store} is damaged or not a store ({reason}). Nothing was changed; restore a backup, or move "
        "the file away"
    )


def _reason(error: sa.exc.DBAPIError) -> str:
    return " ".join(str(error.orig).split())


def _set_up_file(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # disables the driver's implicit transactions
    try:
        connection.execute("PRAGMA synchronous = FULL").close()  # a commit is on disk when it returns
    except UnicodeDecodeError:  # the message of a damaged schema quotes the file's bytes
        raise sqlite3.DatabaseError("malformed database schema") from None


def _begin(connection: sa.Connection) -> None:
    # Locked from the start: a transaction that reads first could otherwise fail at its first write.
    reads = connection.get_execution_options().get(_READS)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
