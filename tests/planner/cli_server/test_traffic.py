"""traffic: what was measured as a table of 80 columns, as data, and as a workload that place takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetis.formats.workload import load_workload
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.convert.traffic import HOUR_S, MINUTE_S, TrafficWindow
from hetis.solver.traffic import SECONDS, TOKENS, Histogram, TrafficSketch
from hetis.v1 import cluster_pb2, cluster_service_pb2, traffic_pb2
from tests.planner.cli_server.conftest import Run
from tests.planner.client.fake_planner import FakePlanner

NOW_S = 500_000 * HOUR_S + 1800


def sketch(seconds: float, rate: float) -> TrafficSketch:
    num = seconds * rate
    return TrafficSketch(
        seconds=seconds,
        arrivals=num,
        cached_tokens=num * 100,
        prompt_tokens=Histogram.of_buckets(TOKENS, {1000.0: num / 2, 2000.0: num}, 1000 * num),
        output_tokens=Histogram.of_buckets(TOKENS, {500.0: num}, 250 * num),
        ttft_s=Histogram.of_buckets(SECONDS, {0.25: num, 0.5: num}, 0.2 * num),
        tpot_s=Histogram.of_buckets(SECONDS, {0.05: num}, 0.02 * num),
    )


def measured(*models: str) -> traffic_pb2.ClusterTraffic:
    minutes = [(MINUTE_S, NOW_S - (60 - at) * MINUTE_S, 4.0) for at in range(60)]
    hours = [(HOUR_S, NOW_S - 1800 - hours * HOUR_S, rate) for hours, rate in ((24, 2.0), (168, 3.0))]
    windows = (
        TrafficWindow(model=model, span_s=span_s, start_s=start_s, traffic=sketch(span_s, rate))
        for model in models
        for span_s, start_s, rate in (*hours, *minutes)
    )
    return traffic_pb2.ClusterTraffic(name="clusters/paper/traffic", windows=(one.to_proto() for one in windows))


def test_the_table_has_now_and_the_same_hour_before(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.traffic = measured("Llama-2-70B")
    out = hetis_plan("traffic", "paper").out
    assert max(len(line) for line in out.splitlines()) <= 80
    rows = {line[:18].strip(): line[18:].split() for line in out.splitlines()}
    assert rows["last hour"][0] == rows["last 5 min"][0] == "4.00"
    assert (rows["hour yesterday"][0], rows["hour last week"][0]) == ("2.00", "3.00")
    assert rows["last hour"][1] == "1000"


def test_the_workload_is_what_place_reads(fleet: FakePlanner, hetis_plan: Run, tmp_path: Path) -> None:
    fleet.traffic = measured("Llama-2-70B")
    file = tmp_path / "workload.yaml"
    shown = hetis_plan("traffic", "paper", "--last", "30m", "--out", str(file))
    assert "7200 requests in 0.5 h, 4/s, 1000/250 tokens" in shown.err
    workload = load_workload(str(file))
    moments = workload.moments()
    assert (moments.mean_prompt, moments.mean_output) == (pytest.approx(1000), pytest.approx(250))
    assert (workload.rate_rps, workload.prefix_hit_rate) == (pytest.approx(4), pytest.approx(0.1))


def test_a_model_is_named_where_there_are_several(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.traffic = measured("one", "two")
    assert "give --model, one of one, two" in hetis_plan("traffic", "paper", "--out", "-", code=ExitCode.CONFLICT).err
    hetis_plan("traffic", "paper", "--model", "two", "--out", "-")
    shown = hetis_plan("traffic", "paper", "--model", "three", code=ExitCode.CONFLICT)
    assert "no traffic of three was measured; models: one, two" in shown.err


def test_nothing_measured_says_where_it_would_come_from(fleet: FakePlanner, hetis_plan: Run) -> None:
    assert "nothing was measured yet: agents read the /metrics of engines" in hetis_plan("traffic", "paper").err
    hetis_plan("traffic", "paper", "--out", "-", code=ExitCode.CONFLICT)


@pytest.mark.parametrize("last", ["", "1w", "0h", "16d", "99999h", "h"])
def test_a_duration_that_is_none_is_refused(fleet: FakePlanner, hetis_plan: Run, last: str) -> None:
    shown = hetis_plan("traffic", "paper", "--last", last, code=ExitCode.INVALID)
    assert "must be a duration up to 15d, such as 30m, 12h or 7d" in " ".join(shown.err.replace("│", "").split())


def test_data_is_the_message(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.traffic = measured("one")
    data = json.loads(hetis_plan("traffic", "-o", "json").out)
    assert data["windows"][0]["span"] == "3600s"


def test_the_mode_is_set_and_the_rest_of_the_policy_kept(fleet: FakePlanner, hetis_plan: Run) -> None:
    shown = hetis_plan("traffic", "paper", "--mode", "automatic")
    update = next(one for one in fleet.requests if isinstance(one, cluster_service_pb2.UpdateClusterRequest))
    assert update.update_mask.paths == ["policy.traffic"]
    assert update.cluster.policy == cluster_pb2.ClusterPolicy(traffic=cluster_pb2.REACTION_MODE_AUTOMATIC)
    assert "clusters/paper: automatic from now on" in shown.err


def test_speeds_and_the_decision_are_shown(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.traffic = measured("one")
    fleet.traffic.attainment = 0.981
    for replica, ratio, devices in (("", 1.02, []), ("clusters/paper/replicas/r-1", 1.5, ["a100-0/1"])):
        fleet.traffic.speeds.add(
            replica=replica, gpu_types=["L4"], tpot_s=0.05 * ratio, expected_tpot_s=0.05, correction_ratio=ratio,
            error_ratio=0.04, is_slow=bool(replica), devices=devices,
        )  # fmt: skip
    fleet.traffic.decision.reason = "More is expected."
    fleet.traffic.decision.plan = "plans/new"
    fleet.traffic.decision.desired.add(shape="L4 TP1 32 layers", desired=4, in_force=2)
    out = hetis_plan("traffic", "paper").out
    assert max(len(line) for line in out.splitlines()) <= 80
    words = " ".join(out.split())
    assert "98.1% of the first tokens of the last 15 min came within the plan's limit" in words
    assert "r-1 L4 75.0 ms 50.0 ms 1.50 ± 0.04" in words
    assert "slow:" in words
    assert "a100-0/1" in words
    assert "More is expected. Proposed: plans/new. 4 (in force: 2) × L4 TP1 32 layers" in words
