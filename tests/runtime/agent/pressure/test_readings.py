"""The meaning of engines' metrics: exact names, old and new, several models, ranks, and missing ones."""

from __future__ import annotations

import math
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.runtime.agent.pressure import (
    EngineReading,
    Scrape,
    ScrapeState,
    device_reports,
    read_text,
    replica_report,
    unreachable_report,
)
from hetis.solver.traffic import SECONDS, TOKENS, Histogram, TrafficSketch
from hetis.v1 import failure_pb2, report_pb2, traffic_pb2
from tests.runtime.agent.pressure.expositions import SGLANG, VLLM, VLLM_OLD


def read(text: str) -> tuple[EngineReading, ...]:
    found = read_text(text, name="engine")
    assert found.state is ScrapeState.READ, found
    return found.readings


def reading(**values: object) -> EngineReading:
    return EngineReading(model="m", **values)  # type: ignore[arg-type]


def test_vllm_is_read_by_its_names() -> None:
    assert read(VLLM) == (
        EngineReading(
            model="meta-llama/Llama-3.1-8B-Instruct",
            num_running=41,
            num_waiting=7,
            num_waiting_for_kv=5,
            total_blocks=27150,
            used_blocks=25358,  # 0.934 of the blocks
            kv_use_ratio=0.934,
            num_preempted=23,
            num_finished=1134,
            num_steps=90210,
            traffic=TrafficSketch(
                arrivals=1134 + 41 + 7,
                prompt_tokens=Histogram.of_buckets(TOKENS, {1000.0: 500.0, 2000.0: 1100.0, math.inf: 1134.0}, 1.2e6),
                output_tokens=Histogram.of_buckets(TOKENS, {100.0: 34.0, math.inf: 1134.0}, 2e5),
                cached_tokens=300_000,
                ttft_s=Histogram.of_buckets(SECONDS, {0.1: 300.0, math.inf: 1140.0}, 342.0),
                tpot_s=Histogram.of_buckets(SECONDS, {math.inf: 200_000.0}, 5000.0),
            ),
        ),
    )


def test_an_older_vllm_is_read_by_the_names_it_had() -> None:
    (found,) = read(VLLM_OLD)
    assert (found.kv_use_ratio, found.total_blocks, found.used_blocks) == (0.25, 1000, 250)
    assert found.num_waiting_for_kv is None
    assert (found.traffic.tpot_s.mean, found.traffic.tpot_s.count) == (pytest.approx(0.02), 10.0)


def test_the_newer_name_wins_where_both_are_served() -> None:
    both = VLLM_OLD + 'vllm:kv_cache_usage_perc{model_name="opt"} 0.5\n'
    assert read(both)[0].kv_use_ratio == 0.5


def test_sglang_is_read_without_what_it_can_evict() -> None:
    assert read(SGLANG) == (
        EngineReading(
            model="qwen",
            num_running=12,
            num_waiting=4,
            total_blocks=100_000,
            used_blocks=60_000,  # 100,000 less 5,000 available less 35,000 evictable; the engine reports 95,000
            evictable_blocks=35_000,
            kv_use_ratio=0.6,
            num_finished=507,
            traffic=TrafficSketch(
                arrivals=507 + 12 + 4,
                ttft_s=Histogram.of_buckets(SECONDS, {math.inf: 507.0}, 101.4),
                tpot_s=Histogram.of_buckets(SECONDS, {math.inf: 1000.0}, 30.0),
            ),
        ),
    )


def test_the_fullest_pool_of_sglang_counts() -> None:
    hybrid = SGLANG + 'sglang:swa_token_usage{engine_type="unified",model_name="qwen",pp_rank="0",tp_rank="0"} 0.97\n'
    (found,) = read(hybrid)
    assert (found.kv_use_ratio, found.used_blocks) == (0.97, 97_000)


def test_ranks_that_share_their_requests_count_once_and_others_add_up() -> None:
    text = "".join(
        f'sglang:num_running_reqs{{dp_rank="{dp}",model_name="qwen",tp_rank="{tp}"}} {5 + dp}\n'
        for dp in range(2)
        for tp in range(4)
    )
    assert read(text)[0].num_running == 11
    engines = 'vllm:num_requests_running{engine="0",model_name="m"} 4\n'
    engines += 'vllm:num_requests_running{engine="1",model_name="m"} 6\n'
    assert read(engines)[0].num_running == 10


def test_several_models_on_one_port_are_told_apart() -> None:
    second = VLLM.replace("meta-llama/Llama-3.1-8B-Instruct", "adapter").replace("41.0", "2.0")
    lines = dict.fromkeys(VLLM.splitlines() + second.splitlines())
    found = {one.model: one.num_running for one in read("\n".join(lines) + "\n")}
    assert found == {"meta-llama/Llama-3.1-8B-Instruct": 41, "adapter": 2}


def test_collectors_that_refuse_colons_are_understood() -> None:
    assert read(SGLANG.replace("sglang:", "sglang_")) == read(SGLANG)
    assert read(VLLM.replace("vllm:", "vllm_")) == read(VLLM)


def test_metrics_that_are_missing_are_not_known_rather_than_zero() -> None:
    (found,) = read('vllm:num_requests_running{model_name="m"} 1\n')
    assert found == reading(num_running=1)
    report = replica_report("clusters/c/replicas/r", found)
    assert report == report_pb2.ReplicaReport(
        replica="clusters/c/replicas/r",
        assignment_state=report_pb2.ASSIGNMENT_STATE_UNMANAGED,
        is_primary=True,
        num_running=1,
        traffic=traffic_pb2.Traffic(),
    )


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf"], ids=["not a number", "infinite", "infinite and negative"])
def test_values_that_are_no_finite_numbers_are_not_known(value: str) -> None:
    text = VLLM_OLD.replace("0.25", value)
    assert read(text)[0].kv_use_ratio is None


def test_blocks_that_are_not_measured_yet_are_not_known() -> None:
    (found,) = read(VLLM_OLD.replace('num_gpu_blocks="1000"', 'num_gpu_blocks="None"'))
    assert (found.total_blocks, found.used_blocks, found.kv_use_ratio) == (None, None, 0.25)


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("", ScrapeState.NO_ENGINE),
        ("# HELP up Up.\n# TYPE up gauge\nup 1\n", ScrapeState.NO_ENGINE),
        ("<html><body>404</body></html>", ScrapeState.UNREADABLE),
        ('{"error": "no metrics"}', ScrapeState.UNREADABLE),
        (VLLM[: VLLM.index("41.0")], ScrapeState.UNREADABLE),  # truncated
        ('vllm:num_requests_running{model_name="m} 1\n', ScrapeState.UNREADABLE),
        ('vllm:num_requests_running{model_name="m"} many\n', ScrapeState.UNREADABLE),
    ],
)
def test_text_that_is_not_an_engine_has_a_state(text: str, state: ScrapeState) -> None:
    found = read_text(text, name="engine")
    assert found.state is state
    assert found.message.startswith("engine: ")
    assert found.readings == ()


@given(st.one_of(st.text(), st.text(alphabet=string.printable), st.text(alphabet='vllm:{}=", 0\n#TYPE')))
def test_no_text_makes_reading_fail(text: str) -> None:
    assert isinstance(read_text(text, name="engine"), Scrape)


@given(st.integers(0, len(VLLM)), st.integers(0, len(VLLM)), st.text(max_size=3))
def test_no_damage_to_an_answer_makes_reading_or_reporting_fail(start: int, stop: int, between: str) -> None:
    for found in read_text(VLLM[:start] + between + VLLM[stop:], name="engine").readings:
        replica_report("clusters/c/replicas/r", found)
        device_reports([found], [0])


def test_means_of_a_report_are_of_the_time_since_the_reading_before() -> None:
    def report(now: tuple[float, float], before: tuple[float, float] | None) -> float:
        found = [
            reading(traffic=TrafficSketch(tpot_s=Histogram.of_buckets(SECONDS, {math.inf: count}, total)))
            for total, count in filter(None, (now, before))
        ]
        return replica_report("clusters/c/replicas/r", found[0], earlier=found[-1] if before else None).tpot_s

    assert report((30.0, 20.0), (10.0, 10.0)) == 2.0
    assert report((30.0, 20.0), None) == 1.5
    assert report((10.0, 10.0), (10.0, 10.0)) == 0.0
    assert report((3.0, 2.0), (10.0, 10.0)) == 1.5  # the engine restarted


def test_traffic_that_cannot_be_is_none() -> None:
    (found,) = read(VLLM.replace("1.2e+06", "-5").replace("41.0", "-90000"))
    assert found.traffic == TrafficSketch()


@pytest.mark.parametrize(
    ("now", "waiting"),
    [
        (reading(kv_use_ratio=0.9, num_waiting=9), 0),  # not above the limit
        (reading(kv_use_ratio=0.3, num_waiting=9), 0),  # requests wait for something other than KV
        (reading(kv_use_ratio=0.3, num_waiting=9, num_waiting_for_kv=2), 2),
        (reading(kv_use_ratio=0.95, num_waiting=9), 9),
        (reading(kv_use_ratio=0.95, num_waiting=9, num_waiting_for_kv=0), 0),
        (reading(num_waiting=9), 0),
        (reading(), 0),
    ],
)
def test_requests_wait_for_kv_where_the_engine_says_so_or_is_full(now: EngineReading, waiting: int) -> None:
    assert now.waiting_for_kv == waiting
    assert replica_report("clusters/c/replicas/r", now).num_waiting_for_kv == waiting


def test_devices_that_engines_share_hold_the_blocks_of_all() -> None:
    first, second = read(VLLM_OLD)[0], read(SGLANG)[0]
    assert device_reports([first, second], [2, 3]) == [
        report_pb2.DeviceReport(index=index, total_blocks=101_000, used_blocks=60_250, evictable_blocks=35_000)
        for index in (2, 3)
    ]


def test_an_engine_that_does_not_answer_is_reported_so() -> None:
    report = unreachable_report("clusters/c/replicas/r", "refused")
    assert report.failure.reason == failure_pb2.ERROR_REASON_ENGINE_UNREACHABLE
    assert report.assignment_state == report_pb2.ASSIGNMENT_STATE_UNMANAGED
