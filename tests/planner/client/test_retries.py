"""Watches are tried again within a limit, whatever the planner or a proxy does."""

from __future__ import annotations

import math
import time
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2

from hetis.commands.endpoints import STREAM_OPEN
from hetis.planner.client import CallError, Retries
from tests.planner.client.either import EITHER, Kind, items, opened
from tests.planner.client.fake_planner import FakePlanner, refuse

AWAY = CallError("away", code=grpc.StatusCode.UNAVAILABLE)


def test_retries_have_an_end_and_begin_anew_with_an_answer() -> None:
    retries = Retries(limit_s=1.5, jitter=lambda: 1.0)
    waits = [retries.next_wait_s(AWAY) for _ in range(3)]
    assert waits == [0.2, 0.4, 0.8]
    with pytest.raises(CallError, match="away"):
        retries.next_wait_s(AWAY)
    retries.answered()
    assert retries.next_wait_s(AWAY) == 0.2
    assert retries.next_wait_s(CallError("later", code=grpc.StatusCode.UNAVAILABLE, retry_after_s=0.7)) == 0.7


class Trying:
    """A watch whose attempts take virtual time, and the events that it received."""

    def __init__(self, **settings: Any) -> None:
        self.now_s, self.told = 0.0, list[tuple[float, bool]]()
        self.retries = Retries(
            jitter=lambda: 1.0,
            clock=lambda: self.now_s,
            report=lambda yes: self.told.append((self.now_s, yes)),
            **settings,
        )

    def fail_for_long(self, *, after_s: float, opened_after_s: float | None = None) -> None:
        def try_for_long() -> None:
            for _ in range(1000):
                self.fail(after_s=after_s, opened_after_s=opened_after_s)

        with pytest.raises(CallError):
            try_for_long()

    def fail(self, *, after_s: float, opened_after_s: float | None = None) -> None:
        self.retries.attempt()
        if opened_after_s is not None:
            self.now_s += opened_after_s
            self.retries.opened()
            after_s -= opened_after_s
        self.now_s += after_s
        self.now_s += self.retries.next_wait_s(AWAY)


def test_attempts_count_as_waiting_and_one_line_is_said_of_them() -> None:
    trying = Trying(limit_s=60.0)
    trying.fail_for_long(after_s=1.5)
    assert 50 < trying.now_s <= 60
    assert [yes for _, yes in trying.told] == [False]
    assert 3 <= trying.told[0][0] < 6

    trying.retries.answered()
    trying.retries.answered()
    assert [yes for _, yes in trying.told] == [False, True]


def test_an_open_stream_without_changes_costs_no_retries() -> None:
    trying = Trying(limit_s=60.0)
    for _ in range(100):
        trying.fail(after_s=300.0, opened_after_s=0.1)
    assert trying.told == []


def test_a_proxy_that_answers_late_costs_retries() -> None:
    trying = Trying(limit_s=200.0)
    trying.fail_for_long(after_s=60.0)
    assert 120 < trying.now_s <= 200
    assert [yes for _, yes in trying.told] == [False, False], "once a minute"


def test_retries_can_be_endless() -> None:
    trying = Trying(limit_s=math.inf)
    for _ in range(2000):
        trying.fail(after_s=1.0)
    assert len(trying.told) == pytest.approx(trying.now_s / 60, rel=0.1)


def test_a_stream_that_breaks_as_soon_as_it_is_open_costs_retries() -> None:
    trying = Trying(limit_s=60.0)
    trying.fail_for_long(after_s=0.2, opened_after_s=0.1)
    assert trying.now_s <= 60


def test_a_stream_that_opens_without_changes_is_told() -> None:
    trying = Trying(limit_s=60.0)
    trying.fail(after_s=5.0)
    trying.fail(after_s=5.0, opened_after_s=0.5)
    assert [yes for _, yes in trying.told] == [False, True]


@EITHER
@pytest.mark.parametrize("is_open", [True, False])
async def test_a_watch_without_changes_lasts_only_at_a_planner_that_has_opened_it(
    planner: FakePlanner, kind: Kind, monkeypatch: pytest.MonkeyPatch, is_open: bool
) -> None:
    monkeypatch.setattr("hetis.planner.client.channels.CHANNEL_OPTIONS", (("grpc.enable_retries", 0),))
    breaks: list[int] = []

    def fail(method: str, context: grpc.ServicerContext) -> None:
        if method == "WatchPlan" and len(breaks) < 4:
            breaks.append(1)
            if is_open:
                context.send_initial_metadata((STREAM_OPEN,))
            time.sleep(0.3)  # 300 s by the client's clock, which only the error's metadata explains
            refuse(context, code_pb2.UNAVAILABLE, "", "the proxy gives up")

    def slow() -> Retries:
        return Retries(jitter=lambda: 0.0, clock=lambda: 1000.0 * time.monotonic())

    planner.fail = fail
    async with opened(kind, planner.address) as client:
        watch = items(client, client.watch_plan("plans/night", retries=slow()))
        if is_open:
            assert [response.sequence async for response in watch][-1] == 900
            assert len(breaks) == 4
        else:
            with pytest.raises(CallError, match="gives up"):
                await anext(watch)


@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_retries_end_whatever_the_jitter(jitter: float) -> None:
    retries = Retries(limit_s=1.0, jitter=lambda: jitter)

    def wait_for_long() -> None:
        for _ in range(1000):
            retries.next_wait_s(AWAY)

    with pytest.raises(CallError):
        wait_for_long()
