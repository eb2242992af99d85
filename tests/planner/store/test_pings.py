"""A connection that is in use is not tested before each transaction; one that was idle is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from hetis.planner.store import opening


@pytest.fixture
def engine(postgres_url: str) -> Iterator[sa.Engine]:
    engine = opening.make_engine(opening.parse_url(postgres_url), lease_s=5.0)
    yield engine
    engine.dispose()


def server_process(engine: sa.Engine) -> int:
    """Return the number of the server's process that answers the connection."""
    with engine.begin() as connection:
        return int(connection.scalar(sa.text("SELECT pg_backend_pid()")) or 0)


def end(postgres_url: str, number: int) -> None:
    other = opening.make_engine(opening.parse_url(postgres_url), lease_s=5.0, pings=False)
    with other.begin() as connection:
        connection.execute(sa.text("SELECT pg_terminate_backend(:number, 5000)"), {"number": number})
    other.dispose()


def test_a_connection_that_was_cut_while_idle_is_replaced(
    engine: sa.Engine, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = server_process(engine)
    assert server_process(engine) == first
    end(postgres_url, first)
    monkeypatch.setattr(opening, "_IDLE_S", 0.0)
    assert server_process(engine) != first


def test_a_connection_in_use_is_not_tested_and_one_that_was_cut_is_replaced_after_an_error(
    engine: sa.Engine, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = list[object]()
    monkeypatch.setattr(engine.dialect, "do_ping", tests.append)
    monkeypatch.setattr(opening, "_IDLE_S", 60.0)
    first = server_process(engine)
    assert (server_process(engine), tests) == (first, [])
    end(postgres_url, first)
    with pytest.raises(sa.exc.OperationalError):
        server_process(engine)
    assert server_process(engine) != first
    monkeypatch.setattr(opening, "_IDLE_S", 0.0)
    server_process(engine)
    assert len(tests) == 1
