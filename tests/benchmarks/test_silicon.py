"""Predictions against measured serving points: how rows are posed, virtual time, and statistics."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.accuracy import serving_points, silicon
from benchmarks.accuracy.published_points import NotPosedError
from benchmarks.accuracy.published_settings import (
    Graphs,
    Run,
    Settings,
    settings_elsewhere,
    settings_of,
    with_ranks,
)
from benchmarks.accuracy.serving_points import ServingPoint, posed
from hetis.formats import catalogue
from hetis.solver.cost import DeviceCost, intra_link, rank_shape
from hetis.solver.workload import LengthBin, moments_of
from tests.benchmarks.published import table_of

ROW = {
    "id": "made-up-1", "silicon_data_source": "source_file=made-up.csv; silicon_concurrency=4", "backend": "vllm",
    "model_path": "meta-llama/Llama-3.1-8B", "system": "h100_sxm", "precision": "", "mode": "agg", "isl": "512",
    "osl": "64", "gemm_quant_mode": "", "moe_quant_mode": "", "batch_size": "4", "tp_size": "1", "pp_size": "1",
    "attention_dp_size": "", "silicon_ttft_ms": "50", "silicon_tpot_ms": "6.5",
}  # fmt: skip


def row(**fields: str) -> dict[str, str]:
    return ROW | fields


def pose(fields: dict[str, str]) -> ServingPoint:
    (point,) = serving_points.pose(fields)
    return point


def mtp_row() -> dict[str, str]:
    image = "nvcr.io/nvidia/tensorrt-llm/release:1.2.0rc6.post3"
    return {
        "silicon_data_source": f"source_file=2026-02-05.csv; silicon_concurrency=4; image={image}; wip=False",
        "backend": "trtllm", "model_path": "deepseek-ai/DeepSeek-V3", "precision": "fp8", "tp_size": "8",
    }  # fmt: skip


def reason(**fields: str) -> str:
    with pytest.raises(NotPosedError) as caught:
        pose(row(**fields))
    return str(caught.value)


def test_a_row_is_posed_as_it_says() -> None:
    point = pose(row(model_path="Qwen/Qwen3-235B-A22B-FP8", gemm_quant_mode="fp8_block", moe_quant_mode="fp8_block"))
    assert (point.gpu, point.engine, point.kind, point.requests, point.tp) == ("H100-SXM-80GB", "vllm", "moe", 4, 1)
    assert (point.model.weight_bytes, point.model.kv_bytes, point.label) == (1.0, 2.0, "Qwen3-235B-A22B-FP8")
    assert (point.prompt_tokens, point.output_tokens, point.ttft_s, point.tpot_s) == (512, 64, 0.05, 0.0065)
    nvfp4 = pose(row(model_path="nvidia/Qwen3-32B-NVFP4", gemm_quant_mode="nvfp4", backend="trtllm"))
    assert (nvfp4.model.weight_bytes, nvfp4.model.kv_bytes) == (0.5625, 1.0)
    assert pose(row()).model.weight_bytes == 2.0
    # The batch is that of one replica; the source's number covers all replicas of a run.
    assert pose(row(batch_size="2")).requests == 2
    assert pose(row(batch_size="")).requests == 4
    # InferenceX varies lengths, and answers several tokens at once.
    inferencex = pose(row(silicon_data_source="source_file=2026-03-25.csv", backend="trtllm"))
    assert pose(row(**mtp_row())).settings.draft_tokens == 3
    assert (inferencex.shortest, inferencex.settings.stream_interval) == (0.8, 10)
    assert (point.shortest, point.settings) == (0.98, Settings(schedules_ahead=False, graph_tokens=512))
    # SGLang computes prompts separately, so that simultaneous requests stay together.
    assert pose(row(backend="sglang")).shortest == 1.0


def test_what_the_model_cannot_express_is_skipped_with_its_reason() -> None:
    assert "workers are not recorded" in reason(mode="disagg")
    assert "experts that all ranks slice" in reason(attention_dp_size="2", id="made_up_c4_tp2_ep1_3")
    assert "requests in flight" in reason(attention_dp_size="2", tp_size="2")
    assert "pipeline" in reason(pp_size="2")
    assert "a node of 8" in reason(tp_size="16")
    assert "engine steam" in reason(backend="steam")
    assert "GPU quantum" in reason(system="quantum")
    assert "model nobody/Unheard-Of" in reason(model_path="nobody/Unheard-Of")
    assert "heads" in reason(tp_size="3")
    assert "format int3" in reason(gemm_quant_mode="int3")
    assert "two formats" in reason(gemm_quant_mode="fp8", moe_quant_mode="nvfp4")
    assert reason(silicon_tpot_ms="") == "silicon_tpot_ms is not recorded"
    assert reason(batch_size="", silicon_data_source="") == "requests in flight are not recorded"
    for isl in ("0", "-5", "nan", "1e400", "1e30", "?"):
        assert reason(isl=isl) == "isl is not recorded"


def test_of_two_runs_that_rows_do_not_tell_apart_the_faster_one_drafted() -> None:
    image = "image=lmsysorg/sglang:v0.5.9-cu130"
    fields = {
        "silicon_data_source": f"source_file=2026-03-25.csv; measured=2026-03-25T00:00:00Z; {image}; wip=False",
        "backend": "sglang", "model_path": "deepseek-ai/DeepSeek-R1", "precision": "fp8", "system": "b200_sxm",
        "tp_size": "8", "isl": "1024", "osl": "1024",
    }  # fmt: skip
    found = posed(
        [row(**fields), row(**fields, silicon_tpot_ms="9"), row(**fields, silicon_tpot_ms="8", batch_size="8")]
    )
    assert [one.settings.draft_tokens if isinstance(one, ServingPoint) else one[1] for one in found] == [
        2, 0, "two scripts ran what the row names, one of them with drafts",
    ]  # fmt: skip
    alone = posed([row(**fields, batch_size="128")])[0]  # only the script with drafts ran as many
    assert isinstance(alone, ServingPoint)
    assert (alone.settings.draft_tokens, alone.settings.chunk_tokens) == (2, 16384)


def test_a_point_that_does_not_fit_in_memory_is_skipped() -> None:
    with pytest.raises(NotPosedError, match="do not fit in memory"):
        silicon.predict(pose(row(model_path="meta-llama/Llama-3.1-70B")))


def test_what_held_requests_back_unrecorded_is_skipped() -> None:
    """Four requests are in flight, but the times show that one decodes: 64 tokens at 6.5 ms are 0.4 s, TTFT is 2 s."""
    point = pose(row(silicon_ttft_ms="2000"))
    assert point.decoding == pytest.approx(4 * 0.416 / 2.416)
    with pytest.raises(NotPosedError, match="the engine's own limit is not recorded"):
        silicon.predict(point)


def test_one_request_at_a_time_takes_what_the_cost_model_says() -> None:
    """No request waits: a prompt is one iteration, every further token one at the mean context."""
    point = replace(pose(row(batch_size="1")), shortest=1.0)
    found = silicon.predict(point)
    shape, profile = rank_shape(point.model, 1), silicon.profile_of(point)
    gpu = catalogue.find_gpu(point.gpu).gpu
    moments = moments_of([LengthBin(prompt_tokens=512, output_tokens=64, weight=1.0)], block_tokens=1)
    cost = DeviceCost(point.model, profile, moments, shape, intra_link(gpu, None))
    layers = point.model.num_layers
    prompt_s = layers * (cost.dense_s(512) + cost.prefill_s(512)) + cost.head_s(1) + cost.step_s(512)
    decode = float(cost.decode_attention_s(shape.groups, shape.queries_per_group))
    token_s = layers * (cost.dense_s(1) + decode) + cost.head_s(1) + cost.step_s(1)
    assert found.ttft_s == pytest.approx(prompt_s, rel=1e-3)
    assert found.tpot_s == pytest.approx(token_s, rel=1e-3)


def test_the_room_for_kv_is_what_the_script_gives() -> None:
    """Half of the memory, or half of what weights leave, has room for fewer requests than all of it."""
    point = pose(row())
    seats = [
        silicon.stage_of(replace(point, settings=settings), 8192)[1]
        for settings in (Settings(static_share=0.9), Settings(static_share=0.5), Settings(free_share=0.5))
    ]
    memory, weights = catalogue.find_gpu(point.gpu).gpu.memory_bytes, 2.0 * point.model.params()
    share = (0.5 * memory - weights) / (0.9 * memory - weights)
    assert seats[1] / seats[0] == pytest.approx(share, rel=0.01)
    assert seats[2] == pytest.approx(
        silicon.stage_of(replace(point, settings=Settings(free_share=1.0)), 8192)[1] / 2, abs=1
    )


def test_settings_are_those_of_the_published_scripts() -> None:
    run = Run(
        engine="sglang", image="", date="", model="DeepSeek-R1", gpu="B200-SXM-180GB", precision="fp8", tp=8,
        experts=1, copies=1, requests=16, prompt_tokens=1024, output_tokens=1024,
    )  # fmt: skip

    def settings(**fields: Any) -> Settings:
        (found,) = settings_of(replace(run, **fields))
        return found

    assert settings() == Settings(
        chunk_tokens=32768, stream_interval=30, seats=128, poll_iterations=30, static_share=0.82
    )
    assert settings(requests=8).poll_iterations == 10
    assert len(settings_of(replace(run, image="v0.5.9-cu130"))) == 2
    assert settings(model="Qwen3.5-397B-A17B", tp=4).draft_tokens == 3
    assert settings(model="Qwen3.5-397B-A17B", tp=4, experts=4).draft_tokens == 0
    assert settings(engine="trtllm", requests=64) == Settings(
        chunk_tokens=1152, keeps_whole=True, stream_interval=10, wait_iterations=40, wait_tokens=921, free_share=0.8
    )
    assert settings(engine="trtllm", requests=64, precision="fp4").wait_iterations == 0
    assert settings(engine="trtllm", requests=64, prompt_tokens=8192).chunk_tokens == 8320
    mtp = {"engine": "trtllm", "image": "1.2.0rc6.post3", "requests": 4}
    assert settings(**mtp) == Settings(
        chunk_tokens=1152, keeps_whole=True, stream_interval=10, seats=4, draft_tokens=3, free_share=0.8
    )
    assert settings(**mtp | {"requests": 64}).graphs is Graphs.ALL
    # Copies wait for each other's prompts.
    copies = settings(**mtp, copies=8)
    assert (copies.draft_tokens, copies.seats, copies.balance_iterations) == (1, 4, 60)
    assert settings(**mtp, copies=8, precision="fp4").seats == 8
    experts = settings(engine="trtllm", model="gpt-oss-120b", copies=2)
    assert (experts.balance_iterations, experts.gather_iterations) == (50, 10)
    # From this day on, an iteration has room for several short prompts.
    days = ("2025-11-02", "2026-01-21")
    assert [settings(engine="trtllm", date=day).chunk_tokens for day in days] == [1152, 8192]
    # The image of scripts without drafts also ran those with drafts, from the day on which they were merged.
    shared = {"engine": "trtllm", "image": "1.1.0rc2.post2"}
    assert [settings(**shared, date=day).draft_tokens for day in ("2025-12-15", "2026-01-14")] == [0, 3]
    vllm = {"engine": "vllm", "model": "MiniMax-M2.5"}
    assert settings(**vllm) == Settings(chunk_tokens=2048, has_fp8_kv=True, graph_tokens=2048)
    assert settings(**vllm, image="nightly-5b8c30d62b75") == Settings(has_fp8_kv=True, graph_tokens=512)
    assert settings(**vllm, image="v0.17.0-cu130") == Settings(graph_tokens=512, default_experts=False)
    assert settings(**vllm, gpu="H100-SXM-80GB") == Settings(graph_tokens=512)
    assert settings(engine="vllm", model="gpt-oss-120b").graph_tokens == 2048
    assert settings(engine="vllm", model="Llama-3.1-70B").graph_tokens == 0
    # Requests are scheduled ahead, except with drafts in SGLang's first version of them, and in an old vLLM.
    assert settings().schedules_ahead
    assert not settings(model="Qwen3.5-397B-A17B", tp=4).schedules_ahead
    assert not settings_elsewhere("vllm", "").schedules_ahead
    runtime = "image=nvcr.io/nvidia/ai-dynamo/tensorrtllm-runtime:0.9.0"
    assert settings_elsewhere("trtllm", runtime).graphs is Graphs.NONE


def test_ranks_of_vllm_are_those_that_its_scripts_start() -> None:
    """Only one configuration of MiniMax-M2.5 has attention data parallelism, whatever rows state."""
    run = Run(
        engine="vllm", image="v0.19.0-cu130", date="2026-04-22", model="MiniMax-M2.5", gpu="B200-SXM-180GB",
        precision="fp4", tp=2, experts=4, copies=2, requests=128, prompt_tokens=1024, output_tokens=1024,
    )  # fmt: skip
    assert with_ranks(run) == run
    one = replace(run, copies=1, requests=256)
    for other in ({"precision": "fp8"}, {"date": "2026-04-08"}, {"prompt_tokens": 8192}):
        assert with_ranks(replace(run, **other)) == replace(one, **other)
    assert with_ranks(replace(run, requests=64)).copies == with_ranks(replace(run, tp=4, copies=4)).copies == 1
    # The first script for B200 distributed whole experts in any case.
    first = replace(run, image="v0.17.0-cu130", precision="fp8", experts=1, copies=1)
    assert with_ranks(first) == replace(first, experts=2)
    # aiconfigurator gets the ranks, too.
    named = {"id": "made_up_c64_tp4_ep4_1322", "silicon_data_source": "source_file=2026-04-06.csv", "tp_size": "4"}
    stated = {"attention_dp_size": "4", "moe_ep_size": "16", "batch_size": "16", "precision": "fp8"}
    point = pose(row(model_path="MiniMaxAI/MiniMax-M2.5", **named, **stated))
    assert (point.tp, point.copies, point.requests, point.has_whole_experts) == (4, 1, 64, True)
    beside = silicon.beside_row(point)
    assert (beside["tp_size"], beside["attention_dp_size"], beside["moe_ep_size"]) == ("4", "1", "4")
    assert beside["batch_size"] == "64"


def test_iterations_with_more_tokens_than_graphs_are_started_by_the_host() -> None:
    """vLLM has graphs of up to 512 tokens, prompts among them; decoding requests alone always have them."""
    point = pose(row())
    timing: Any = SimpleNamespace(seconds=lambda *_: 1e-3)
    seconds = silicon.iteration_time(point, timing)
    assert seconds(12, 0.0, 500, 0.0, 0.0, 13, 0) == seconds(600, 0.0, 0, 0.0, 0.0, 600, 0) == 1e-3
    assert seconds(13, 0.0, 500, 0.0, 0.0, 14, 0) == pytest.approx(32 * 28 * 21e-6)


def test_first_tokens_of_models_with_experts_take_what_those_of_dense_ones_took_outside() -> None:
    """Dense points measured 20 ms more than predicted without reading time, those with experts 50 ms with much."""
    dense, moe = row(batch_size="1"), row(batch_size="1", model_path="Qwen/Qwen3-30B-A3B")
    last = len(silicon.READINGS_S) - 1
    found = [
        tuple(
            silicon.Outcome(point=pose(fields), ttft_s=0.05 - more_s if n == place else 9.0, tpot_s=0.01 * n, seats=9)
            for n in range(last + 1)
        )
        for fields, more_s, place in ((dense, 0.02, 0), (moe, 0.05, last))
    ]
    assert [silicon.outside_iterations([one]) for one in found] == [(0, 0.02), (last, 0.05)]
    assert [(one.ttft_s, one.tpot_s) for one in silicon.answered(found)] == [(9.05, 0.01 * last), (9.02, 0.0)]


def outcome(tpot: float, ttft: float, **fields: str) -> silicon.Outcome:
    point = pose(row(**fields))
    return silicon.Outcome(point=point, ttft_s=ttft * point.ttft_s, tpot_s=tpot * point.tpot_s, seats=9)


def test_statistics_by_hand() -> None:
    outcomes = [outcome(0.9, 1.5), outcome(1.2, 0.5, id="b")]
    found = silicon.statistics(outcomes)
    assert {k: found[k] for k in ("n", "tpot_mape", "tpot_bias", "ttft_mape", "ttft_bias")} == {
        "n": 2, "tpot_mape": 0.15, "tpot_bias": 0.05, "ttft_mape": 0.5, "ttft_bias": 0.0,
    }  # fmt: skip
    assert found["tpot_p90"] == pytest.approx(0.19)
    assert (found["warmed_n"], found["warmed_ttft_mape"]) == (2, 0.5)
    dump = "db-dump/2026-02-01; silicon_concurrency=8; measured="
    days = ("2026-01-20", "2026-01-21")
    dated = [outcome(0.9, 1.1 + 0.1 * n, silicon_data_source=dump + day) for n, day in enumerate(days)]
    assert [one.point.is_warmed for one in dated] == [False, True]
    found = silicon.statistics(dated)
    assert (found["n"], found["warmed_n"], found["warmed_ttft_mape"]) == (2, 1, 0.2)
    assert silicon.statistics(dated[:1])["warmed_ttft_mape"] is None
    # The peer answers one of them, 10% too slow; ours is 20% off for the same one.
    peer: silicon.Peer = {"made-up-1": "no data", "b": (0.05, 0.00715)}
    both = silicon.peer_statistics(outcomes, peer)
    assert (both["both_n"], both["both_tpot_mape"], both["peer_tpot_mape"]) == (1, 0.2, 0.1)
    assert both["peer_ttft_mape"] == 0.0


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["silicon", *words])
    silicon.main()


def test_the_command_counts_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_of_it = [row(), row(id="2", mode="disagg"), row(id="3", silicon_tpot_ms="8", tp_size="2")]
    run(monkeypatch, "--points", str(table_of(tmp_path / "points.csv", rows_of_it)), "--json")
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    coverage = [(one["coverage"], one["n"]) for one in shown if "coverage" in one]
    assert coverage == [("covered", 2), ("skipped", 1)]
    assert sum(one["n"] for one in shown if one.get("gpu") == "all") == 2
