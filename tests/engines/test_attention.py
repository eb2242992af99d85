"""Replicas that exchange KV have one attention backend, also where an engine would choose several."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetis.engines.attention import capability_of, common_backend
from hetis.formats import catalogue
from hetis.formats.dtypes import with_precision

LLAMA, DEEPSEEK, SPARSE, GPT_OSS = (
    catalogue.find_model(name).model for name in ("Llama-3.1-70B", "DeepSeek-V3", "DeepSeek-V3.2", "gpt-oss-120b")
)
FP8 = with_precision(LLAMA, kv="fp8")
T4, A100, L40S, H100, B200, RTX5090 = "T4", "A100-SXM-80GB", "L40S", "H100-SXM-80GB", "B200-SXM-180GB", "RTX-5090"


@pytest.mark.parametrize(
    ("model", "gpus", "told"),
    [
        (LLAMA, (A100, H100, L40S, RTX5090), ""),  # FLASH_ATTN on all
        (LLAMA, (B200, "B300-SXM-288GB"), ""),
        (LLAMA, (H100, B200), "FLASH_ATTN"),
        (LLAMA, (B200, RTX5090), "FLASH_ATTN"),  # both are called Blackwell
        (LLAMA, (T4, A100), "TRITON_ATTN"),
        (FP8, (L40S, A100), ""),
        (FP8, (H100, L40S), "FLASHINFER"),
        (FP8, (H100, B200), "FLASH_ATTN"),
        (replace(FP8, head_dim=80), (H100, L40S), "TRITON_ATTN"),
        (GPT_OSS, (H100, A100), "TRITON_ATTN"),
        (GPT_OSS, (H100, B200), "FLASH_ATTN"),
        (DEEPSEEK, (H100, B200), "FLASHMLA"),
        (DEEPSEEK, (H100, A100), "TRITON_MLA"),
        (DEEPSEEK, (A100, RTX5090), ""),
        (SPARSE, (H100, B200), "FLASHMLA_SPARSE"),
        (LLAMA, ("MI300X", "MI355X", "a card of ours"), ""),
        (LLAMA, (), ""),
    ],
)
def test_vllm_is_told_a_backend_where_its_choices_differ(model: object, gpus: tuple[str, ...], told: str) -> None:
    assert common_backend(model, gpus, "vllm") == told  # type: ignore[arg-type]
    assert common_backend(model, gpus[::-1], "vllm") == told  # type: ignore[arg-type]


@pytest.mark.parametrize(("gpus", "told"), [((A100, H100, T4), ""), ((B200,), ""), ((B200, H100), "flashinfer")])
def test_sglang_is_told_one_whose_pages_are_those_of_all(gpus: tuple[str, ...], told: str) -> None:
    assert common_backend(LLAMA, gpus, "sglang") == common_backend(DEEPSEEK, gpus, "sglang") == told


def test_capabilities_are_those_of_the_card() -> None:
    found = {entry.gpu.name: capability_of(entry.gpu.name) for entry in catalogue.gpus()}
    assert {name for name, one in found.items() if one == 12} == {"RTX-5090", "RTX-PRO-6000-Server-96GB"}
    assert {name for name, one in found.items() if one is None} == {
        entry.gpu.name for entry in catalogue.gpus() if entry.gpu.vendor != "NVIDIA"
    }
