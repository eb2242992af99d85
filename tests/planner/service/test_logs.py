"""A repeated log line is written only now and then, with the number of its repetitions."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from hetis.planner.service.observability.telemetry import REPEAT_S, CountRepeats, JsonLines, TextLines

now_s = 0.0


def record(
    message: str = "decisions could not be stored", *, level: int = logging.WARNING, **fields: Any
) -> logging.LogRecord:
    found = logging.LogRecord("hetis.planner.fleet", level, __file__, 1, message, (), None)
    vars(found).update(fields)
    return found


@pytest.fixture
def repeats() -> CountRepeats:
    global now_s
    now_s = 0.0
    return CountRepeats(lambda: now_s)


def test_a_repeated_line_is_counted_and_not_repeated(repeats: CountRepeats) -> None:
    global now_s
    told = []
    for number in range(350):  # ten a second
        now_s = number / 10
        line = record(cluster="clusters/a", reason="STORE_UNAVAILABLE", age_s=now_s)
        if repeats.filter(line):
            told.append(getattr(line, "repeated", 0))
    assert told == [0, REPEAT_S * 10 - 1]


def test_lines_about_something_else_are_told(repeats: CountRepeats) -> None:
    first = [record(cluster="clusters/a"), record(cluster="clusters/b"), record("other"), record(reason="NOT_LEADER")]
    assert all(repeats.filter(line) for line in first)
    assert not any(repeats.filter(line) for line in first)


def test_ordinary_lines_and_those_of_calls_are_all_told(repeats: CountRepeats) -> None:
    call = record("call", level=logging.ERROR)
    call.name = "hetis.planner.calls"
    for _ in range(3):
        assert repeats.filter(record(level=logging.INFO))
        assert repeats.filter(call)


def stranger(host: str, port: int, *, caller: str = "") -> logging.LogRecord:
    found = record("call", level=logging.INFO, reason="CREDENTIALS", caller=caller, peer=f"{host}:{port}")
    found.name = "hetis.planner.calls"
    return found


def test_calls_without_valid_credentials_are_counted_per_host(repeats: CountRepeats) -> None:
    global now_s
    told = []
    for number in range(350):  # ten a second
        now_s = number / 10
        line = stranger("ipv4:10.0.0.7", 30_000 + number)
        if repeats.filter(line):
            told.append(getattr(line, "repeated", 0))
    assert told == [0, REPEAT_S * 10 - 1]
    assert repeats.filter(stranger("ipv6:%5Bfd00::7%5D", 1))
    assert all(repeats.filter(stranger("ipv4:10.0.0.7", 1, caller="agent of a revoked token")) for _ in range(3))


def test_strangers_from_many_hosts_take_neither_the_disk_nor_the_memory(repeats: CountRepeats) -> None:
    global now_s
    told = sum(repeats.filter(stranger(f"ipv6:%5Bfd00::{number:x}%5D", 1)) for number in range(20_000))
    assert told == 10_001  # each of as many as are remembered, and one for all others
    assert not repeats.filter(stranger("ipv6:%5Bfd00::fffff%5D", 1))
    now_s = REPEAT_S
    assert repeats.filter(stranger("ipv6:%5Bfd00::fffff%5D", 1))


@pytest.mark.parametrize("form", [JsonLines(), TextLines()])
def test_what_callers_write_gives_a_terminal_no_orders_and_makes_no_second_line(form: logging.Formatter) -> None:
    evil = "a\x1b[2J\x9b31m\r\nlevel=info\u202eb\u2028c\x7f"
    line = form.format(record(f"no cluster {evil}", request=evil))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert "2J" in line  # the line is still written
