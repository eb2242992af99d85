"""No line of the audit log can be changed, removed or inserted without being detected."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.store import Store, Transaction, audit, opening, records, schema
from hetis.planner.store.audit import AuditedChange, AuditFilter, AuditLog

TEXT = st.text(max_size=10)
CHANGES = st.builds(
    AuditedChange,
    caller=TEXT,
    role=TEXT,
    method=TEXT,
    resource=TEXT,
    request_id=TEXT,
    plan=TEXT,
    times=st.integers(1, 9),
)


def append_some(tx: Transaction) -> None:
    for n in range(5):
        change = AuditedChange(
            caller=f"caller-{n}", role="admin", method="CreatePlan", plan=f"plans/{n}", request_id=str(n)
        )
        tx.audit.append(change, time_s=1000.0 + n / 3)


@pytest.fixture
def connection(url: str) -> Any:
    async def scenario() -> None:
        store = await Store.open(url)
        await store.leadership.grant("test")
        await store.write(append_some)
        await store.close()

    asyncio.run(scenario())
    engine = opening.make_engine(opening.parse_url(url), lease_s=10.0)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def test_what_was_written_is_whole_and_comes_back_in_its_order(connection: sa.Connection) -> None:
    log = AuditLog(connection)
    lines = list(log.lines())
    assert [(line.number, line.epoch, line.change.caller) for line in lines] == [
        (n + 1, 1, f"caller-{n}") for n in range(5)
    ]
    assert [line.number for line in log.page(3, 10)] == [4, 5]
    assert [line.number for line in log.page(1, 2)] == [2, 3]
    third = lines[2]
    for which in (
        AuditFilter(caller="caller-2"),
        AuditFilter(since_s=third.time_s, until_s=third.time_s),
        AuditFilter(caller="caller-2", method=third.change.method, outcome=third.change.outcome),
    ):
        assert list(log.lines(which)) == [third]
        assert log.page(3, 10, which) == []
    assert log.last() == lines[-1]
    assert log.first_wrong() is None


def test_a_line_that_is_taken_out_or_moved_is_found(connection: sa.Connection) -> None:
    table = records.audit
    connection.execute(sa.delete(table).where(table.c.number == 2))
    assert AuditLog(connection).first_wrong() == 2
    connection.execute(sa.update(table).where(table.c.number == 3).values(number=2))
    assert AuditLog(connection).first_wrong() == 2


def test_old_lines_are_deleted_and_the_chain_goes_on_from_the_last_of_them(connection: sa.Connection) -> None:
    log, table = AuditLog(connection), records.audit
    fourth = list(log.lines())[3]
    assert log.forget_before(0.0, time_s=2000.0) == 0
    assert log.forget_before(fourth.time_s, time_s=2000.0) == 3
    assert log.forget_before(fourth.time_s, time_s=2000.0) == 0
    first, _, told = log.lines()
    assert (first, told.number, told.change.method) == (fourth, 6, "ForgetAuditedChanges")
    assert log.first_wrong() is None
    with connection.begin_nested() as changed:
        connection.execute(sa.delete(table).where(table.c.number == 4))
        assert log.first_wrong() == 4
        changed.rollback()
    with connection.begin_nested() as changed:
        connection.execute(sa.update(table).where(table.c.number == 6).values(resource="auditedChanges/4/x"))
        assert log.first_wrong() == 1
        changed.rollback()
    assert log.forget_before(1e9, time_s=2000.0) == 2  # but the last line stays
    assert log.first_wrong() is None


def test_very_many_old_lines_are_deleted_a_part_at_a_time(
    connection: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MOST_FORGOTTEN", 2)
    log = AuditLog(connection)
    assert [log.forget_before(1001.2, time_s=2000.0) for _ in range(4)] == [2, 2, 0, 0]
    assert [line.number for line in log.lines()] == [5, 6, 7]
    assert log.first_wrong() is None


@given(st.lists(CHANGES, max_size=6))
def test_any_changes_make_a_whole_chain(changes: list[AuditedChange]) -> None:
    engine = opening.make_engine(sa.make_url("sqlite://"), lease_s=10.0)
    with engine.begin() as connection:
        schema.migrate(connection)
        log = AuditLog(connection)
        for change in changes:
            log.append(change, time_s=0.1)
        assert [line.change for line in log.lines()] == changes
        assert log.first_wrong() is None
    engine.dispose()
