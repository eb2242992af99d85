"""A PostgreSQL server for the tests, in a separate folder, on a free loopback port, which ends with them."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from examples.processes import free_ports


def find_binaries() -> tuple[str, str] | None:
    """Paths of initdb and postgres; None where they are not installed."""
    places = os.pathsep.join([os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
    initdb, postgres = shutil.which("initdb", path=places), shutil.which("postgres", path=places)
    return (initdb, postgres) if initdb and postgres else None


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """The URL of a server without its database's name: ``postgresql://hetis@127.0.0.1:PORT``."""
    binaries = find_binaries()
    assert binaries is not None
    initdb, postgres = binaries
    account = _account()
    with tempfile.TemporaryDirectory(prefix="hetis-postgres-") as folder:
        if account:
            os.chown(folder, account.pw_uid, account.pw_gid)
        as_account: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid} if account else {}
        as_account |= {"cwd": folder, "stdin": subprocess.DEVNULL}
        data = f"{folder}/data"
        arguments = ["-D", data, "-U", "hetis", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8"]
        subprocess.run([initdb, *arguments], check=True, capture_output=True, timeout=120, **as_account)
        port = free_ports()
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "port": port}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with open(f"{folder}/log", "wb") as log:
            server = subprocess.Popen([postgres, "-D", data, *options], stdout=log, stderr=log, **as_account)
        try:
            url = f"postgresql://hetis@127.0.0.1:{port}"
            _wait_for(url, server, Path(folder, "log"))
            yield url
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: none of its data are needed
            server.wait(30)


def new_database(server: str, name: str) -> str:
    """The URL of an empty database."""
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return f"{server}/{name}"


@contextlib.contextmanager
def database_on_small_disk(server: str) -> Iterator[tuple[str, Path | None]]:
    """Yield the URL of an empty database on a disk of its own, and that disk; None where none may be mounted."""
    with tempfile.TemporaryDirectory(prefix="hetis-tablespace-") as folder:
        disk = Path(folder) / "disk"
        disk.mkdir()
        if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk]).returncode:
            yield new_database(server, "small"), None
            return
        try:
            with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
                (data,) = connection.execute("SHOW data_directory").fetchone() or ("",)
                for path in (Path(folder), disk):
                    os.chown(path, Path(data).stat().st_uid, -1)
                connection.execute(f"CREATE TABLESPACE small LOCATION '{disk}'".encode())
                connection.execute("CREATE DATABASE small TABLESPACE small")
                yield f"{server}/small", disk
                (disk / "full").unlink(missing_ok=True)
                connection.execute("DROP DATABASE small WITH (FORCE)")
                connection.execute("DROP TABLESPACE small")
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> None:
    """Use up all free space of a disk, in its file ``full``."""
    with (disk / "full").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def num_waiting(url: str) -> int:
    """Number of transactions in the database that wait for the lock of another one."""
    waiting = (
        "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE NOT granted AND datname = current_database()"
    )
    with psycopg.connect(url) as connection:
        (found,) = connection.execute(waiting).fetchone() or (0,)
    return int(found)


def set_clock_back(url: str, seconds: float) -> None:
    """Set the database's clock back by so much from the true time, for connections made after the first call."""
    clock = f"SELECT pg_catalog.clock_timestamp() - {seconds} * interval '1 second'"
    with psycopg.connect(url) as connection:
        for statement in (
            "CREATE SCHEMA IF NOT EXISTS stepped",
            f"CREATE OR REPLACE FUNCTION stepped.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$ {clock} $$",
            # Tables are created in the first schema; functions of the server are found in the last one.
            f'ALTER DATABASE "{connection.info.dbname}" SET search_path = public, stepped, pg_catalog',
        ):
            connection.execute(statement.encode())


def _account() -> pwd.struct_passwd | None:
    """Return the account for PostgreSQL, which refuses to run as root; None: our own."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(f"{url}/postgres", connect_timeout=2).close()
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > end_s:
                raise AssertionError(f"PostgreSQL did not start:\n{log.read_text()}") from None
            time.sleep(0.1)
        else:
            return
