"""Replicas that exchange KV between different GPUs have one attention backend that runs on all of them."""

from __future__ import annotations

import pytest

from hetis.engines.attention import common_backend, image_tokens
from hetis.engines.gpus import GpuKind, kind_of, kinds_in
from hetis.formats import catalogue
from hetis.formats.models.dtypes import with_precision
from hetis.solver.model import ModelSpec
from tests.models import replace
from tests.solver.instances import make_compressed

LLAMA, DEEPSEEK, SPARSE, GPT_OSS = (
    catalogue.find_model(name).model for name in ("Llama-3.1-70B", "DeepSeek-V3", "DeepSeek-V3.2", "gpt-oss-120b")
)
QWEN = catalogue.find_model("Qwen3.5-397B-A17B").model
FP8 = with_precision(LLAMA, kv="fp8")
GEMMA_3 = catalogue.find_model("gemma-3-27b-it").model
LLAMA_4 = replace(catalogue.find_model("Llama-4-Scout-17B-16E-Instruct").model, vision_params=800_000_000)
MISTRAL_3 = replace(catalogue.find_model("Mistral-7B-v0.1").model, vision_params=400_000_000)
COMPRESSED = make_compressed()
T4, A100, L40S, H100, B200, RTX5090 = 7.5, 8.0, 8.9, 9.0, 10.0, 12.0


def kinds_at(capabilities: set[float]) -> list[GpuKind]:
    """Return kinds of GPUs, one of them without a recorded capability."""
    return [GpuKind("NVIDIA", None), *(GpuKind("NVIDIA", one) for one in capabilities)]


@pytest.mark.parametrize(
    ("model", "capabilities", "told"),
    [
        (LLAMA, {A100, H100, L40S, RTX5090}, ""),  # all choose FLASH_ATTN by themselves
        (LLAMA, {H100, B200}, "FLASH_ATTN"),
        (LLAMA, {T4, A100}, "TRITON_ATTN"),
        (replace(LLAMA, head_dim=512), {H100, B200}, "TRITON_ATTN"),
        (FP8, {H100, L40S}, "FLASHINFER"),
        (FP8, {H100, B200}, "FLASHINFER"),
        (replace(FP8, head_dim=80), {H100, L40S}, "TRITON_ATTN"),
        (replace(FP8, head_dim=80), {H100, A100}, None),
        (GPT_OSS, {H100, B200}, "TRITON_ATTN"),
        (with_precision(GPT_OSS, kv="fp8"), {H100, L40S}, "TRITON_ATTN"),
        *(
            (with_precision(model, kv="fp8"), {H100, A100}, None) for model in (GPT_OSS, GEMMA_3)
        ),  # Triton alone has all
        (with_precision(GPT_OSS, weights="bf16"), {H100, A100}, "TRITON_ATTN"),
        (GEMMA_3, {H100, A100}, "TRITON_ATTN"),
        *((model, {H100, A100}, "") for model in (LLAMA_4, MISTRAL_3)),  # images are as causal as text
        (DEEPSEEK, {H100, B200}, "TRITON_MLA"),
        (DEEPSEEK, {A100, RTX5090}, ""),
        (SPARSE, {H100, B200}, "FLASHMLA_SPARSE"),
        (SPARSE, {B200}, "FLASHMLA_SPARSE"),  # the choice depends on the heads of a rank
        (SPARSE, {RTX5090}, ""),  # its only backend
        (SPARSE, {H100, RTX5090}, None),
        (COMPRESSED, {H100, B200}, ""),  # FlashMLA on both
        (COMPRESSED, {RTX5090}, ""),
        (COMPRESSED, {H100, RTX5090}, None),
        (replace(LLAMA, head_dim=256), {H100, B200}, "TRITON_ATTN"),  # FLASH_ATTN has different page sizes
        (replace(LLAMA, head_dim=256), {H100, A100}, ""),
        *((model, {B200}, "") for model in (LLAMA, FP8, GPT_OSS, GEMMA_3, DEEPSEEK)),
        *((model, set[float](), "") for model in (LLAMA, SPARSE)),
    ],
)
def test_vllm_is_told_a_backend_that_runs_on_all(model: ModelSpec, capabilities: set[float], told: str | None) -> None:
    assert common_backend(model, kinds_at(capabilities), "vllm") == told


@pytest.mark.parametrize(
    ("model", "told"),
    [
        *((model, "TRITON_ATTN") for model in (LLAMA, GPT_OSS, GEMMA_3, MISTRAL_3)),
        (DEEPSEEK, "TRITON_MLA"),
        *((model, None) for model in (FP8, SPARSE, COMPRESSED, QWEN)),
    ],
)
def test_vendors_have_tritons_kernels_in_common(model: ModelSpec, told: str | None) -> None:
    kinds = [GpuKind("AMD", None), GpuKind("NVIDIA", H100), GpuKind("NVIDIA", A100)]
    assert common_backend(model, kinds, "vllm") == told
    assert common_backend(model, kinds, "sglang") is None
    assert common_backend(model, [*kinds, GpuKind("Huawei", None)], "vllm") is None
    assert common_backend(model, [GpuKind("AMD", None)] * 2, "vllm") == ""


def test_only_the_images_of_gemma_3_are_not_divided() -> None:
    assert image_tokens(GEMMA_3) == 260
    assert not any(map(image_tokens, (LLAMA_4, MISTRAL_3, catalogue.find_model("gemma-3-1b-it").model)))


@pytest.mark.parametrize(
    ("model", "capabilities", "told"),
    [
        (LLAMA, {A100, H100, T4}, ""),
        (LLAMA, {B200}, ""),
        (LLAMA, {B200, H100}, "flashinfer"),
        (DEEPSEEK, {B200, H100}, "flashinfer"),
        (DEEPSEEK, {B200, A100}, "triton"),
        (GPT_OSS, {B200, H100}, "triton"),
        (QWEN, {B200, H100}, "triton"),
        (SPARSE, {B200, H100}, ""),
        (COMPRESSED, {B200, H100}, ""),
    ],
)
def test_sglang_is_told_one_with_pages_of_one_token(model: ModelSpec, capabilities: set[float], told: str) -> None:
    assert common_backend(model, kinds_at(capabilities), "sglang") == told


def test_kinds_are_those_of_the_card_or_of_the_fleets_own_types() -> None:
    found = {entry.gpu.name: kind_of(entry.gpu.name, {}) for entry in catalogue.gpus()}
    blackwell = {one.gpu.name for one in catalogue.gpus() if one.gpu.architecture == "RTX Blackwell"}
    assert {name for name, kind in found.items() if kind.capability == 12} == blackwell >= {"RTX-5090", "GB10"}
    assert {name for name, kind in found.items() if kind.capability is None} == {
        entry.gpu.name for entry in catalogue.gpus() if entry.gpu.vendor != "NVIDIA"
    }
    types = {"X": {"architecture": "hopper"}, "L4": {"architecture": "cdna3"}, "Y": {"vendor": "Huawei"}, "Z": None}
    types |= {"RTX-5080": {"architecture": "Blackwell"}, "W": {"vendor": "amd"}}
    own = kinds_in({"gpu_types": types})
    assert kind_of("L4", own) == GpuKind("AMD", None), "it goes before the catalogue's"
    assert kind_of("Y", own) == GpuKind("Huawei", None)
    assert kind_of("RTX-5080", own) == GpuKind("NVIDIA", 12.0)
    assert kind_of("W", own) == GpuKind("AMD", None)
    assert kind_of("X", own) == GpuKind("NVIDIA", 9.0)
    assert kind_of("unknown", own) == GpuKind("NVIDIA", None)
    assert kinds_in(None) == kinds_in({"gpu_types": []}) == {}
