"""Experts' kernels under an engine: the contents of the shipped file, and a profile that uses it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hetis.formats import catalogue
from hetis.formats.models.dtypes import with_weight_bytes
from hetis.profiler import experts
from hetis.profiler.engines import ENGINES, for_engine
from hetis.profiler.possible import implausible_fits
from hetis.profiler.roofline import matrix_flops, modelled_profile
from hetis.solver.cluster import GpuType
from hetis.solver.cost import DeviceCost, intra_link, rank_shape
from hetis.solver.model import ModelSpec
from hetis.solver.profile import Op, Piece, Profile
from hetis.solver.workload import LengthBin, moments_of
from tests.models import InShort, replace
from tools import engine_kernels

B200 = catalogue.find_gpu("B200-SXM-180GB").gpu
GPT_OSS = catalogue.find_model("openai/gpt-oss-120b").model
MIXTURE = with_weight_bytes(catalogue.find_model("Qwen/Qwen3-235B-A22B").model, 1.0)
# Three rows of the table: 256 experts of 3072 x 768 on a rank, 8 of a token, fp8: tokens, microseconds.
PUBLISHED = ((1, 31.3), (128, 292.9), (1024, 441.1))
TRUE = ((3e-5, 2.0, 1.25), (2e-5, 3.0, 1.1))  # made-up coefficients of slices and of whole experts


def cost(profile: Profile, model: ModelSpec, tp: int = 4) -> DeviceCost:
    shape = rank_shape(model, tp)
    assert shape is not None
    moments = moments_of([LengthBin(prompt_tokens=100, output_tokens=100, weight=1.0)], block_tokens=16)
    return DeviceCost(model, profile, moments, shape, intra_link(B200, None))


def test_the_file_says_what_the_table_measured() -> None:
    wanted = ("Blackwell", "vllm", "fp8", False, None)
    (kernel,) = (k for k in experts.shipped() if (k.architecture, k.engine, k.weights, k.whole, k.ranks) == wanted)
    for tokens, published_us in PUBLISHED:
        expert, moved = 3 * 3072 * 768, 4 * 2 * tokens * 8 * (3072 + 768)
        seconds = kernel.fixed_s + kernel.flop * 2 * tokens * 8 * expert / matrix_flops(B200, 1.0)
        seconds += kernel.byte * (min(256, 8 * tokens) * expert + moved) / B200.mem_bytes_per_s
        assert seconds * 1e6 == pytest.approx(published_us, rel=0.35)


def test_every_kernel_obeys_the_peaks() -> None:
    """Bytes may seem to beat the peak: small batches of the fastest tables were partly served by a cache of 126 MB.

    With four-bit weights on RTX Blackwell, uneven routing adds to it: fewer experts are read than the fit assumes, and
    what starts a kernel takes longest there.
    """
    for kernel in experts.shipped():
        assert kernel.fixed_s > 0
        assert kernel.flop >= 0  # where activations take most of the time, they explain all of it
        has_slow_starts = kernel.architecture == "RTX Blackwell" and kernel.weights == "nvfp4"
        assert kernel.byte >= (0.6 if has_slow_starts else 0.7)
        assert kernel.mape < 0.4


def test_whole_experts_begin_sooner_and_wait_for_the_rank_with_the_most_tokens() -> None:
    """FP8 experts under TensorRT-LLM on four H100: whole ones, or a quarter of each, on a rank."""
    wanted = ("Hopper", "trtllm", "fp8", 4)
    kernels = [k for k in experts.shipped() if (k.architecture, k.engine, k.weights, k.ranks) == wanted]
    sliced, whole = sorted(kernels, key=lambda kernel: kernel.whole)
    assert whole.fixed_s < sliced.fixed_s
    assert whole.flop > sliced.flop


@pytest.mark.parametrize("engine", list(ENGINES))
def test_experts_are_taken_out_of_the_dense_products(engine: str) -> None:
    bare, hosted = modelled_profile(B200), for_engine(modelled_profile(B200), B200, engine)
    moe, tokens = MIXTURE.experts, 16
    expert = MIXTURE.expert_params()
    read = moe.count * (1 - (1 - moe.active / moe.count) ** tokens)
    of_experts, of_rest = hosted.fit(Op.EXPERTS, MIXTURE, 4), bare.fit(Op.DENSE, MIXTURE, 4)
    moved = 4 * 2 * tokens * moe.active * (MIXTURE.hidden + moe.width / 4)
    flops = 2 * tokens * moe.active * expert / 4
    routed_s = of_experts.seconds(flops=flops, num_bytes=read * expert / 4 + moved)
    active = MIXTURE.active_layer_params() - moe.active * expert
    touched = MIXTURE.touched_layer_params(tokens) - read * expert
    rest_s = of_rest.seconds(flops=2 * tokens * active / 4, num_bytes=touched / 4 + 16 * MIXTURE.hidden * tokens)
    # Of the four products that the dense fit launches two remain, because the model has no shared experts.
    two_s = min(piece.fixed_s for piece in of_rest.pieces) / 2
    assert cost(hosted, MIXTURE).dense_s(tokens) == pytest.approx(routed_s + rest_s - two_s, rel=1e-9)
    shared = replace(MIXTURE, moe=vars(InShort(MIXTURE).moe) | {"shared_experts": 1})
    added = 3 * MIXTURE.hidden * moe.width
    more_s = of_rest.seconds(
        flops=2 * tokens * (active + added) / 4, num_bytes=(touched + added) / 4 + 16 * MIXTURE.hidden * tokens
    )
    assert cost(hosted, shared).dense_s(tokens) == pytest.approx(routed_s + more_s, rel=1e-9)
    assert list(implausible_fits(hosted, B200)) == []


def test_models_without_experts_and_formats_without_kernels_stay_as_they_were() -> None:
    bare, hosted = modelled_profile(B200), for_engine(modelled_profile(B200), B200, "vllm")
    for model in (catalogue.find_model("Llama-3.1-8B").model, replace(MIXTURE, weights="int8", weight_bytes=1.25)):
        assert cost(hosted, model).dense_s(16) == cost(bare, model).dense_s(16)


@pytest.mark.parametrize("gpu", ["H100-SXM-80GB", "L40S", "A100-SXM-80GB"])
def test_mxfp4_experts_start_with_their_layer_read_as_dense_products_do_and_multiply_as_the_tables_say(
    gpu: str,
) -> None:
    kind = catalogue.find_gpu(gpu).gpu
    bare, hosted = modelled_profile(kind), for_engine(modelled_profile(kind), kind, "vllm")
    dense, of_experts = bare.fit(Op.DENSE, GPT_OSS, 1), hosted.fit(Op.EXPERTS, GPT_OSS, 1)
    (piece,) = of_experts.pieces
    assert (piece.fixed_s, piece.byte_s) == (0.0, max(each.byte_s for each in dense.pieces))
    assert piece.flop_s > 1.0 / kind.fp16_flops
    few, many = (cost(hosted, GPT_OSS, 1).dense_s(t) / cost(bare, GPT_OSS, 1).dense_s(t) for t in (8, 16384))
    assert few == pytest.approx(1.0, abs=0.15)
    assert many > 1.15  # experts' tiles are not full


def test_mxfp4_is_multiplied_in_four_bits_where_the_gpu_can() -> None:
    """No table has these products, and those in 16 bits are no guide."""
    mi355x = catalogue.find_gpu("MI355X-288GB").gpu
    bare, hosted = modelled_profile(mi355x), for_engine(modelled_profile(mi355x), mi355x, "vllm")
    whole = replace(GPT_OSS, weight_bytes=0.53125)
    assert cost(hosted, whole, 1).dense_s(8192) == cost(bare, whole, 1).dense_s(8192)
    assert cost(hosted, whole, 1).dense_s(8192) < cost(hosted, replace(whole, weights="int4"), 1).dense_s(8192) / 2


def test_int4_experts_have_their_kernels_whoever_packed_them_and_whatever_their_groups() -> None:
    h100 = catalogue.find_gpu("H100-SXM-80GB").gpu
    hosted = for_engine(modelled_profile(h100), h100, "vllm")
    kimi = catalogue.find_model("moonshotai/Kimi-K2.5").model
    assert kimi.weights == "int4"
    fits = [
        hosted.fit(Op.EXPERTS, replace(kimi, weights=weights, weight_bytes=weight_bytes), 8)
        for weights, weight_bytes in (("int4", 0.575), ("awq-int4", 0.53125), ("gptq-int4", 0.5625))
    ]
    assert fits[0] is not None
    assert fits == [fits[0]] * 3
    assert "int4_wo" in fits[0].provenance.origin
    mxfp4 = hosted.fit(Op.EXPERTS, replace(kimi, weights="mxfp4"), 8)
    assert "mxfp4" in mxfp4.provenance.origin


def test_what_was_not_measured_is_scaled_from_a_relative_or_hopper_and_says_so() -> None:
    def scaled(gpu: str, **how: bool) -> set[tuple[float | str | None, str]]:
        kind = catalogue.find_gpu(gpu).gpu
        fits = experts.expert_fits(kind, modelled_profile(kind), "vllm", **{"whole": False} | how)
        return {(fit.scope.weights or fit.scope.weight_bytes, fit.provenance.origin.partition("; ")[2]) for fit in fits}

    of_hopper = {(format_, "scaled from Hopper") for format_ in (1.0, "int4", "mxfp4")}
    assert scaled("A100-SXM-80GB") == {(2.0, ""), *of_hopper}
    assert scaled("V100-SXM-32GB") == {(2.0, "scaled from Ampere"), *of_hopper}
    own = {(2.0, ""), (0.5625, ""), ("int4", ""), ("mxfp4", "")}
    assert scaled("RTX-5090") == {*own, (1.0, "scaled from Ada")}
    assert scaled("B200-SXM-180GB", whole=True) == {*own, (1.0, "")}


def test_tensorrt_llm_runs_its_own_kernels_for_blackwell_as_sglang_does() -> None:
    """The engine's tables have the backends that its recipes choose with data-parallel attention; MXFP4 has one."""

    def pieces(engine: str, gpu: GpuType = B200, **how: bool) -> list[tuple[Piece, ...]]:
        fits = experts.expert_fits(gpu, modelled_profile(gpu), engine, whole=False, **how)
        return [fit.pieces for fit in fits if fit.scope.weights != "mxfp4"]

    assert pieces("trtllm") == pieces("sglang") != pieces("trtllm", default_backend=False)
    h100 = catalogue.find_gpu("H100-SXM-80GB").gpu
    assert pieces("trtllm", h100) == pieces("trtllm", h100, default_backend=False)


def test_vllm_runs_triton_s_kernel_for_fp8_where_the_others_are_off() -> None:
    def pieces(gpu: GpuType = B200, **how: bool) -> dict[tuple[float | str | None, int | None], tuple[Piece, ...]]:
        fits = experts.expert_fits(gpu, modelled_profile(gpu), "vllm", whole=True, **how)
        return {(fit.scope.weights or fit.scope.weight_bytes, fit.scope.tp): fit.pieces for fit in fits}

    usual, triton = pieces(), pieces(default_backend=False)
    assert usual.keys() == triton.keys()
    assert {
        weight_bytes for weight_bytes, ranks in usual if usual[weight_bytes, ranks] != triton[weight_bytes, ranks]
    } == {1.0}
    h100 = catalogue.find_gpu("H100-SXM-80GB").gpu
    assert pieces(h100) == pieces(h100, default_backend=False)


def test_made_up_tables_give_back_what_made_them(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    gpu = catalogue.find_gpu("H100-SXM-80GB").gpu
    rows = []
    for tokens in (1, 4, 16, 64, 256, 1024, 4096):
        for hidden, width in ((4096, 1536), (7168, 2048), (5120, 4096)):
            for slices, owners in ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (1, 8)):
                fixed_s, flop, byte = TRUE[owners > 1]
                expert = 3 * hidden * width / slices / owners
                seconds = fixed_s + flop * 2 * tokens * 8 * expert / gpu.fp16_flops
                moved = 4 * 2 * tokens * 8 * (hidden + width / slices / owners)
                read = 128 * (1 - (1 - 8 / 128) ** tokens) * expert * 2
                seconds += byte * (read + moved) / gpu.mem_bytes_per_s
                rows.append(
                    {
                        "moe_dtype": "bfloat16", "distribution": "power_law_1.2", "num_tokens": tokens,
                        "hidden_size": hidden, "inter_size": width, "topk": 8, "num_experts": 128,
                        "moe_tp_size": slices, "moe_ep_size": owners, "latency": seconds * 1e3,
                        "kernel_source": "made_up",
                    }
                )  # fmt: skip
    others = [row | {"distribution": "balanced", "latency": 1e3} for row in rows]
    others += [row | {"moe_tp_size": 2, "moe_ep_size": 2, "latency": 1e3} for row in rows]
    others += [row | {"kernel_source": "made_up_min_latency", "latency": 1e-6} for row in rows]
    asked = [
        (system, *each) for system, versions in engine_kernels._EXPERT_VERSIONS.items() for each in versions.items()
    ]
    asked += [(system, engine, version) for system, engine, _, version, _ in engine_kernels._FURTHER]
    for system, engine, version in asked:
        path = tmp_path / system / "moe" / engine / version / "moe_perf.parquet"
        path.parent.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist([*rows, *others]), path)
    assert engine_kernels.main(["experts", "--tables", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 0
    made = json.loads((tmp_path / "out.json").read_text())["kernels"]
    assert len(made) == 32
    hopper = [kernel for kernel in made if kernel["architecture"] == "Hopper"]
    for kernel in hopper:
        found = np.array([kernel["fixed_s"], kernel["flop"], kernel["byte"]])
        assert found == pytest.approx(np.array(TRUE[kernel["whole"]]), rel=0.02)
        assert (kernel["num_points"], kernel["ranks"]) == (63, None)  # too few points for each number of ranks
    assert (
        engine_kernels.main(["experts", "--tables", str(tmp_path / "none"), "--out", str(tmp_path / "out.json")]) == 1
    )
