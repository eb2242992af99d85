"""The memory that engines take, against what their users reported, and how it moves with settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.engines.gpus import reported_bytes
from hetis.engines.loaded_weights import bytes_beyond_stored
from hetis.engines.memory import (
    GIB,
    EngineMemory,
    Start,
    block_tokens,
    default_start,
    kv_bytes_of_request,
    longest_context,
    memory_of,
    requests_in,
    room_of,
)
from hetis.engines.versions import Engine
from hetis.formats import catalogue
from hetis.formats.documents import load_model
from hetis.formats.models.dtypes import with_precision
from hetis.solver.model import DraftShape, ModelSpec

FOLDER = Path(__file__).parents[1] / "formats" / "huggingface"
H100, A100, RTX3090 = (catalogue.find_gpu(name).gpu for name in ("H100-SXM-80GB", "A100-PCIe-80GB", "RTX-3090"))
LLAMA, GPT = load_model("Meta-Llama-3.1-8B"), load_model("gpt-oss-120b")
HYBRID = replace(
    with_precision(load_model("Qwen3.5-27B"), weights="int4", kv="fp8"), draft=DraftShape(tokens=3, acceptance=0.7)
)
NEWEST = memory_of(Engine.VLLM)


def kv_gib(model: ModelSpec, start: Start, gpu: object = H100) -> float:
    return room_of(model, gpu, start).kv_bytes / GIB  # type: ignore[arg-type]


def test_gpt_oss_does_not_start_on_an_h100_with_the_defaults_of_august_2025_and_with_fewer_tokens_has_little_room() -> (
    None
):
    """vLLM issues 23278 (-2.14 GiB, 65.97 GiB of weights) and 27508 (1.71 GiB at 0.95 and 1,024 tokens)."""
    start = default_start(memory_of(Engine.VLLM, "0.10.1"), H100)
    assert (start.max_num_seqs, start.batched_tokens) == (1024, 8192)
    room = room_of(GPT, H100, start)
    assert room.kv_bytes / GIB == pytest.approx(-2.14, abs=0.1)
    assert room.weight_bytes / GIB == pytest.approx(65.97, rel=0.005)
    assert longest_context(room, GPT, H100, start) == 0
    less = replace(start, batched_tokens=1024, utilisation=0.95)
    assert kv_gib(GPT, less) == pytest.approx(1.71, rel=0.1)


def test_logits_and_sampling_of_all_requests_take_most_of_a_large_models_start() -> None:
    """Four H100 hold 8.11 GiB and 178,880 tokens of Qwen3-235B-FP8 with 1,024 requests (vLLM issue 21348)."""
    model = with_precision(load_model("Qwen3-235B-A22B"), weights="fp8")
    start = default_start(memory_of(Engine.VLLM, "0.9.2"), H100, tp=4)
    room = room_of(model, H100, start)
    assert room.kv_bytes / GIB == pytest.approx(8.11, rel=0.05)
    assert requests_in(room, model, H100, start, 40_960) * 40_960 == pytest.approx(178_880, rel=0.05)
    assert kv_gib(model, replace(start, max_num_seqs=256)) > 11.0


@pytest.mark.parametrize(("tokens", "reported"), [(2048, 5.8), (20_000, 3.81)])
def test_the_largest_batch_takes_memory_for_each_of_its_tokens(tokens: int, reported: float) -> None:
    """Llama 3.1 8B on an RTX 3090 (vLLM issue 10517)."""
    start = Start(rules=memory_of(Engine.VLLM, "0.6.4"), max_num_seqs=32, batched_tokens=tokens)
    assert kv_gib(LLAMA, start, RTX3090) == pytest.approx(reported, rel=0.03)


def test_blocks_of_hybrids_hold_a_state_and_every_request_takes_some_for_its_states() -> None:
    """Two RTX 3090 hold 11.05 GiB and 623,873 tokens with three drafts (club-3090 issue 642), in blocks of 1,568."""
    assert block_tokens(HYBRID, 2) == 1568
    start = Start(rules=memory_of(Engine.VLLM, "0.22"), max_num_seqs=2, batched_tokens=8192, tp=2, utilisation=0.92)
    room = room_of(HYBRID, RTX3090, start)
    assert room.kv_bytes / GIB == pytest.approx(11.05, rel=0.05)
    assert requests_in(room, HYBRID, RTX3090, start, 262_144) * 262_144 == pytest.approx(623_873, rel=0.05)


def test_compressed_attention_is_held_in_blocks_as_wide_as_all_entries() -> None:
    """7.28 KiB per token of 912,128 (Flash, vLLM issue 51041), 23.32 GiB for 1,048,576 tokens on AMD (Pro, 53961)."""
    flash, pro = (load_model(FOLDER / f"deepseek-ai__DeepSeek-V4-{name}.json") for name in ("Flash", "Pro"))
    of_flash = kv_bytes_of_request(flash, 912_128, memory_of(Engine.VLLM, "0.26"))
    assert of_flash / 912_128 / 1024 == pytest.approx(7.28, rel=0.01)
    of_pro = kv_bytes_of_request(pro, 1_048_576, memory_of(Engine.VLLM, "0.28"), vendor="AMD")
    assert of_pro / GIB == pytest.approx(23.32, rel=0.05)


def test_sglang_computes_its_share_from_the_memory() -> None:
    rules = memory_of(Engine.SGLANG)
    start = default_start(rules, H100, tp=4)
    assert rules.share_of(start, reported_bytes(H100)) == pytest.approx(0.83, abs=0.01)


def test_memory_that_others_hold_lessens_the_room_only_where_it_exceeds_what_the_engine_leaves() -> None:
    start = default_start(NEWEST, H100)
    assert kv_gib(LLAMA, replace(start, in_use_bytes=GIB)) == kv_gib(LLAMA, start)
    assert kv_gib(LLAMA, replace(start, in_use_bytes=20 * GIB)) == pytest.approx(kv_gib(LLAMA, start) - 14.17, abs=0.1)


@pytest.mark.parametrize(
    ("version", "first"), [("0.6.3", "0.0"), ("v0.11.0", "0.8"), ("0.11.1", "0.11.1"), ("1.0", "0.27")]
)
def test_a_version_has_the_numbers_of_the_latest_change_before_it(version: str, first: str) -> None:
    assert memory_of(Engine.VLLM, version).version == first


def test_a_version_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'nightly' is not a version such as 0\.32\.0"):
        memory_of(Engine.VLLM, "nightly")


@given(
    rules=st.sampled_from([memory_of(Engine.VLLM, v) for v in ("0.6", "0.10", "0.14", "0.19", "0.32")]),
    tokens=st.integers(64, 16_384),
    requests=st.integers(1, 1024),
    model=st.sampled_from([LLAMA, GPT, HYBRID]),
)
def test_more_tokens_or_requests_never_leave_more_for_kv(
    rules: EngineMemory, tokens: int, requests: int, model: ModelSpec
) -> None:
    start = Start(rules=rules, max_num_seqs=requests, batched_tokens=tokens)
    room = kv_gib(model, start, A100)
    assert kv_gib(model, replace(start, batched_tokens=2 * tokens), A100) <= room
    assert kv_gib(model, replace(start, max_num_seqs=2 * requests), A100) <= room
    assert kv_gib(model, replace(start, eager=True), A100) >= room


@given(context=st.integers(1, 200_000), model=st.sampled_from([LLAMA, GPT, HYBRID]))
def test_a_longer_request_takes_no_less(context: int, model: ModelSpec) -> None:
    assert kv_bytes_of_request(model, context, NEWEST) <= kv_bytes_of_request(model, context + 1000, NEWEST)


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    name=st.sampled_from(["Meta-Llama-3.1-8B", "deepseek-ai/DeepSeek-V3", "gpt-oss-120b"]),
)
def test_ranks_together_load_at_least_what_is_stored_and_more_the_more_they_are(tp: int, name: str) -> None:
    model = load_model(name)
    beyond = bytes_beyond_stored(model, H100, tp)
    assert beyond >= 0.0
    assert tp * beyond <= 2 * tp * bytes_beyond_stored(model, H100, 2 * tp) + 1e-6


def test_ranks_of_deepseek_hold_latent_projections_indexers_and_routers_whole() -> None:
    """R1 and V3.2 in FP8 took 79.74 and 80.76 GiB of each of eight H200 (starts of vllm-memory-estimator)."""
    for name, loaded in (("deepseek-ai__DeepSeek-V3", 79.74), ("deepseek-ai__DeepSeek-V3.2", 80.76)):
        model, gpu = load_model(FOLDER / f"{name}.json"), catalogue.find_gpu("H200-SXM-141GB").gpu
        room = room_of(model, gpu, default_start(memory_of(Engine.VLLM, "0.18"), gpu, tp=8))
        assert room.weight_bytes / GIB == pytest.approx(loaded, rel=0.01)


def test_communicators_of_an_nvswitch_count_since_0_17_and_stages_have_none() -> None:
    """Two ranks of Qwen2.5-72B left 3.04 GiB of an H100 at 0.95 (vLLM 0.19, llm-d-planner); one rank less 1.8 GiB."""
    model = load_model("Qwen2.5-72B-Instruct")
    start = replace(default_start(memory_of(Engine.VLLM, "0.19"), H100, tp=2), utilisation=0.95)
    assert kv_gib(model, start) == pytest.approx(3.04, abs=0.1)
    older = replace(start, rules=replace(start.rules, counts_links=False))
    assert kv_gib(model, older) - kv_gib(model, start) == pytest.approx(1.8, abs=0.01)
    stages = replace(start, tp=1, stages=2)
    assert kv_gib(LLAMA, stages) == kv_gib(LLAMA, replace(stages, rules=older.rules))
