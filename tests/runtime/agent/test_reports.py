"""What an agent reports, and when."""

from __future__ import annotations

import itertools

from hetis.v1.agent_service_pb2 import ConnectNodeResponse, StateRequest
from hetis.v1.executor_service_pb2 import (
    ReadHeadMapsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.head_map_pb2 import HeadMap, RunningRequest
from tests.runtime.agent.builders import (
    REPLICA,
    Bench,
    duration,
    kv,
    reports,
)


def test_reports_follow_change_thresholds_and_the_least_interval(bench: Bench) -> None:
    def hear(used: int, after_s: float) -> list[int]:
        bench.now_s += after_s
        return reports(bench.do(bench.core.on_engine_report(kv(used), bench.now_s)))

    hear(500, 2)
    bench.tick(2)
    assert hear(510, 1.5) == []  # changed by one point
    assert hear(530, 0.0) == [530]  # changed by three points
    assert hear(560, 0.5) == []  # too soon
    assert hear(560, 0.6) == [560]
    assert hear(899, 1.1) == [899]
    assert hear(900, 0.01) == [900]  # reaches the threshold: reported at once


def test_a_share_that_hovers_at_a_threshold_is_reported_at_once_only_once(bench: Bench) -> None:
    def hear(used: int, after_s: float = 0.2) -> list[int]:
        bench.now_s += after_s
        return reports(bench.do(bench.core.on_engine_report(kv(used), bench.now_s)))

    bench.connect(heartbeat_interval=duration(600))
    hear(850)
    assert hear(901) == [901]
    assert [hear(used) for used in [899, 901, 885, 900] * 50] == [[]] * 200
    assert hear(875) == [875]  # the fall is reported once the least interval is over
    assert hear(901) == [901]
    assert hear(875) == []
    assert hear(901) == []  # the planner has not heard that it fell


def test_a_silent_node_sends_heartbeats_with_jitter(bench: Bench) -> None:
    bench.sent.clear()
    beats = []
    for _ in range(20_000):
        bench.now_s += 0.01
        if any(message.HasField("heartbeat") for message in bench.tick()):
            beats.append(bench.now_s)
    waits = {round(later - earlier, 2) for earlier, later in itertools.pairwise(beats)}
    assert all(4.49 <= wait <= 5.52 for wait in waits)
    assert len(waits) > 5


def test_a_report_can_be_asked_for(bench: Bench) -> None:
    request = StateRequest(request_id="q", report=True)
    said = bench.hear(ConnectNodeResponse(epoch=1, state_request=request))
    assert [message.WhichOneof("message") for message in said] == ["report"]


def test_head_maps_come_in_pieces_of_at_most_a_mebibyte(bench: Bench) -> None:
    requests = [RunningRequest(id=f"request-{i}", context_tokens=1000 + i, owners=[i % 3] * 64) for i in range(30_000)]
    request = StateRequest(request_id="q", head_map_of=REPLICA)
    bench.hear(ConnectNodeResponse(epoch=1, state_request=request))
    said = bench.answer([ReadHeadMapsResponse(generation=1, step=5, head_maps=[HeadMap(requests=requests)])])
    pieces = [message.head_map for message in said if message.HasField("head_map")]
    assert len(pieces) > 2
    assert all(message.ByteSize() <= 1 << 20 for message in said)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [r for piece in pieces for head_map in piece.head_maps for r in head_map.requests] == requests


def test_a_head_map_that_is_not_there_is_a_failure() -> None:
    bench = Bench()
    bench.connect()
    said = bench.hear(ConnectNodeResponse(epoch=1, state_request=StateRequest(request_id="q", head_map_of="x")))
    piece = next(message.head_map for message in said if message.HasField("head_map"))
    assert piece.is_last
    assert piece.failure.reason == ErrorReason.ERROR_REASON_NOT_FOUND
