"""Latent attention under an engine: the contents of the shipped file, and a profile that uses it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from hetis.formats import catalogue
from hetis.profiler import latent
from hetis.profiler.engines import ENGINES, for_engine
from hetis.profiler.possible import implausible_fits
from hetis.profiler.roofline import matrix_flops, modelled_profile
from hetis.solver.model import ModelSpec
from hetis.solver.profile import Op
from tests.profiler.slow_starts import with_slow_starts
from tools import engine_kernels

B200 = catalogue.find_gpu("B200-SXM-180GB").gpu
A100 = catalogue.find_gpu("A100-SXM-80GB").gpu
DEEPSEEK = catalogue.find_model(latent.MODEL).model
# Rows of the table for TensorRT-LLM on B200, 16 heads, FP8: (requests, context, microseconds), (prompt, microseconds).
PUBLISHED_DECODE = ((4, 1024, 50), (64, 2048, 73), (256, 8192, 256))
PUBLISHED_PREFILL = ((1024, 110), (4096, 306), (8192, 623))
SYSTEMS = (
    ("h100_sxm", "H100-SXM-80GB"),
    ("b200_sxm", "B200-SXM-180GB"),
    ("rtx_pro_6000_server", "RTX-PRO-6000-Server-96GB"),
    ("l40s", "L40S"),
)
# Made-up coefficients: seconds, projections' FLOPs and bytes, FLOPs, then KV bytes, or bytes per token and per head.
TRUE = {Op.DECODE_ATTENTION: (4e-5, 2.0, 1.3, 0.5, 1.2), Op.PREFILL_ATTENTION: (5e-5, 2.0, 1.3, 1.5, 1e5, 8e3)}


def kernel_of(engine: str, op: Op) -> latent.LatentKernel:
    (kernel,) = (
        k for k in latent.shipped() if (k.architecture, k.engine, k.op) == ("Blackwell", engine, op.value)
    )  # fmt: skip
    return kernel


def test_the_file_says_what_the_tables_measured() -> None:
    """Return attention and its kernels' launches, with projections at the 8-bit peaks."""
    params = DEEPSEEK.attention_params() / 8
    decode, prefill = (kernel_of("trtllm", op) for op in (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION))
    for requests, context, published_us in PUBLISHED_DECODE:
        seconds = decode.fixed_s + (params + decode.byte * requests * context * 576) / B200.mem_bytes_per_s
        assert seconds * 1e6 == pytest.approx(published_us, rel=0.35)
    for tokens, published_us in PUBLISHED_PREFILL:
        pairs = tokens * (tokens + 1) / 2
        seconds = prefill.fixed_s + prefill.flop * 2 * pairs * 16 * (192 + 128) / B200.fp16_flops
        seconds += tokens * (prefill.token + 16 * prefill.head) / B200.mem_bytes_per_s
        seconds += 2 * tokens * params / matrix_flops(B200, 1.0)
        assert seconds * 1e6 == pytest.approx(published_us, rel=0.2)


def test_every_kernel_is_slower_than_memory_and_errors_are_known() -> None:
    """Triton's kernel computes longer than it reads."""
    for kernel in latent.shipped():
        assert 3e-5 < kernel.fixed_s < 2e-4
        least = 0.0 if kernel.op == Op.PREFILL_ATTENTION.value else 0.8 if kernel.flop > 5 else 1.0
        assert kernel.byte >= least
        assert kernel.mape < 0.2
        assert kernel.num_points > 900


@pytest.mark.parametrize("gpu", ["RTX-PRO-6000-Server-96GB", "L40S"])
def test_gpus_without_a_kernel_made_for_them_run_tritons_under_every_engine(gpu: str) -> None:
    """SGLang's table of an RTX PRO 6000 is of Triton's kernel, as vLLM's is; B200's stands for no other GPU."""
    card = catalogue.find_gpu(gpu).gpu
    profile = modelled_profile(card)
    of_vllm, *others = (latent.latent_fits(card, profile, engine) for engine in ("vllm", "sglang", "trtllm"))
    assert [fits == of_vllm for fits in others] == [True, True]
    assert all(gpu in fit.provenance.origin and "scaled" not in fit.provenance.origin for fit in of_vllm)
    assert latent.latent_fits(B200, modelled_profile(B200), "sglang") != latent.latent_fits(
        B200, modelled_profile(B200), "vllm"
    )


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_profile_of_an_engine_has_latent_attention_of_its_own(engine: str) -> None:
    bare = modelled_profile(B200)
    hosted = for_engine(bare, B200, engine)
    grouped = catalogue.find_model("Llama-3.1-8B").model
    for op in (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION):
        own, before = hosted.fit(op, DEEPSEEK, 8), bare.fit(op, DEEPSEEK, 8)
        assert own.pieces[0].fixed_s > before.pieces[0].fixed_s
        assert "MLA" in own.provenance.origin
        assert hosted.fit(op, grouped, 1) == bare.fit(op, grouped, 1)
    assert list(implausible_fits(hosted, B200)) == []
    assert for_engine(hosted, B200, engine) == hosted


def test_sglang_has_the_kernels_of_tensorrt_llm() -> None:
    assert latent.latent_fits(B200, modelled_profile(B200), "sglang") == latent.latent_fits(
        B200, modelled_profile(B200), "trtllm"
    )


def test_what_was_not_measured_is_scaled_from_hopper_and_says_so() -> None:
    fits = latent.latent_fits(A100, modelled_profile(A100), "vllm")
    assert {fit.scope.queries_per_group for fit in fits} == {128, 64}
    assert all(fit.provenance.origin.endswith("scaled from Hopper") for fit in fits)


def test_only_the_gpu_of_the_table_has_the_errors_of_a_measured_one() -> None:
    """Others of its architecture have the range of GPUs never seen, as their dense products have."""
    unseen = {
        name: {fit.provenance.range_error for fit in latent.latent_fits(gpu, modelled_profile(gpu), "vllm")}
        for name, gpu in (
            (name, catalogue.find_gpu(name).gpu) for name in ("H100-SXM-80GB", "H200-SXM-141GB", "A100-SXM-80GB")
        )
    }
    dense = modelled_profile(catalogue.find_gpu("T4").gpu).fits[0].provenance.range_error
    assert dense is not None
    assert unseen == {"H100-SXM-80GB": {None}, "H200-SXM-141GB": {dense}, "A100-SXM-80GB": {dense}}


def rows_of(op: Op, gpu_name: str, model: ModelSpec) -> list[dict[str, object]]:
    gpu, true, rows = catalogue.find_gpu(gpu_name).gpu, TRUE[op], []
    lengths = (64, 512, 2048, 16384)
    shapes = itertools.product((8, 16, 32, 128), (1, 4, 32, 128), lengths, (("bfloat16", 2.0), ("fp8_block", 1.0)))
    for heads, batch, length, (gemm, weights) in shapes:
        step, tokens = (length, 1) if op is Op.DECODE_ATTENTION else (0, length)
        params, context = model.attention_params() * heads / 128, step + tokens
        seconds = true[0] + true[1] * 2 * batch * tokens * params / matrix_flops(gpu, weights)
        seconds += true[2] * weights * params / gpu.mem_bytes_per_s
        if op is Op.DECODE_ATTENTION:
            seconds += true[3] * 2 * batch * context * heads * (2 * 512 + 64) / gpu.fp16_flops
            seconds += true[4] * batch * context * 576 * 2 / gpu.mem_bytes_per_s
        else:
            pairs = batch * tokens * (tokens + 1) / 2
            seconds += true[3] * 2 * pairs * heads * (192 + 128) / gpu.fp16_flops
            seconds += batch * tokens * (true[4] + heads * true[5]) / gpu.mem_bytes_per_s
        rows.append(
            {
                "model": latent.MODEL, "gemm_type": gemm, "kv_cache_dtype": "bfloat16", "num_heads": heads,
                "batch_size": batch, "isl": tokens, "step": step, "latency": seconds * 1e3,
            }
        )  # fmt: skip
    return rows


def test_made_up_tables_give_back_what_made_them(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for system, name in SYSTEMS:
        for engine, version in (("vllm", "0.24.0"), ("trtllm", "1.3.0rc20")):
            for op, phase in ((Op.DECODE_ATTENTION, "generation"), (Op.PREFILL_ATTENTION, "context")):
                rows = rows_of(op, name, DEEPSEEK)
                others = [row | {"model": "other", "latency": 1e3} for row in rows]
                others += [row | {"gemm_type": "fp8", "latency": 1e3} for row in rows]
                path = tmp_path / system / "mla" / engine / version / f"mla_{phase}_module_perf.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                parquet.write_table(pyarrow.Table.from_pylist([*rows, *others]), path)
    assert engine_kernels.main(["latent", "--tables", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 0
    made = json.loads((tmp_path / "out.json").read_text())["kernels"]
    assert len(made) == 12
    for kernel in made:
        true = TRUE[Op(kernel["op"])]
        names = ("fixed_s", "flop", "byte") if len(true) == 5 else ("fixed_s", "flop", "token", "head")
        found = np.array([kernel[name] for name in names])
        assert found == pytest.approx(np.array([true[0], *true[3:]]), rel=0.03)
    assert engine_kernels.main(["latent", "--tables", str(tmp_path / "none"), "--out", str(tmp_path / "out.json")]) == 1


def test_the_fixed_time_of_two_projections_is_not_charged_twice() -> None:
    slow = with_slow_starts(modelled_profile(B200))
    assert all(fit.pieces[0].fixed_s == 0 for fit in latent.latent_fits(B200, slow, "vllm"))
