"""The table of GPUs and precisions is complete, and gives reasons for refusals."""

from __future__ import annotations

import pytest

from hetis.engines.gpus import CAPABILITIES
from hetis.engines.precision import SUPPORT, refusal_of, remarks
from hetis.formats import catalogue
from hetis.formats.models.dtypes import PRECISIONS, with_precision
from hetis.solver.cluster import GpuType
from hetis.solver.model import Kernel, ModelSpec
from tests.models import replace
from tests.solver.instances import make_compressed

LLAMA, DEEPSEEK = catalogue.find_model("Llama-3.1-70B").model, catalogue.find_model("DeepSeek-V3").model
V100, T4, A100, L4, H100, B200, MI300X, MI355X = (
    catalogue.find_gpu(name).gpu
    for name in ("V100-SXM2-32GB", "T4", "A100-SXM-80GB", "L4", "H100-SXM-80GB", "B200", "MI300X", "MI355X")
)


def why_not(model: ModelSpec, gpu: GpuType, engine: str) -> str | None:
    refusal = refusal_of(model, gpu, engine)
    return None if refusal is None else str(refusal)


@pytest.mark.parametrize(
    ("weights", "kv", "runs_on", "not_on"),
    [
        ("fp8", None, (T4, A100, H100), (V100,)),
        ("fp8", "fp8", (A100, H100), (V100, T4)),
        ("mxfp4", None, (MI355X,), (V100, A100, H100, B200, MI300X)),  # no experts, and CDNA4 alone has such products
        ("awq-int4", None, (T4, A100), (V100,)),
        ("nvfp4", None, (A100, B200), (V100,)),
    ],
)
def test_what_vllm_runs(weights: str, kv: str | None, runs_on: tuple[object, ...], not_on: tuple[object, ...]) -> None:
    model = with_precision(LLAMA, weights=weights, kv=kv)
    for gpu in runs_on:
        assert why_not(model, gpu, "vllm") is None  # type: ignore[arg-type]
    for gpu in not_on:
        assert why_not(model, gpu, "vllm") is not None  # type: ignore[arg-type]


def test_refusals_say_what_is_missing_and_where_that_was_read() -> None:
    assert why_not(with_precision(LLAMA, weights="fp8"), V100, "vllm") == (
        "vllm 0.32.0 needs compute capability 7.5 or higher for fp8 weights, V100-SXM2-32GB (Volta) has 7 "
        "(vLLM's repository, vllm/model_executor/layers/quantization/fp8.py)"
    )
    assert "mxfp4 is a format of experts" in str(why_not(with_precision(LLAMA, weights="mxfp4"), H100, "sglang"))
    assert "for fp8 KV (in 16 bits: --kv bf16), T4" in str(why_not(with_precision(LLAMA, kv="fp8"), T4, "vllm"))
    for gpu in (B200, MI300X):
        assert why_not(replace(LLAMA, kv_bytes=0.5625), gpu, "sglang") == (
            "KV in nvfp4 is not modelled for sglang, KV in 8 or 16 bits is: --kv fp8 or --kv bf16"
        )


def test_fp8_kv_of_latent_attention_takes_newer_gpus() -> None:
    model = with_precision(DEEPSEEK, kv="fp8")
    assert why_not(model, A100, "vllm") is not None
    assert why_not(model, L4, "vllm") is None
    assert why_not(replace(model, kv_bytes=2.0), A100, "vllm") is None


@pytest.mark.parametrize("name", ["gpt-oss-120b", "gemma-3-27b"])
def test_fp8_kv_takes_newer_gpus_where_triton_reads_it(name: str) -> None:
    """FlashInfer, which reads it on Ampere, has neither sinks nor images that are seen at once."""
    model = with_precision(catalogue.find_model(name).model, kv="fp8")
    assert "8.9 or higher for fp8 KV" in str(why_not(model, A100, "vllm"))
    assert why_not(model, L4, "vllm") is None
    assert why_not(with_precision(LLAMA, kv="fp8"), A100, "vllm") is None
    assert "8.9 or higher" in str(why_not(replace(with_precision(LLAMA, kv="fp8"), head_dim=96), A100, "vllm"))


def test_sparse_attention_takes_hopper_under_vllm() -> None:
    model = catalogue.find_model("DeepSeek-V3.2").model
    assert [why_not(model, gpu, "vllm") for gpu in (H100, B200)] == [None, None]
    assert "needs compute capability 9 or higher for sparse attention, L4" in str(why_not(model, L4, "vllm"))
    assert why_not(model, L4, "sglang") is None
    assert why_not(replace(model, indexer=None), L4, "vllm") is None


def test_compressed_attention_takes_hopper_and_kv_in_8_bits() -> None:
    model = replace(make_compressed(), kv_bytes=1.0)
    assert why_not(model, H100, "vllm") is None
    assert why_not(model, B200, "vllm") is None
    assert "needs compute capability 9 or higher for compressed attention, L4" in str(why_not(model, L4, "vllm"))
    in_16_bits = replace(model, kv_bytes=2.0)
    assert why_not(in_16_bits, H100, "vllm") == (
        "the kernels that vllm chooses for compressed attention keep KV in 8 bits: --kv fp8"
    )
    assert why_not(in_16_bits, H100, "sglang") is None


def test_what_nobody_recorded_is_not_refused() -> None:
    assert why_not(with_precision(LLAMA, weights="fp8"), MI300X, "vllm") is None


def test_on_ascend_and_tpu_what_is_not_known_to_run_is_refused() -> None:
    ascend, tpu = (catalogue.find_gpu(name).gpu for name in ("Ascend 910B", "TPU v6e"))
    assert why_not(LLAMA, ascend, "vllm") is why_not(LLAMA, tpu, "vllm") is None
    assert why_not(with_precision(DEEPSEEK, weights="bf16"), ascend, "vllm") is None
    assert why_not(with_precision(LLAMA, weights="nvfp4"), ascend, "vllm") == (
        "a model with nvfp4 weights is not known to run on Ascend-910B-64GB, one with bf16 or int8 is "
        "(vllm-project/vllm-ascend at 182b75e, docs/source/user_guide/support_matrix)"
    )
    assert "latent attention is not known to run on TPU-v6e" in str(
        why_not(with_precision(DEEPSEEK, weights="bf16"), tpu, "vllm")
    )
    assert "KV in fp8 is not known to run on Ascend" in str(why_not(with_precision(LLAMA, kv="fp8"), ascend, "vllm"))
    assert "one with bf16 or int8 or awq-int4 is" in str(why_not(with_precision(LLAMA, weights="fp8"), tpu, "vllm"))
    assert "sglang is not known to run on TPU-v6e, vllm is" in str(why_not(LLAMA, tpu, "sglang"))


@pytest.mark.parametrize("weights", ["bnb-int4", "bnb-int8"])
def test_vllm_does_not_load_bitsandbytes_whatever_the_gpu(weights: str) -> None:
    model = with_precision(LLAMA, weights=weights)
    for gpu in (H100, MI300X):
        for engine in ("vllm", "vllm-hetis"):
            assert why_not(model, gpu, engine) == (
                f"{engine} 0.32.0 does not load {weights} weights: it has no quantisation method bitsandbytes "
                "(vLLM's repository, vllm/model_executor/layers/quantization/__init__.py)"
            )
        assert why_not(model, gpu, "sglang") is None


def test_gpus_that_only_keep_the_format_are_told() -> None:
    model = with_precision(LLAMA, weights="fp8")
    gpus = {"A100": A100, "H100": H100}
    assert list(remarks(model, gpus, "vllm")) == ["A100: weights are fp8, products 16-bit (Marlin)"]
    assert not list(remarks(LLAMA, gpus, "vllm"))


def test_models_that_overflow_in_float16_need_gpus_with_bfloat16() -> None:
    gemma, t4 = catalogue.find_model("gemma-2-9b").model, catalogue.find_gpu("T4").gpu
    assert not gemma.float16
    assert "needs bfloat16" in (why_not(gemma, t4, "vllm") or "")
    assert why_not(gemma, A100, "vllm") is None
    assert why_not(LLAMA, t4, "vllm") is None


def test_every_row_has_a_source() -> None:
    for support in SUPPORT.values():
        rows = [support.engine, *support.weights.values(), *support.fp8_kv.values()]
        assert all(row.source and row.capability in CAPABILITIES.values() for row in rows)
        assert support.weights.keys() <= PRECISIONS.keys()
        assert set(support.fp8_kv) <= set(Kernel)
    assert {entry.gpu.architecture for entry in catalogue.gpus() if entry.gpu.vendor == "NVIDIA"} <= CAPABILITIES.keys()
